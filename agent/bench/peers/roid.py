"""ROID: weighted self-training, weight ensembling and prior correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.bench.peers.losses import softmax_entropy, symmetric_cross_entropy
from agent.bench.peers.norms import TrainedNorms, gradients
from agent.bench.peers.views import RandomView
from agent.encode import Encoder

#: A surer prediction than this has no slope any more.
SUREST = 0.99
#: Keeps the logarithm finite where a probability is zero.
EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class ROIDConfig:
    """The repository's ImageNet-C setting, at batches of 64."""

    learning_rate: float = 0.00025
    """Of SGD with Nesterov momentum."""
    momentum: float = 0.9
    """Of SGD."""
    source_momentum: float = 0.99
    """Share of the adapted weights that weight ensembling keeps in a step; the rest is source."""
    mean_momentum: float = 0.9
    """Of the moving average of predictions that diversity is measured against."""
    temperature: float = 1 / 3
    """Of the weights of the loss."""


class ROID:
    """Self-training on sure and diverse predictions, pulled back to the source at every step.

    Marsden, Döbler and Yang, WACV 2024, "Universal Test-time Adaptation through Weight Ensembling,
    Diversity Weighting, and Prior Correction" (github.com/mariodoebler/test-time-adaptation).

    Interpretation: prior correction multiplies the predicted probabilities by the smoothed prior,
    as the paper derives it, so the prior's logarithm is added to the logits. The repository
    multiplies the logits, which depends on their arbitrary offset; CLIP's are cosines and all
    positive, and the prior would drown them. Where a whole batch is equally diverse or sure, as a
    batch of one is, the scaled measure is 0/0 and taken as 0, so that the images weigh the same.
    """

    name: ClassVar[str] = "roid"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: ROIDConfig = ROIDConfig(),
        seed: int = 0,
    ) -> None:
        """`seed` is of the views."""
        n_labels = len(zero_shot.labels)
        self._config = config
        self._mean_K = torch.full((n_labels,), 1 / n_labels, device=encoder.device)
        self._view = RandomView(seed, encoder.device, edge="reflection", blur_and_noise=False)
        self._norms = TrainedNorms(
            encoder,
            zero_shot,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            nesterov=True,
        )

    @gradients()
    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of the forward pass before the step, corrected by the batch's prior."""
        logits_BK = self._norms.logits(pixels_BCHW)
        weight_B = self._weights(logits_BK.detach())
        kept_B = weight_B > 0
        kept_SK = logits_BK[kept_B]
        view_SK = self._norms.logits(self._view(pixels_BCHW[kept_B]))
        loss_S = soft_likelihood_ratio(kept_SK) + symmetric_cross_entropy(view_SK, kept_SK)
        self._norms.descend((weight_B[kept_B] * loss_S).sum() / len(pixels_BCHW))
        self._ensemble()
        return prior_corrected(logits_BK.detach())

    def _weights(self, logits_BK: Tensor) -> Tensor:
        """Certain and diverse predictions weigh more; less diverse ones than the mean, nothing."""
        probabilities_BK = logits_BK.softmax(dim=-1)
        diversity_B = _spread(1 - F.cosine_similarity(self._mean_K, probabilities_BK))
        certainty_B = _spread(-softmax_entropy(logits_BK))
        self._mean_K = torch.lerp(
            probabilities_BK.mean(dim=0), self._mean_K, self._config.mean_momentum
        )
        weight_B = torch.exp(diversity_B * certainty_B / self._config.temperature)
        return torch.where(diversity_B < diversity_B.mean(), 0.0, weight_B)

    @torch.no_grad()
    def _ensemble(self) -> None:
        for parameter, source in zip(self._norms.parameters, self._norms.source, strict=True):
            parameter.lerp_(source, 1 - self._config.source_momentum)


def soft_likelihood_ratio(logits_BK: Tensor) -> Tensor:
    """How far (B,) a prediction is from certain, with slopes that do not vanish as it gets sure."""
    probability_BK = logits_BK.softmax(dim=-1).clamp_max(SUREST)
    odds_BK = probability_BK / (1 - probability_BK)
    return -(probability_BK * torch.log(odds_BK + EPSILON)).sum(dim=-1)


def prior_corrected(logits_BK: Tensor) -> Tensor:
    """Logits whose probabilities are reweighted by the batch's own smoothed class prior."""
    batch, n_labels = logits_BK.shape
    prior_K = logits_BK.softmax(dim=-1).mean(dim=0)
    smoothing = max(1 / batch, 1 / n_labels) / prior_K.max()
    smooth_K = (prior_K + smoothing) / (1 + smoothing * n_labels)
    return logits_BK + smooth_K.log()


def _spread(values_B: Tensor) -> Tensor:
    """The values scaled so that the least is 0 and the greatest 1."""
    low, high = values_B.aminmax()
    return (values_B - low) / (high - low) if high > low else torch.zeros_like(values_B)
