"""Random Fourier features: a vector per frame whose mean tells distributions apart, not only means.

The squared distance of two mean vectors estimates the squared maximum mean discrepancy (Gretton et
al. 2012) under the Gaussian kernel, at a cost that does not grow with the number of frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Frequencies; each gives a cosine and a sine. The error of MMD² falls with their root.
FREQUENCIES = 256


@dataclass(frozen=True, slots=True)
class RandomFourier:
    """Frequencies (D, R), drawn from the spectrum of exp(−|x − y|² / 2σ²)."""

    frequencies_DR: Tensor

    @classmethod
    def of(cls, features_ND: Tensor, generator: torch.Generator) -> RandomFourier:
        """Draw frequencies for these features; σ is the median distance between two of them.

        The median heuristic of Gretton et al. 2012, §8. Features that are all alike have no
        distance: any bandwidth serves them.
        """
        distances = torch.pdist(features_ND)
        bandwidth = float(distances.median()) if len(distances) else 0.0
        shape = (features_ND.shape[1], FREQUENCIES)
        return cls(torch.randn(shape, generator=generator) / (bandwidth or 1.0))

    def __call__(self, features_BD: Tensor) -> Tensor:
        """(B, 2·R); inner products estimate the kernel. Rahimi & Recht 2007, algorithm 1.

        Cosine and sine in pairs have the smaller variance (Sutherland & Schneider 2015, §2).
        """
        phases_BR = features_BD @ self.frequencies_DR
        waves_B2R = torch.cat([phases_BR.cos(), phases_BR.sin()], dim=-1)
        scaled_B2R: Tensor = waves_B2R / self.frequencies_DR.shape[1] ** 0.5
        return scaled_B2R
