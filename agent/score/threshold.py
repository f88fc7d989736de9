"""The novelty above which a frame counts as unknown, without labels and per domain.

Calibration fixes the threshold of the source domain at a quantile of normal frames. A shifted
domain moves the scores of known objects too, so its threshold moves along with the domain's own
running median and median absolute deviation, which fewer than half unknown frames cannot drag far:
it stands as many deviations above the median as calibration's does. Where the scores' tail got
shorter that is too high; the domain's own quantile is then lower, and may be trusted, since unknown
frames can only raise it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from agent.adapt.domains import SOURCE
from agent.score.novelty import Normal, conformal_quantile

#: Frames of a domain that its statistics are taken over.
WINDOW = 1024
#: Frames that a domain's own quantile needs.
QUANTILE_FRAMES = 40
#: Frames' worth of belief in the source's median that a new domain starts with.
PRIOR = 8
#: The same for the deviation, which few frames make too small.
SPREAD_PRIOR = 32
#: Frames that set the source's threshold when nothing was calibrated; it then follows its frames as
#: other domains' do.
WARM_UP = 64
#: Scores that are no further apart are one.
SAME = 1e-4


@dataclass(slots=True)
class Thresholds:
    """One threshold per domain. Until there is a reference, nothing is flagged."""

    false_alarm_rate: float
    normal: Normal | None = None
    _warm_up: list[float] = field(default_factory=list)
    _recent: dict[int, deque[float]] = field(default_factory=dict)
    _calibrated: bool = field(init=False)

    def __post_init__(self) -> None:
        """Note whether there was a calibration."""
        self._calibrated = self.normal is not None

    def of(self, domain: int) -> float:
        """The threshold in the score's units; infinite until the first frames have set it."""
        if self.normal is None:
            return math.inf
        base = self.normal.threshold(self.false_alarm_rate)
        recent = self._recent.get(domain)
        if not recent or (domain == SOURCE and self._calibrated):
            return base
        middle = median(recent)
        spread = median(abs(value - middle) for value in recent) / self.normal.deviation
        trust = len(recent) / (len(recent) + PRIOR)
        spread_trust = len(recent) / (len(recent) + SPREAD_PRIOR)
        above = (base - self.normal.median) * (1 + spread_trust * (spread - 1))
        moved = self.normal.median + trust * (middle - self.normal.median) + above
        if len(recent) < QUANTILE_FRAMES:
            return moved
        return min(moved, conformal_quantile(sorted(recent), self.false_alarm_rate))

    def observe(self, domains: Sequence[int], scores_B: Tensor) -> None:
        """Take in a batch's scores, of flagged frames too: the median bears with them."""
        for domain, value in zip(domains, scores_B.tolist(), strict=True):
            if self.normal is None:
                # A camera at rest gives one score again and again, which says nothing of others.
                if all(abs(value - other) > SAME for other in self._warm_up):
                    self._warm_up.append(value)
                if len(self._warm_up) >= WARM_UP:
                    self.normal = Normal.of(torch.tensor(self._warm_up))
                    self._warm_up.clear()
            elif domain != SOURCE or not self._calibrated:
                self._recent.setdefault(domain, deque(maxlen=WINDOW)).append(value)

    def standard(self, score: float) -> float:
        """A score as deviations above the median of normal frames; NaN until there are some."""
        if self.normal is None:
            return math.nan
        return (score - self.normal.median) / self.normal.deviation

    def forget(self, domain: int) -> None:
        """Drop what is known of a domain whose id is used anew, or that is encoded otherwise."""
        self._recent.pop(domain, None)
