"""Change points of a camera's entropy, energy and agreement, against its own past.

Windows compare with the calibration; these compare with what the camera did before, so that they
tell when something changed even where the calibration never fitted. Detectors are river's, their
parameters follow from how many frames shall pass between two false alarms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from river.drift import ADWIN, PageHinkley
from torch import Tensor

#: What is watched. Entropy and energy are replaced by their ranks among the calibration's, so that
#: normal values are uniform whatever the model; agreement is 0 or 1.
SIGNALS = ("entropy", "energy", "agreement")
#: What each signal is on normal frames.
USUAL = {"entropy": 0.5, "energy": 0.5, "agreement": 1.0}
#: Standard deviation of ranks; of agreement, the largest that 0 and 1 can have.
DEVIATION = {"entropy": 12**-0.5, "energy": 12**-0.5, "agreement": 0.5}
#: Standard deviations by which a mean may move without Page–Hinkley's sum growing; twice as much is
#: what it finds fastest.
ALLOWANCE = 0.25
#: Frames between two tests of ADWIN.
CLOCK = 32


class Adwin:
    """Adaptive windowing (Bifet & Gavaldà 2007) of values in [0, 1].

    `score` is how far the mean since the last change is from the usual one.
    """

    def __init__(self, signal: str, every: int) -> None:
        """Each of the tests in `every` frames has its share of one false alarm."""
        self._usual = USUAL[signal]
        self._detector = ADWIN(delta=CLOCK / every, clock=CLOCK)  # type: ignore[no-untyped-call]

    def take(self, value: float) -> bool:
        """Whether the mean has changed by now."""
        self._detector.update(value)  # type: ignore[no-untyped-call]
        return bool(self._detector.drift_detected)

    @property
    def score(self) -> float:
        """In the signal's units; 0 before the first value."""
        if self._detector.width == 0:
            return 0.0
        return abs(float(self._detector.estimation) - self._usual)

    @staticmethod
    def threshold(signal: str, every: int, window: int) -> float:
        """The change that shows within `window` frames after as many before: ε_cut."""
        chance = math.log(2 * math.log(2 * window) * every / CLOCK)
        half = window / 2  # the harmonic mean of both lengths, halved
        variance = DEVIATION[signal] ** 2
        return math.sqrt(2 / half * variance * chance) + 2 / (3 * half) * chance


class PageHinkleyTest(PageHinkley):
    """Cumulative sums about the running mean, both ways (Page 1954; Hinkley 1971).

    `score` is the larger of them.
    """

    def __init__(self, signal: str, every: int) -> None:
        """Nothing is forgotten: with river's default the sums wander off and alarm unprovoked."""
        super().__init__(
            delta=ALLOWANCE * DEVIATION[signal], threshold=self.bound(signal, every), alpha=1.0
        )

    def take(self, value: float) -> bool:
        """Whether the mean has changed by now."""
        self.update(value)  # type: ignore[no-untyped-call]
        return bool(self.drift_detected)

    @property
    def score(self) -> float:
        """In the signal's units; 0 before the first value."""
        if not self._x_mean.n:
            return 0.0
        increase = self._sum_increase - self._min_increase
        decrease = self._max_decrease - self._sum_decrease
        return float(max(increase, decrease))

    @staticmethod
    def bound(signal: str, every: int) -> float:
        """The sum that normal values exceed once in `every` frames, either way.

        Solves Siegmund's approximation of the run length (1985) by bisection:
        (e^(2·k·b) − 1 − 2·k·b) / 2·k², where k is the allowance and b the bound, both in standard
        deviations, with 1.166 added to b for what the sum overshoots.
        """

        def run_length(bound: float) -> float:
            exponent = 2 * ALLOWANCE * (bound + 1.166)
            return (math.exp(exponent) - 1 - exponent) / (2 * ALLOWANCE**2)

        low, high = 0.0, 1000.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if run_length(middle) < 2 * every else (low, middle)
        return high * DEVIATION[signal]


@dataclass(frozen=True, slots=True)
class ChangePolicy:
    """Frames between two false alarms of a detector, and frames of a camera's window."""

    every: int
    window: int

    def detectors(self) -> dict[str, Adwin | PageHinkleyTest]:
        """A camera's detectors, by name."""
        made: dict[str, Adwin | PageHinkleyTest] = {}
        for signal in SIGNALS:
            made[f"adwin_{signal}"] = Adwin(signal, self.every)
            made[f"page_hinkley_{signal}"] = PageHinkleyTest(signal, self.every)
        return made

    def thresholds(self) -> dict[str, float]:
        """What `score` of each detector is to be compared with."""
        adwin = partial(Adwin.threshold, every=self.every, window=self.window)
        return {f"adwin_{signal}": adwin(signal) for signal in SIGNALS} | {
            f"page_hinkley_{signal}": PageHinkleyTest.bound(signal, self.every)
            for signal in SIGNALS
        }


#: Names of all change detectors.
CHANGE_DETECTORS = tuple(ChangePolicy(1_000_000, 64).thresholds())


class Ranks:
    """Where values stand among normal ones, 0 to 1."""

    def __init__(self, normal_N: Tensor) -> None:
        """Keep normal values, in any order."""
        self._sorted_N = normal_N.float().sort().values

    def of(self, values_B: Tensor) -> list[float]:
        """The share of normal values below each, ties counted half, (B,)."""
        values_B = values_B.float()
        below_B = torch.searchsorted(self._sorted_N, values_B, right=False)
        upto_B = torch.searchsorted(self._sorted_N, values_B, right=True)
        shares: list[float] = ((below_B + upto_B) / (2 * len(self._sorted_N))).tolist()
        return shares


def watch(
    detectors: Mapping[str, Adwin | PageHinkleyTest], signals: Sequence[Mapping[str, float]]
) -> set[str]:
    """Take in a camera's values, the newest last; the names of detectors that found a change."""
    found = set()
    for name, detector in detectors.items():
        signal = name.rpartition("_")[2]
        for values in signals:
            if detector.take(values[signal]):
                found.add(name)
    return found
