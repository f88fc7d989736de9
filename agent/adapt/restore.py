"""Repairing a domain's pictures before they are encoded, from what normal ones look like.

A domain changes how much light there is and how its energy spreads over scales: contrast and fog
take from all of them, blur from the fine ones, and noise adds to those. `Spectrum` measures this,
per colour axis and octave; `equalise` gives each octave back the energy it normally has. Where one
has too little it is amplified; where it has too much, the surplus counts as noise and the gain is
Wiener's, normal energy over present energy (N. Wiener 1949, "Extrapolation, Interpolation, and
Smoothing of Stationary Time Series"). Single bad pixels, which no linear filter removes, fall to
the median of 3 × 3 (J. Tukey 1977, "Exploratory Data Analysis").

Which of these helps a domain is not decided here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

#: Amplification beyond this would mostly lift noise.
MAX_GAIN = 6.0
#: The coarsest octave has about this many pixels a side.
COARSEST = 7
_FLOOR = 1e-8
#: Red, green and blue to grey, red-green and yellow-blue, in which noise and content differ most.
_OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0))


class Restoration(StrEnum):
    """How a domain's pictures are repaired."""

    NONE = "none"
    EQUALISED = "equalised"
    MEDIAN = "median"
    MEDIAN_EQUALISED = "median, equalised"

    @property
    def filters(self) -> bool:
        """Whether the median goes first."""
        return self in (Restoration.MEDIAN, Restoration.MEDIAN_EQUALISED)

    @property
    def equalises(self) -> bool:
        """Whether the spectrum is made normal."""
        return self in (Restoration.EQUALISED, Restoration.MEDIAN_EQUALISED)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Mean energy per octave and opponent axis, and the mean level, over `count` images.

    `energy_OA` has the octaves from fine to coarse and, last, what lies below them, without each
    image's own level; `level_A` is the mean over all images.
    """

    energy_OA: Tensor
    level_A: Tensor
    count: int

    @classmethod
    def of(cls, pixels_BCHW: Tensor) -> Spectrum:
        """Measure images in [0, 1]."""
        octaves = _octaves(_opponent(pixels_BCHW))
        energies = [
            (fine - _enlarged(coarse, fine)).square().mean(dim=(0, 2, 3))
            for fine, coarse in pairwise(octaves)
        ]
        rest = octaves[-1]
        level_BA = rest.mean(dim=(2, 3))
        energies.append((rest - level_BA[..., None, None]).square().mean(dim=(0, 2, 3)))
        return cls(torch.stack(energies), level_BA.mean(dim=0), len(pixels_BCHW))

    def to(self, device: torch.device) -> Spectrum:
        """The same on another device."""
        return Spectrum(self.energy_OA.to(device), self.level_A.to(device), self.count)

    def merged(self, other: Spectrum) -> Spectrum:
        """The spectrum of both sets of images together."""
        count = self.count + other.count
        share = other.count / count
        return Spectrum(
            torch.lerp(self.energy_OA, other.energy_OA, share),
            torch.lerp(self.level_A, other.level_A, share),
            count,
        )


def equalise(pixels_BCHW: Tensor, present: Spectrum, normal: Spectrum) -> Tensor:
    """Images in [0, 1] with the energies and the level of `present` turned into `normal`'s."""
    gains_OA = _gains(present.energy_OA, normal.energy_OA)
    octaves = _octaves(_opponent(pixels_BCHW))
    rest = octaves[-1]
    level = rest.mean(dim=(2, 3), keepdim=True)
    lift_A = normal.level_A - present.level_A
    built = (rest - level) * _axes(gains_OA[-1]) + level + _axes(lift_A)
    # From coarse to fine. A band is an octave less the coarser one enlarged; written so that each
    # octave is enlarged only once.
    for gain_A, fine, coarse in zip(
        gains_OA[:-1].flip(0), reversed(octaves[:-1]), reversed(octaves[1:]), strict=True
    ):
        gain = _axes(gain_A)
        built = torch.addcmul(_enlarged(built - gain * coarse, fine), gain, fine)
    return _colours(built, torch.linalg.inv(_matrix(built))).clamp_(0, 1)


def median3(pixels_BCHW: Tensor) -> Tensor:
    """Each value replaced by the median of the 3 × 3 around it, channel by channel.

    By the exchange network of 19 comparisons (J. Devillard 1998, "Fast median search"), on eight
    bits, of which frames have no more, and which takes half the time.
    """
    levels = (pixels_BCHW * 255).round_().to(torch.uint8)
    padded = F.pad(levels, (1, 1, 1, 1), mode="reflect")
    height, width = pixels_BCHW.shape[-2:]
    nine = [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]
    for low, high in _EXCHANGES:
        nine[low], nine[high] = (
            torch.minimum(nine[low], nine[high]),
            torch.maximum(nine[low], nine[high]),
        )
    return nine[4].to(pixels_BCHW.dtype).div_(255)


_EXCHANGES = (
    *((1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3)),
    *((5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2)),
)


def _gains(present: Tensor, normal: Tensor) -> Tensor:
    ratio = (normal + _FLOOR) / (present + _FLOOR)
    return torch.where(ratio < 1, ratio, ratio.sqrt()).clamp(max=MAX_GAIN)


def _octaves(opponent_BAHW: Tensor) -> list[Tensor]:
    """The image and halved copies of it, down to the coarsest."""
    depth = max(1, round(math.log2(min(opponent_BAHW.shape[-2:]) / COARSEST)))
    octaves = [opponent_BAHW]
    for _ in range(depth):
        octaves.append(F.avg_pool2d(octaves[-1], 2))
    return octaves


def _enlarged(coarse: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(coarse, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _opponent(pixels_BCHW: Tensor) -> Tensor:
    return _colours(pixels_BCHW, _matrix(pixels_BCHW))


def _matrix(like: Tensor) -> Tensor:
    return torch.tensor(_OPPONENT, dtype=like.dtype, device=like.device)


def _colours(image_BCHW: Tensor, matrix: Tensor) -> Tensor:
    return F.conv2d(image_BCHW, matrix[..., None, None])


def _axes(per_axis: Tensor) -> Tensor:
    return per_axis.view(1, -1, 1, 1)
