"""VDP: prompts in the pixels, learned from a teacher, before a frozen model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.bench.peers.crops import random_resized_crops
from agent.encode import Encoder


@dataclass(frozen=True, slots=True)
class VDPConfig:
    """No code of the paper and not its values were found; each of these says whose it is."""

    frame: float = 30 / 224
    """Width of the frame that holds the prompts, as a share of the image; Bahng et al. 2022."""
    learning_rate: float = 1e-3
    """Of Adam, on the pixels' scale of 0 to 1; that of CoTTA (Wang et al. 2022) on CIFAR."""
    teacher_momentum: float = 0.999
    """How much of the teacher a step keeps; CoTTA's, and that of the same group's SVDP."""
    homeostasis: float = 0.1
    """Weight of the regulariser; Zenke et al. 2017 on CIFAR."""
    damping: float = 1e-3
    """Keeps the importance of what hardly moved finite; Zenke et al. 2017 on CIFAR."""
    confidence_jump: float = 0.1
    """Change of mean confidence between batches that marks a new domain; assumed."""
    min_area: float = 0.5
    """Smallest share of the image in the student's view; assumed."""


class VDP:
    """Visual domain prompts.

    Gan et al., Decorate the Newcomers: Visual Domain Prompt for Continual Test Time Adaptation,
    AAAI 2023, arXiv:2212.04145; no repository was found, and this is written from summaries of the
    paper. Two prompts are added to part of every image, and they are all that is trained. The
    student's prompted prediction is drawn towards that of a teacher, whose prompts are the moving
    average of the student's. The domain-specific prompt follows freely; the domain-agnostic one
    pays for moving entries that mattered in earlier domains: Σ Λᵢ(ωᵢ − ωᵢ*)², with Λᵢ summed over
    the domains from how much of the loss the entry took off, −Σ gᵢδᵢ, over (ωᵢ − ωᵢ*)² + ξ, and ωᵢ*
    the entry when its last domain ended. That is the importance of synaptic intelligence (Zenke et
    al., ICML 2017; github ganguli-lab/pathint). A domain ends where the confidence of the answers
    jumps.

    Interpretation, where the summaries leave it open:

    - The prompts share one frame round the image, the place that did best with CLIP in Bahng et
      al. 2022, and start at zero, which is the zero-shot model. Prompted pixels are not clipped.
    - The teacher sees the image and the student a random resized crop of it, half of them
      mirrored; the target is the teacher's soft prediction. On the same pixels the two would
      agree from the start and nothing would be learned.
    - As in the code of Zenke et al. the sum of importances is kept from falling below zero, and
      the gradient in it is that of the prediction alone.
    - The domain-specific prompt is not reset at a jump: it follows, and a false alarm is cheap.
    - A batch is answered by the student's prompts after they have learned from it.
    - Normalisation layers keep the checkpoint's statistics, as the model is frozen.
    """

    name: ClassVar[str] = "vdp"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: VDPConfig = VDPConfig(),
        seed: int = 0,
    ) -> None:
        """`seed` draws the student's views."""
        self._encoder = encoder
        self._zero_shot = zero_shot
        self._config = config
        self._rng = np.random.default_rng(seed)
        size = encoder.preprocess.size
        blank_CHW = torch.zeros(3, size, size, device=encoder.device)
        self._frame_HW = _frame(size, max(1, round(config.frame * size))).to(encoder.device)
        self._specific_CHW = blank_CHW.clone().requires_grad_(True)
        self._agnostic_CHW = blank_CHW.clone().requires_grad_(True)
        self._optimizer = torch.optim.Adam(
            [self._specific_CHW, self._agnostic_CHW], lr=config.learning_rate
        )
        # Prompts only ever act by their sum, and so does their moving average.
        self._teacher_CHW = blank_CHW.clone()
        self._homeostasis = _Homeostasis(blank_CHW, config.damping)
        self._confidence: float | None = None

    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of the images under the prompts that have learned from them."""
        with torch.no_grad():
            targets_BK = self._logits(pixels_BCHW, self._teacher_CHW).softmax(dim=-1)
        self._notice_domain(float(targets_BK.amax(dim=-1).mean()))
        self._learn(pixels_BCHW, targets_BK)
        with torch.no_grad():
            return self._logits(pixels_BCHW, self._specific_CHW + self._agnostic_CHW)

    def _logits(self, pixels_BCHW: Tensor, prompt_CHW: Tensor) -> Tensor:
        prompted_BCHW = pixels_BCHW + self._frame_HW * prompt_CHW
        return self._zero_shot.logits(self._encoder.encode_image(prompted_BCHW))

    def _notice_domain(self, confidence: float) -> None:
        last, self._confidence = self._confidence, confidence
        if last is not None and abs(confidence - last) > self._config.confidence_jump:
            self._homeostasis.consolidate(self._agnostic_CHW.detach())

    def _learn(self, pixels_BCHW: Tensor, targets_BK: Tensor) -> None:
        config = self._config
        views_BCHW = torch.cat(
            [random_resized_crops(image, 1, config.min_area, self._rng) for image in pixels_BCHW]
        )
        with torch.enable_grad():
            prompt_CHW = self._specific_CHW + self._agnostic_CHW
            loss = F.cross_entropy(self._logits(views_BCHW, prompt_CHW), targets_BK)
            (gradient_CHW,) = torch.autograd.grad(loss, prompt_CHW)
        before_CHW = self._agnostic_CHW.detach().clone()
        # The gradient in a sum is that in each of its terms.
        self._specific_CHW.grad = gradient_CHW
        self._agnostic_CHW.grad = gradient_CHW + config.homeostasis * self._homeostasis.gradient(
            before_CHW
        )
        self._optimizer.step()
        with torch.no_grad():
            self._homeostasis.credit(gradient_CHW, self._agnostic_CHW - before_CHW)
            student_CHW = self._specific_CHW + self._agnostic_CHW
            self._teacher_CHW.lerp_(student_CHW, 1 - config.teacher_momentum)


class _Homeostasis:
    """Holds a prompt's entries in place by their importance in the domains so far."""

    def __init__(self, start: Tensor, damping: float) -> None:
        self._damping = damping
        self._anchor = start.clone()
        self._importance = torch.zeros_like(start)
        self._credit = torch.zeros_like(start)

    def gradient(self, entries: Tensor) -> Tensor:
        """Of Σ Λᵢ(ωᵢ − ωᵢ*)² in the entries."""
        return 2 * self._importance * (entries - self._anchor)

    def credit(self, gradient: Tensor, step: Tensor) -> None:
        """Count how much of the loss each entry's step took off."""
        self._credit -= gradient * step

    def consolidate(self, entries: Tensor) -> None:
        """End a domain: what mattered in it is important from now on."""
        moved = (entries - self._anchor).square() + self._damping
        self._importance = (self._importance + self._credit / moved).clamp_min(0)
        self._anchor = entries.clone()
        self._credit.zero_()


def _frame(size: int, width: int) -> Tensor:
    """One within `width` of the border of a square (H, W), zero inside."""
    frame_HW = torch.ones(size, size)
    frame_HW[width : size - width, width : size - width] = 0
    return frame_HW
