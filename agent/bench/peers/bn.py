"""Prediction-time batch normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.bench.peers.norms import use_batch_statistics
from agent.encode import Encoder


@dataclass(frozen=True, slots=True)
class BNConfig:
    """The statistics of the source beside those of the batch."""

    prior: float = 16.0
    """How many images the source's statistics count for; 0 is prediction-time batch norm."""


class BN:
    """Normalises by the statistics of the batch, with the source's as a prior.

    Nado et al. 2020, "Evaluating Prediction-Time Batch Normalization for Robustness under Covariate
    Shift" (arXiv:2006.10963): the batch alone. Schneider et al., NeurIPS 2020, "Improving
    robustness against common corruptions by covariate shift adaptation"
    (github.com/bethgelab/robustness): the source's statistics weigh as much as N images, which is
    the stronger form on small batches.

    Interpretation: N = 16 is assumed to be what they report for small batches; their repository
    takes the source's share itself and gives no default. LayerNorm and GroupNorm keep no
    statistics, so a tower without BatchNorm has nothing to replace and answers as the frozen model.
    """

    name: ClassVar[str] = "bn"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: BNConfig = BNConfig(),
        seed: int = 0,
    ) -> None:
        """`seed` changes nothing: the method draws no random numbers."""
        self._encoder = encoder.with_own_visual()
        self._zero_shot = zero_shot
        use_batch_statistics(self._encoder.visual, config.prior)

    @torch.no_grad()
    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K) under the batch's statistics; nothing is remembered."""
        return self._zero_shot.logits(self._encoder.encode_image(pixels_BCHW))
