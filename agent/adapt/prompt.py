"""What of the text side can be tuned: one tensor, and the text features it yields.

A tuned tensor θ moves the zero-shot ensemble E by T(θ) − T(θ₀), so that at zero drift the
published features are exactly the ensemble.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.encode import Encoder, Prompts

#: From here on the text tower is too dear to run in every step: cost grows with the labels.
MANY_LABELS = 500
RESIDUAL_RANK = 16


class Tunable(Protocol):
    """A point θ₀ to start from, and T."""

    source: Tensor

    def text(self, theta: Tensor) -> Tensor:
        """T(θ): text features (K, D), differentiable in θ."""


class ContextPrompt:
    """Context vectors shared by all labels (CoOp, Zhou et al. 2022): θ is (M, W)."""

    def __init__(self, encoder: Encoder, labels: tuple[str, ...]) -> None:
        self._encoder = encoder
        self._prompts: Prompts = encoder.prompts(labels)
        self.source = self._prompts.context_MW

    def text(self, theta: Tensor) -> Tensor:
        """The labels behind the context θ, through the text tower."""
        return self._encoder.encode_prompts(self._prompts, theta)


class LowRankResidual:
    """A residual on the text features in their leading singular directions: θ is (K, R)."""

    def __init__(self, text_KD: Tensor) -> None:
        rank = min(RESIDUAL_RANK, *text_KD.shape)
        self._basis_RD = torch.linalg.svd(text_KD, full_matrices=False).Vh[:rank]
        self.source = torch.zeros(len(text_KD), rank, device=text_KD.device)

    def text(self, theta: Tensor) -> Tensor:
        """θ spread over the basis."""
        residual_KD: Tensor = theta @ self._basis_RD
        return residual_KD


def tunable(encoder: Encoder, zero_shot: ZeroShot) -> Tunable:
    """Context vectors where the text tower can be run from embeddings often enough."""
    if encoder.tunes_prompts and len(zero_shot.labels) < MANY_LABELS:
        return ContextPrompt(encoder, zero_shot.labels)
    return LowRankResidual(zero_shot.text_KD)


def shifted(text: Tensor, delta_KD: Tensor) -> Tensor:
    """Text features, (K, D) or (T, K, D), moved by T(θ) − T(θ₀) and normalised again."""
    return F.normalize(text + delta_KD, dim=-1)
