"""Tent: entropy minimisation over the normalisation layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.bench.peers.losses import softmax_entropy
from agent.bench.peers.norms import TrainedNorms, gradients
from agent.encode import Encoder


@dataclass(frozen=True, slots=True)
class TentConfig:
    """The paper's ImageNet setting, at batches of 64."""

    learning_rate: float = 0.00025
    """Of SGD."""
    momentum: float = 0.9
    """Of SGD."""


class Tent:
    """One step on the predictions' mean entropy for every batch, never reset.

    Wang et al., ICLR 2021, "Tent: Fully Test-Time Adaptation by Entropy Minimization"
    (github.com/DequanWang/tent, whose code for ImageNet-C was not released: the setting is the
    paper's, as the repositories of EATA and SAR run it).

    Interpretation: the paper trains BatchNorm; on transformers LayerNorm and GroupNorm are trained,
    as in SAR's experiments with Tent. Dropout stays off. The classifier is the zero-shot text
    features, which are not trained.
    """

    name: ClassVar[str] = "tent"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: TentConfig = TentConfig(),
        seed: int = 0,
    ) -> None:
        """`seed` changes nothing: the method draws no random numbers."""
        self._norms = TrainedNorms(
            encoder, zero_shot, learning_rate=config.learning_rate, momentum=config.momentum
        )

    @gradients()
    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of the forward pass before the step."""
        logits_BK = self._norms.logits(pixels_BCHW)
        self._norms.descend(softmax_entropy(logits_BK).mean())
        return logits_BK.detach()
