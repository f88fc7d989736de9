"""TFUP: a cache of representative unlabelled images beside the zero-shot prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.encode import Encoder

#: Divergences closer together than this are the same but for rounding.
_RESOLUTION = 1e-6


@dataclass(frozen=True, slots=True)
class TFUPConfig:
    """Defaults of the repository, the same in each of its configurations."""

    alpha: float = 0.3
    """Weight of the cache's logits."""
    beta: float = 1.0
    """Sharpness of the cache's similarities."""
    temperature: float = 10.0
    """Factor from cosines to the logits whose probabilities select and compare images."""
    cache_proportion: float = 0.3
    """Share of the images to cache, were they spread evenly over the labels."""
    shots: tuple[int, int] = (9, 16)
    """Least and most images to cache of a label, whatever that share says."""


class TFUP:
    """Training-free unsupervised prompt.

    Long et al., Training-Free Unsupervised Prompt for Vision-Language Models, arXiv:2404.16339,
    2024; github wlb12345/TFUP, `utils.py` and the function `TFUP` of `main.py`. The feature cache
    model of a label holds representative images: of those of highest instance confidence, which
    is the label's probability, twice as many as wanted, the half with the best prototype score,
    which is the smallest sum of Kullback-Leibler divergences to the others. An image is compared
    with them by the multi-level similarity: the cosine of features times a similarity of
    predictions, which scales the divergences from 2 for the nearest cached image to 0 for the
    farthest.

    Interpretation: the paper selects from a pool of unlabelled images that is there from the
    start, and tests on the same or on others. Here the pool is the stream so far, with the batch
    to answer. Only the most confident images of each label can ever be chosen, so that a bounded
    number of them is kept and the cache is, at every moment, the one that the repository would
    build from all images so far. As there, an image may be in the caches of many labels; before
    many images are seen, the caches of all labels are alike and change no answer. The text
    features are the operator's templates, not the repository's sentences from a language model,
    and the zero-shot logits have the checkpoint's factor for its 100.
    """

    name: ClassVar[str] = "tfup"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: TFUPConfig = TFUPConfig(),
        seed: int = 0,
    ) -> None:
        """`seed` is every peer's; nothing here is random."""
        self._encoder = encoder
        self._zero_shot = zero_shot
        self._config = config
        n_labels, width = zero_shot.text_KD.shape
        self._seen = 0
        # Of each label the most confident images so far, in falling order of confidence.
        self._confidences_KN = torch.zeros(n_labels, 0, device=encoder.device)
        self._pool_KND = torch.zeros(n_labels, 0, width, device=encoder.device)

    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of the zero-shot prompt and the cache, which knows these images."""
        features_BD = self._encoder.encode_image(pixels_BCHW)
        self._remember(features_BD)
        cached_BK = self._cached_logits(features_BD, self._representatives())
        return self._zero_shot.logits(features_BD) + self._config.alpha * cached_BK

    def _log_probabilities(self, features: Tensor) -> Tensor:
        logits = self._config.temperature * features @ self._zero_shot.text_KD.T
        return F.log_softmax(logits, dim=-1)

    def _remember(self, features_BD: Tensor) -> None:
        new_KB = self._log_probabilities(features_BD).exp().T
        confidences = torch.cat([self._confidences_KN, new_KB], dim=1)
        pool = torch.cat([self._pool_KND, features_BD.expand(len(new_KB), -1, -1)], dim=1)
        n = min(2 * self._config.shots[1], confidences.shape[1])
        self._confidences_KN, places_KN = confidences.topk(n, dim=1)
        self._pool_KND = _take(pool, places_KN)
        self._seen += len(features_BD)

    def _representatives(self) -> Tensor:
        """Features (K, S, D) of the images to compare with."""
        least, most = self._config.shots
        share = int(self._seen * self._config.cache_proportion / len(self._pool_KND))
        shots = min(max(share, least), most)
        candidates_KND = self._pool_KND[:, : 2 * shots]
        log_p = self._log_probabilities(candidates_KND)
        n = log_p.shape[1]
        # Σₘ KL(pⱼ ‖ pₘ) = n Σ pⱼ log pⱼ − Σ pⱼ Σₘ log pₘ, which needs no pairs.
        divergence_KN = (log_p.exp() * (n * log_p - log_p.sum(dim=1, keepdim=True))).sum(dim=-1)
        chosen_KS = divergence_KN.topk(min(shots, n), dim=1, largest=False).indices
        return _take(candidates_KND, chosen_KS)

    def _cached_logits(self, features_BD: Tensor, keys_KSD: Tensor) -> Tensor:
        n_labels, shots, _ = keys_KSD.shape
        keys_ND = keys_KSD.flatten(0, 1)
        p_BK = self._log_probabilities(features_BD).exp()
        # The repository standardises the divergences first, which scaling them to [0, 2] undoes;
        # so it does the entropy of the image, by which divergence and cross-entropy differ.
        divergence_BN = -p_BK @ self._log_probabilities(keys_ND).T
        farthest_B1 = divergence_BN.amax(dim=1, keepdim=True)
        spread_B1 = farthest_B1 - divergence_BN.amin(dim=1, keepdim=True)
        similarity_BN = 2 * (farthest_B1 - divergence_BN) / spread_B1.clamp_min(_RESOLUTION)
        similarity_BN = similarity_BN * (features_BD @ keys_ND.T)
        affinities_BN = torch.exp(-self._config.beta * (1 - similarity_BN))
        return affinities_BN.view(-1, n_labels, shots).sum(dim=-1)


def _take(features_KND: Tensor, places_KM: Tensor) -> Tensor:
    """Of each label the features at its places, (K, M, D)."""
    rows_K1 = torch.arange(len(places_KM), device=places_KM.device)[:, None]
    return features_KND[rows_K1, places_KM]
