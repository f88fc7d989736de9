"""How many pictures each camera may have kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache

#: Cameras with an allowance of their own at a time.
MAX_CAMERAS = 256
_HOUR_S = 3600.0


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class Allowance:
    """A token bucket for each camera: an hour's worth at once, and no more than that an hour."""

    def __init__(self, per_hour: int, clock: Callable[[], float]) -> None:
        """`clock` is monotonic, in seconds."""
        self._per_hour = per_hour
        self._clock = clock
        self._buckets: LRUCache[str, _Bucket] = LRUCache(MAX_CAMERAS)

    def take(self, camera: str) -> bool:
        """Use up one picture of the camera's, if it has one."""
        bucket = self._bucket(camera)
        now = self._clock()
        gained = (now - bucket.filled_at) * self._per_hour / _HOUR_S
        bucket.tokens = min(bucket.tokens + gained, self._per_hour)
        bucket.filled_at = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def give_back(self, camera: str) -> None:
        """Nothing was kept after all."""
        bucket = self._bucket(camera)
        bucket.tokens = min(bucket.tokens + 1, self._per_hour)

    def _bucket(self, camera: str) -> _Bucket:
        bucket = self._buckets.get(camera)
        if bucket is None:
            # A newcomer takes over what the camera that was silent longest had left. Were it given
            # a full bucket, whoever invents a camera for each frame would have no limit.
            full = len(self._buckets) >= MAX_CAMERAS
            bucket = self._buckets.popitem()[1] if full else _Bucket(self._per_hour, self._clock())
            self._buckets[camera] = bucket
        return bucket
