"""TDA: caches of sure and of doubtful test images beside the zero-shot prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agent.adapt.strategy import ZeroShot, entropy
from agent.encode import Encoder


@dataclass(frozen=True, slots=True)
class TDAConfig:
    """Defaults of the repository's `configs/imagenet.yaml`."""

    positive_shots: int = 3
    """Images kept of each label in the positive cache."""
    positive_alpha: float = 2.0
    """Weight of the positive cache's logits."""
    positive_beta: float = 5.0
    """Sharpness of the positive cache's affinities."""
    negative_shots: int = 2
    """Images kept of each label in the negative cache."""
    negative_alpha: float = 0.117
    """Weight of the negative cache's logits."""
    negative_beta: float = 1.0
    """Sharpness of the negative cache's affinities."""
    entropy_range: tuple[float, float] = (0.2, 0.5)
    """Normalised entropies between which an image is doubtful enough for the negative cache."""
    mask_range: tuple[float, float] = (0.03, 1.0)
    """Probabilities between which the negative cache speaks against a label."""


class TDA:
    """Training-free dynamic adapter.

    Karmanov et al., Efficient Test-Time Adaptation of Vision-Language Models, CVPR 2024; github
    kdiAAA/TDA, `tda_runner.py`. Of each label that the zero-shot model answers, the positive cache
    keeps the features of the images of lowest entropy, and the negative cache those of the
    doubtful ones with the labels that are not out of the question for them. What is cached pulls
    similar images towards the former's label and pushes them from the latter's.

    As published, images go one by one, each into the caches before it is answered, and entropy
    in nats is normalised by the base-two logarithm of the number of labels.

    Interpretation: the repository's logits are 100 times the cosines, here the factor is the
    checkpoint's. On ImageNet, whose configuration this is, the repository sees one view of an
    image as here; on ImageNet's variants it averages confident ones of 64 views, which TPT does.
    """

    name: ClassVar[str] = "tda"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: TDAConfig = TDAConfig(),
        seed: int = 0,
    ) -> None:
        """`seed` is every peer's; nothing here is random."""
        self._encoder = encoder
        self._zero_shot = zero_shot
        self._config = config
        n_labels, width = zero_shot.text_KD.shape
        self._positive = _Cache(n_labels, config.positive_shots, width, encoder.device)
        self._negative = _Cache(n_labels, config.negative_shots, width, encoder.device)
        self._suspects_KSK = torch.zeros(
            n_labels, config.negative_shots, n_labels, dtype=torch.bool, device=encoder.device
        )

    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of the zero-shot prompt and both caches, image by image."""
        features_BD = self._encoder.encode_image(pixels_BCHW)
        logits_BK = self._zero_shot.logits(features_BD)
        probabilities_BK = logits_BK.softmax(dim=-1)
        adapted = []
        for feature_D, logits_K, probabilities_K in zip(
            features_BD, logits_BK, probabilities_BK, strict=True
        ):
            self._remember(feature_D, probabilities_K)
            adapted.append(logits_K + self._cached_logits(feature_D))
        return torch.stack(adapted)

    def _remember(self, feature_D: Tensor, probabilities_K: Tensor) -> None:
        config = self._config
        label = int(probabilities_K.argmax())
        nats = entropy(probabilities_K)
        self._positive.offer(label, feature_D, float(nats))
        low, high = config.entropy_range
        if low < float(nats / math.log2(len(probabilities_K))) < high:
            slot = self._negative.offer(label, feature_D, float(nats))
            if slot is not None:
                least, most = config.mask_range
                suspects_K = (probabilities_K > least) & (probabilities_K < most)
                self._suspects_KSK[label, slot] = suspects_K

    def _cached_logits(self, feature_D: Tensor) -> Tensor:
        config = self._config
        support_KS = self._positive.affinities(feature_D, config.positive_beta)
        doubt_KS = self._negative.affinities(feature_D, config.negative_beta)
        # Most labels have no doubtful image, and the mask of all of them is K² long.
        filled_KS = doubt_KS > 0
        against_K = doubt_KS[filled_KS] @ self._suspects_KSK[filled_KS].float()
        return config.positive_alpha * support_KS.sum(dim=1) - config.negative_alpha * against_K


class _Cache:
    """Of each label, the features of the images of lowest entropy."""

    def __init__(self, n_labels: int, shots: int, width: int, device: torch.device) -> None:
        self._keys_KSD = torch.zeros(n_labels, shots, width, device=device)
        self._entropies_KS = torch.full((n_labels, shots), torch.inf, device=device)

    def offer(self, label: int, feature_D: Tensor, nats: float) -> int | None:
        """Keep the image where there is room or another is less sure; which slot it took."""
        slot = int(self._entropies_KS[label].argmax())
        if nats >= float(self._entropies_KS[label, slot]):
            return None
        self._keys_KSD[label, slot] = feature_D
        self._entropies_KS[label, slot] = nats
        return slot

    def affinities(self, feature_D: Tensor, beta: float) -> Tensor:
        """exp(−β(1 − cosine)) with every cached image, (K, S); zero where there is none."""
        affinities_KS = torch.exp(-beta * (1 - self._keys_KSD @ feature_D))
        return affinities_KS * self._entropies_KS.isfinite()
