"""Whether a domain's answers are still as sure as they were when its correction was judged.

Weather that thickens in small steps may stay one domain, and what was judged at its first step is
out of date at the last. How sure answers are tells it sooner than how pictures look: from the
faintest frost to the thickest, pictures move by less than half a standard deviation of what frost
varies by anyway, and the mean entropy of answers doubles.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Windows that are taken for the latest.
_LENGTHS = (1, 2, 4)
_MOST = max(_LENGTHS)
#: Nats; a camera that shows one thing does not vary by chance.
_LEAST_ERROR = 0.02


@dataclass(slots=True)
class _Sum:
    """Count, mean, and squared deviations of what was added so far (Welford 1962)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, other: _Sum) -> None:
        count = self.count + other.count
        step = other.mean - self.mean
        self.squares += other.squares + step**2 * self.count * other.count / count
        self.mean += step * other.count / count
        self.count = count

    @property
    def error(self) -> float:
        """Variance of the mean."""
        return self.squares / (self.count - 1) / self.count


class Steadiness:
    """Compares the latest entropies with all that went before (Welch 1947).

    The latest are one, two or four windows: few tell a great change at once, many a small one.
    `window` is in frames; `bar` in standard errors, which chance seldom exceeds.
    """

    def __init__(self, window: int, bar: float) -> None:
        self._window = window
        self._bar = bar
        self.restart()

    def restart(self) -> None:
        """Forget all frames."""
        self._before = _Sum()
        self._latest: deque[_Sum] = deque([_Sum()])  # the last is still being filled

    def add(self, entropies: list[float]) -> bool:
        """Take in frames in order; whether they have changed, after which all begins anew."""
        for value in filter(math.isfinite, entropies):
            self._latest[-1].add(_Sum(1.0, value))
            if self._latest[-1].count < self._window:
                continue
            if self._has_changed():
                self.restart()
                return True
            self._latest.append(_Sum())
            if len(self._latest) > _MOST:
                self._before.add(self._latest.popleft())
        return False

    def _has_changed(self) -> bool:
        windows = [self._before, *self._latest] if self._before.count else list(self._latest)
        for length in _LENGTHS:
            if len(windows) > length:
                before, lately = _sum(windows[:-length]), _sum(windows[-length:])
                error = math.sqrt(before.error + lately.error + _LEAST_ERROR**2)
                if abs(lately.mean - before.mean) > self._bar * error:
                    return True
        return False

    def state(self) -> Tensor:
        """As a tensor: count, mean and squares of all before and of each of the latest windows."""
        sums = [self._before, *self._latest]
        return torch.tensor(
            [[each.count, each.mean, each.squares] for each in sums], dtype=torch.float64
        )

    def load(self, state: Tensor) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: it is of another shape.
        """
        if state.ndim != 2 or state.shape[1] != 3:
            raise ValueError(f"sums of entropies have three columns, not {tuple(state.shape)}")
        self._before, first, *others = (_Sum(*row) for row in state.tolist())
        self._latest = deque([first, *others])


def _sum(windows: Sequence[_Sum]) -> _Sum:
    total = _Sum()
    for each in windows:
        total.add(each)
    return total
