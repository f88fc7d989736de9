"""Which frames of a camera tell something new.

Thresholds are for frames that show different things. A camera at rest shows one thing a hundred
times; taken for a hundred frames, it would be far from any calibration after seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachetools import LRUCache
from torch import Tensor

#: Cosine of the features of two frames above which they show the same.
SAME = 0.9
#: Of frames that show the same, one in so many counts: what lasts is not overlooked for ever.
EVERY = 16


@dataclass(slots=True)
class _Last:
    feature_D: Tensor
    passed_over: int = 0

    def shows(self, feature_D: Tensor) -> bool:
        return float(feature_D @ self.feature_D) > SAME


class News:
    """The last frame that counted, of each camera."""

    def __init__(self, cameras: int) -> None:
        """`cameras` are followed at a time; the one silent for longest makes room."""
        self._last: LRUCache[str, _Last] = LRUCache(cameras)

    def rows(self, cameras: Sequence[str], features_BD: Tensor) -> list[int]:
        """The rows of a batch that count, given unit features (B, D)."""
        counting = []
        for row, (camera, feature_D) in enumerate(zip(cameras, features_BD, strict=True)):
            last = self._last.get(camera)
            if last is not None and last.shows(feature_D) and last.passed_over < EVERY - 1:
                last.passed_over += 1
                continue
            self._last[camera] = _Last(feature_D.clone())  # not a view that keeps its batch alive
            counting.append(row)
        return counting
