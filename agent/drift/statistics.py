"""What a frame contributes to each detector: one vector, whose mean over a window is all it needs.

The reference fixes how: bandwidth, label groups, class centres and units of style are measured on
the calibration frames once. A detector is a stretch of the vector and a distance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.drift.distances import frechet, jensen_shannon, squared, squared_log_ratio
from agent.drift.fourier import RandomFourier
from agent.drift.groups import label_groups

#: Standard deviations beyond which a measure of style counts no more: a few odd photographs must
#: not look like a change, nor be what few calibration frames happen not to contain.
REACH = 2.0

Distance = Callable[[Tensor, Tensor], Tensor]

#: How each detector compares its stretch of the mean vector with the reference's.
DISTANCES: dict[str, Distance] = {
    "frechet": frechet,
    "domain_distance": lambda a, b: squared(*(each.chunk(2, dim=-1)[0] for each in (a, b))),
    "mmd": squared,
    "labels": jensen_shannon,
    "class_variation": squared_log_ratio,
    "style": lambda a, b: squared(a, b) / a.shape[-1],
}


@dataclass(frozen=True, slots=True)
class DriftReference:
    """Normal frames.

    Unit features (N, D), probabilities of the zero-shot prompt (N, K), styles (N, S) and energies,
    in any order (N',).
    """

    features_ND: Tensor
    probabilities_NK: Tensor
    styles_NS: Tensor
    energies_N: Tensor


class Statistics:
    """From frames to vectors (B, P), and from mean vectors to scores."""

    def __init__(
        self, reference: DriftReference, text_KD: Tensor, generator: torch.Generator
    ) -> None:
        """`text_KD` are the labels' unit text features."""
        features_ND = reference.features_ND
        self._text_KD = text_KD
        self._fourier = RandomFourier.of(features_ND, generator)
        self._groups_KG = label_groups(text_KD, len(features_ND))
        # Pictures and words lie apart in CLIP's space (Liang et al. 2022, "Mind the gap"): a
        # class's pictures scatter about its text feature moved by the gap.
        predicted_N = reference.probabilities_NK.argmax(dim=-1)
        self._gap_D = (features_ND - text_KD[predicted_N]).mean(dim=0)
        self._style_mean_S = reference.styles_NS.mean(dim=0)
        self._style_unit_S = reference.styles_NS.std(dim=0).clamp_min(1e-2)
        sizes = {
            "frechet": 2 * features_ND.shape[1],
            "mmd": 2 * self._fourier.frequencies_DR.shape[1],
            "labels": self._groups_KG.shape[1],
            "class_variation": 1,
            "style": len(self._style_mean_S),
        }
        self._columns: dict[str, slice] = {}
        start = 0
        for detector, size in sizes.items():
            self._columns[detector] = slice(start, start + size)
            start += size
        # The first half of what Fréchet's needs is all that the distance of means needs.
        self._columns["domain_distance"] = self._columns["frechet"]

    def of(self, features_BD: Tensor, probabilities_BK: Tensor, styles_BS: Tensor) -> Tensor:
        """The vectors (B, P) of frames, in the terms of `DriftReference`."""
        predicted_B = probabilities_BK.argmax(dim=-1)
        offset_BD = features_BD - self._text_KD[predicted_B] - self._gap_D
        standard_BS = (styles_BS - self._style_mean_S) / self._style_unit_S
        parts = {
            "frechet": torch.cat([features_BD, features_BD.square()], dim=-1),
            "mmd": self._fourier(features_BD),
            "labels": probabilities_BK @ self._groups_KG,
            "class_variation": offset_BD.square().sum(dim=-1, keepdim=True),
            "style": standard_BS.clamp(-REACH, REACH),
        }
        return torch.cat(list(parts.values()), dim=-1)

    def scores(self, recent_P: Tensor, normal_P: Tensor) -> dict[str, Tensor]:
        """Each detector's score (…) of mean vectors (…, P) against the reference's (…, P)."""
        return {
            detector: distance(
                recent_P[..., self._columns[detector]], normal_P[..., self._columns[detector]]
            )
            for detector, distance in DISTANCES.items()
        }
