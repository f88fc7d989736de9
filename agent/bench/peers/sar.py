"""SAR: sharpness-aware and reliable entropy minimisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from agent.adapt.strategy import ZeroShot
from agent.bench.peers.losses import softmax_entropy
from agent.bench.peers.norms import TrainedNorms, gradients
from agent.encode import Encoder

#: The learning rates are published for this many images a batch.
BATCH = 64


@dataclass(frozen=True, slots=True)
class SARConfig:
    """The repository's setting."""

    learning_rate: float = 0.00025
    """Of SGD on BatchNorm and GroupNorm towers; in proportion below batches of 32."""
    layer_norm_learning_rate: float = 0.001
    """Of SGD on LayerNorm towers at batches of 64; in proportion at any other size."""
    momentum: float = 0.9
    """Of SGD."""
    radius: float = 0.05
    """How far uphill the weights go before the gradient is taken (SAM's rho)."""
    margin: float = 0.4
    """Only predictions whose entropy is below this share of ln K teach."""
    loss_momentum: float = 0.9
    """Of the moving average of the loss."""
    reset_below: float = 0.2
    """The tower returns to the source when that average falls below this."""


class SAR:
    """Entropy minimisation towards flat minima, on sure predictions, with a way back.

    Niu et al., ICLR 2023, "Towards Stable Test-Time Adaptation in Dynamic Wild World"
    (github.com/mr-eggplant/SAR).

    Interpretation: the last layers stay frozen, which are layer4 of a ResNet and, of ViT-Base,
    blocks 9 to 11 and the last norm. In other towers it is the last quarter of the normalisation
    layers, which in a ViT of 12 blocks is exactly theirs. A tower with LayerNorm takes ViT's
    learning rate. Where no prediction is sure there is no step, while the repository lets SGD coast
    on its momentum; after a reset the average of the loss starts anew, as its code means to but
    does not.
    """

    name: ClassVar[str] = "sar"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: SARConfig = SARConfig(),
        seed: int = 0,
    ) -> None:
        """`seed` changes nothing: the method draws no random numbers."""
        self._config = config
        self._has_layer_norm = any(isinstance(m, nn.LayerNorm) for m in encoder.visual.modules())
        self._margin = config.margin * math.log(len(zero_shot.labels))
        self._loss: float | None = None
        self._norms = TrainedNorms(
            encoder,
            zero_shot,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            frozen=top_layers,
        )

    @gradients()
    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of the forward pass before the step."""
        logits_BK = self._norms.logits(pixels_BCHW)
        entropy_B = softmax_entropy(logits_BK)
        sure_B = entropy_B < self._margin
        if sure_B.any():
            before = self._climb(entropy_B[sure_B].mean())
            entropy_S = softmax_entropy(self._norms.logits(pixels_BCHW))[sure_B]
            self._descend(entropy_S[entropy_S < self._margin], before, len(pixels_BCHW))
        return logits_BK.detach()

    def _climb(self, loss: Tensor) -> list[Tensor]:
        """Go uphill to where the loss is worst nearby; returns where it came from."""
        self._norms.backward(loss)
        before = [parameter.detach().clone() for parameter in self._norms.parameters]
        slopes = [(p, p.grad) for p in self._norms.parameters if p.grad is not None]
        norm = torch.stack([slope.norm() for _, slope in slopes]).norm()
        with torch.no_grad():
            for parameter, slope in slopes:
                parameter.add_(slope * (self._config.radius / (norm + 1e-12)))
        return before

    def _descend(self, entropy_S: Tensor, before: Sequence[Tensor], batch: int) -> None:
        """Step from `before` by the gradient found uphill, and reset if the loss has collapsed."""
        config = self._config
        if len(entropy_S):
            self._norms.backward(entropy_S.mean())
        with torch.no_grad():
            for parameter, old in zip(self._norms.parameters, before, strict=True):
                parameter.copy_(old)
        if not len(entropy_S):
            return
        for group in self._norms.optimizer.param_groups:
            group["lr"] = self._learning_rate(batch)
        self._norms.optimizer.step()
        loss = float(entropy_S.detach().mean())
        if self._loss is not None:
            loss += config.loss_momentum * (self._loss - loss)
        self._loss = loss
        if self._loss < config.reset_below:
            self._norms.reset()
            self._loss = None

    def _learning_rate(self, batch: int) -> float:
        if self._has_layer_norm:
            return self._config.layer_norm_learning_rate * batch / BATCH
        return self._config.learning_rate * min(1.0, 2 * batch / BATCH)


def top_layers(norms: Sequence[str]) -> Sequence[str]:
    """The normalisation layers next to the output, which are not trained."""
    last_stage = [name for name in norms if "layer4" in name]
    return last_stage or norms[-math.ceil(len(norms) / 4) :]
