"""CoTTA: a weight-averaged teacher, averaged views, and stochastic restoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.bench.peers.losses import symmetric_cross_entropy
from agent.bench.peers.norms import gradients, use_batch_statistics
from agent.bench.peers.published import for_labels
from agent.bench.peers.views import RandomView
from agent.encode import Encoder

#: Mean confidence of the source model under which views are averaged: for CIFAR-10-C, CIFAR-100-C
#: and ImageNet-C, as in CoTTA's repository and in the configurations of ROID's.
THRESHOLDS = {10: 0.92, 100: 0.72, 1000: 0.1}


@dataclass(frozen=True, slots=True)
class CoTTAConfig:
    """The repository's ImageNet-C setting, at batches of 64."""

    learning_rate: float = 0.01
    """Of SGD with Nesterov momentum, over all weights of the tower."""
    momentum: float = 0.9
    """Of SGD."""
    teacher_momentum: float = 0.999
    """Share of its own weights that the teacher keeps in a step."""
    restore: float = 0.001
    """Chance of every weight of the student to return to the source after a step."""
    n_views: int = 32
    """How many views the teacher averages over where the source model is unsure."""
    threshold: float | None = None
    """Mean source confidence under which it does; None: published for as many labels."""


class CoTTA:
    """A student that follows its own weight average, on averaged views where the source is unsure.

    Wang et al., CVPR 2022, "Continual Test-Time Domain Adaptation" (github.com/qinenergy/cotta,
    folder imagenet). The teacher's prediction is what the repository returns and evaluates.

    Interpretation: the confidence threshold is set for each data set in the repository, since it
    depends on the labels, so the one published for the nearest number of labels is taken (0.1 at
    ImageNet's thousand). "All weights" are those of the image tower, embeddings and projections
    included; the repository names only `weight` and `bias`, which in a ResNet are all. All three
    towers normalise by batch statistics where they have BatchNorm, the source included, as there.
    LayerNorm towers have none to replace.
    """

    name: ClassVar[str] = "cotta"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: CoTTAConfig = CoTTAConfig(),
        seed: int = 0,
    ) -> None:
        """`seed` is of the views and of the weights that are restored."""
        self._zero_shot = zero_shot
        self._config = config
        self._threshold = (
            for_labels(THRESHOLDS, len(zero_shot.labels))
            if config.threshold is None
            else config.threshold
        )
        self._student, self._teacher, self._source = (
            encoder.with_own_visual(),
            encoder.with_own_visual(),
            encoder.with_own_visual(),
        )
        for tower in (self._student, self._teacher, self._source):
            use_batch_statistics(tower.visual)
        self._student.visual.requires_grad_(True)
        self._optimizer = torch.optim.SGD(
            self._student.visual.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=True,
        )
        self._view = RandomView(seed, encoder.device, edge="border", blur_and_noise=True)
        self._generator = torch.Generator(encoder.device).manual_seed(seed)

    @gradients()
    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """The teacher's logits (B, K) from before the step."""
        teacher_BK = self._teach(pixels_BCHW)
        student_BK = self._logits(self._student, pixels_BCHW)
        loss = symmetric_cross_entropy(student_BK, teacher_BK).mean()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._average_and_restore()
        return teacher_BK

    @torch.no_grad()
    def _teach(self, pixels_BCHW: Tensor) -> Tensor:
        source_BK = self._logits(self._source, pixels_BCHW)
        if float(source_BK.softmax(dim=-1).amax(dim=-1).mean()) >= self._threshold:
            return self._logits(self._teacher, pixels_BCHW)
        total_BK = torch.zeros_like(source_BK)
        for _ in range(self._config.n_views):
            total_BK += self._logits(self._teacher, self._view(pixels_BCHW))
        return total_BK / self._config.n_views

    @torch.no_grad()
    def _average_and_restore(self) -> None:
        for student, teacher, source in zip(
            self._student.visual.parameters(),
            self._teacher.visual.parameters(),
            self._source.visual.parameters(),
            strict=True,
        ):
            teacher.lerp_(student, 1 - self._config.teacher_momentum)
            draw = torch.rand(student.shape, generator=self._generator, device=student.device)
            student.copy_(torch.where(draw < self._config.restore, source, student))

    def _logits(self, encoder: Encoder, pixels_BCHW: Tensor) -> Tensor:
        return self._zero_shot.logits(encoder.encode_image(pixels_BCHW))
