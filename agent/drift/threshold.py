"""Thresholds from how many frames shall pass between two false alarms.

What chance scores is measured on the calibration frames: a part of them makes a window and the rest
its reference, again and again. Window and reference share no frame, as later a camera's will share
none with the calibration, and the reference's own error is part of what chance scores. Far out,
where no draw reaches, three moments tell how seldom a score is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

#: Windows drawn.
DRAWS = 4096
#: A stream is read after as many new frames, at the earliest.
STRIDE = 8
#: Standard errors of the frames' scatter that are put on top.
CAUTION = 2.0
#: Scores are sums of squares and skewed to the right; what chance makes less is none.
_LEAST_SKEWNESS = 0.05
#: A reference counts for no more frames than this: one normal day differs from another by more than
#: the chance that frames of one calibration show.
MOST_LEFT = 64

Scores = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Limit:
    """A detector reports drift above `threshold`, and once more only after it fell to `rearm`.

    Between the two lies half the way to what is usual, so that a score that stays near the
    threshold makes one event and not many.
    """

    threshold: float
    rearm: float


def limits(
    vectors_NP: Tensor, scores: Scores, window: int, every: int, generator: torch.Generator
) -> dict[str, Limit]:
    """The limit of each detector for windows of `window` frames and an alarm in `every` frames.

    `scores` compares mean vectors (M, P) with others. Each reading is counted as if it were an
    alarm of its own, though neighbours share most of their frames: the run time between alarms is
    longer than asked for, not shorter. Where the calibration has fewer frames than two windows,
    half of them make the window; scores are quadratic in the difference of means, and what a longer
    window would have less of is taken off. What the reference lacks of all frames is not taken off:
    it is the margin for frames that are normal and still not like those few.
    """
    frames = len(vectors_NP)
    drawn = min(window, frames // 2)
    left = frames - drawn
    order_MN = torch.rand(DRAWS, frames, generator=generator).argsort(dim=1)
    member_MN = torch.zeros(DRAWS, frames).scatter_(1, order_MN[:, :drawn], 1.0)
    sum_MP = member_MN @ vectors_NP
    null = scores(sum_MP / drawn, (vectors_NP.sum(dim=0) - sum_MP) / left)
    single = scores(vectors_NP, vectors_NP.mean(dim=0))
    shrunk = (1 / window + 1 / min(left, MOST_LEFT)) / (1 / drawn + 1 / left)
    found = {}
    for detector, values_M in null.items():
        usual = float(values_M.double().mean()) * shrunk
        rare = _quantile(values_M.double(), STRIDE / every) * shrunk
        threshold = rare * (1 + CAUTION * _relative_error(single[detector].double()))
        found[detector] = Limit(threshold, (usual + threshold) / 2)
    return found


def _quantile(values_M: Tensor, chance: float) -> float:
    """The value that is exceeded with this chance, of a sum of weighted squares.

    Pearson's approximation by the χ² distribution with the same mean, variance and skewness (Imhof
    1961, eq. 4.1), whose quantile is Wilson and Hilferty's (1931).
    """
    mean, deviation = values_M.mean(), values_M.std()
    if not deviation > 0:
        return float(mean)
    skewness = float(((values_M - mean) / deviation).pow(3).mean())
    freedom = 8 / max(skewness, _LEAST_SKEWNESS) ** 2
    normal = NormalDist().inv_cdf(1 - chance)
    share = 2 / (9 * freedom)
    chi_square = freedom * max(0.0, 1 - share + normal * share**0.5) ** 3
    approximation = float(mean + deviation * (chi_square - freedom) / (2 * freedom) ** 0.5)
    # Where few draws are far from all others the approximation fails, but those were normal too.
    seen = max(chance, 2 / len(values_M))
    return max(approximation, float(values_M.quantile(1 - seen)))


def _relative_error(single_N: Tensor) -> float:
    """How well so many frames tell their scatter, to which scores of windows are proportional."""
    if not single_N.mean() > 0:
        return 0.0
    return float(single_N.std() / single_N.mean() / len(single_N) ** 0.5)
