"""The energy above which a frame counts as unknown, without labels and per domain.

Calibration fixes the threshold of the source domain at a quantile of normal frames. A shifted
domain moves all energies, those of known objects too, so its threshold moves along with the
domain's own running median and median absolute deviation, which fewer than half unknown frames
cannot drag far: it stands as many deviations above the median as calibration's does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from agent.adapt.domains import SOURCE

#: Frames of a domain that its median is taken over.
WINDOW = 256
#: Frames' worth of belief in the source's median that a new domain starts with.
PRIOR = 8
#: Frames that set the source's threshold when nothing was calibrated.
WARM_UP = 64


@dataclass(frozen=True, slots=True)
class EnergyReference:
    """Energies of normal frames, sorted, shape (N,)."""

    sorted_N: Tensor

    @classmethod
    def of(cls, energies_N: Tensor) -> EnergyReference:
        """Keep the energies of normal frames."""
        return cls(energies_N.detach().float().cpu().sort().values)

    @property
    def median(self) -> float:
        """Of the normal frames."""
        return float(self.sorted_N.median())

    @property
    def deviation(self) -> float:
        """Median absolute deviation of the normal frames."""
        return max(float((self.sorted_N - self.median).abs().median()), 1e-6)

    def threshold(self, false_alarm_rate: float) -> float:
        """Split-conformal quantile: a new normal frame lies above it with at most that probability.

        With fewer than 1 / rate − 1 frames no quantile can promise it; the largest comes closest.
        Angelopoulos & Bates 2021, "A Gentle Introduction to Conformal Prediction", §1.
        """
        n = len(self.sorted_N)
        rank = min(n, int(-(-(n + 1) * (1 - false_alarm_rate) // 1)))
        return float(self.sorted_N[rank - 1])


@dataclass(slots=True)
class Thresholds:
    """One threshold per domain. Until there is a reference, nothing is flagged."""

    false_alarm_rate: float
    reference: EnergyReference | None = None
    _warm_up: list[float] = field(default_factory=list)
    _recent: dict[int, deque[float]] = field(default_factory=dict)

    def of(self, domain: int) -> float:
        """The threshold in energy units; infinite until the first frames have set it."""
        if self.reference is None:
            return float("inf")
        base = self.reference.threshold(self.false_alarm_rate)
        recent = self._recent.get(domain)
        if domain == SOURCE or not recent:
            return base
        middle = median(recent)
        spread = median(abs(value - middle) for value in recent) / self.reference.deviation
        trust = len(recent) / (len(recent) + PRIOR)
        own = middle + (base - self.reference.median) * (1 + trust * (spread - 1))
        return base + trust * (own - base)

    def observe(self, domains: Sequence[int], energies_B: Tensor) -> None:
        """Take in a batch's energies, of flagged frames too: the median bears with them."""
        for domain, value in zip(domains, energies_B.tolist(), strict=True):
            if self.reference is None:
                self._warm_up.append(value)
                if len(self._warm_up) >= WARM_UP:
                    self.reference = EnergyReference.of(torch.tensor(self._warm_up))
                    self._warm_up.clear()
            elif domain != SOURCE:
                self._recent.setdefault(domain, deque(maxlen=WINDOW)).append(value)

    def forget(self, domain: int) -> None:
        """Drop what is known of a domain whose id is used anew."""
        self._recent.pop(domain, None)
