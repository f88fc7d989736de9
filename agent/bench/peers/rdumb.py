"""RDumb: ETA with a reset every thousand steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.bench.peers.losses import softmax_entropy
from agent.bench.peers.norms import TrainedNorms, gradients
from agent.bench.peers.published import for_labels
from agent.encode import Encoder

#: Cosine from which on a prediction is redundant: for ImageNet-C as published with EATA and RDumb,
#: for CIFAR-10-C and CIFAR-100-C as in the configurations of ROID's repository.
COSINES = {10: 0.4, 100: 0.1, 1000: 0.05}


@dataclass(frozen=True, slots=True)
class RDumbConfig:
    """The repository's setting, at batches of 64."""

    learning_rate: float = 0.00025
    """Of SGD."""
    momentum: float = 0.9
    """Of SGD."""
    margin: float = 0.4
    """Only predictions whose entropy is below this share of ln K teach."""
    cosine: float | None = None
    """Only those less like the mean prediction teach; None: published for as many labels."""
    mean_momentum: float = 0.9
    """Of the moving average of the predictions that taught."""
    reset_every: int = 1000
    """Steps after which everything returns to the source."""


class RDumb:
    """Entropy minimisation on sure and unusual predictions, with a hard reset now and then.

    Press et al., NeurIPS 2023, "RDumb: A simple approach that questions our progress in continual
    test-time adaptation" (github.com/oripress/CCC), which resets ETA: EATA (Niu et al., ICML 2022;
    github.com/mr-eggplant/EATA) without its Fisher regulariser.

    Interpretation: CCC's code has the margin at ln(1000) / 2 - 1, which says nothing of other
    numbers of labels and would be negative for few; here it is EATA's 0.4 ln K. The redundancy
    threshold is published anew for every data set, since a sure prediction's cosine with an even
    mean is the root of 1 / K: ImageNet's 0.05 would let nothing pass among a hundred labels. So the
    one published for the nearest number of labels is taken. On transformers LayerNorm is trained.
    """

    name: ClassVar[str] = "rdumb"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: RDumbConfig = RDumbConfig(),
        seed: int = 0,
    ) -> None:
        """`seed` changes nothing: the method draws no random numbers."""
        n_labels = len(zero_shot.labels)
        self._config = config
        self._margin = config.margin * math.log(n_labels)
        self._cosine = for_labels(COSINES, n_labels) if config.cosine is None else config.cosine
        self._mean_K: Tensor | None = None
        self._steps = 0
        self._norms = TrainedNorms(
            encoder, zero_shot, learning_rate=config.learning_rate, momentum=config.momentum
        )

    @gradients()
    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of the forward pass before the step."""
        if self._steps == self._config.reset_every:
            self._norms.reset()
            self._mean_K = None
            self._steps = 0
        self._steps += 1
        logits_BK = self._norms.logits(pixels_BCHW)
        entropy_B = softmax_entropy(logits_BK)
        probabilities_BK = logits_BK.detach().softmax(dim=-1)
        teaches_B = self._teaches(entropy_B, probabilities_BK)
        if teaches_B.any():
            entropy_S = entropy_B[teaches_B]
            weight_S = torch.exp(self._margin - entropy_S.detach())
            self._norms.descend((weight_S * entropy_S).mean())
            self._follow(probabilities_BK[teaches_B].mean(dim=0))
        return logits_BK.detach()

    def _teaches(self, entropy_B: Tensor, probabilities_BK: Tensor) -> Tensor:
        sure_B = entropy_B < self._margin
        if self._mean_K is None:
            return sure_B
        return sure_B & (F.cosine_similarity(self._mean_K, probabilities_BK) < self._cosine)

    def _follow(self, mean_K: Tensor) -> None:
        if self._mean_K is not None:
            mean_K = torch.lerp(mean_K, self._mean_K, self._config.mean_momentum)
        self._mean_K = mean_K
