"""When a batch is full enough, or its first frame has waited long enough."""

from __future__ import annotations

from collections.abc import Callable

from agent.config import BatchConfig
from agent.decode import Decoder
from agent.types import Frame, Rejected


class Batcher:
    """Takes batches off the head of the decoder's queue."""

    def __init__(self, config: BatchConfig, decoder: Decoder, clock: Callable[[], float]) -> None:
        self._max_size = config.max_size
        self._max_wait_s = config.max_wait_ms / 1000
        self._decoder = decoder
        self._clock = clock
        self._waiting_since: float | None = None

    def take(self, *, draining: bool = False) -> list[Frame | Rejected]:
        """A full batch, or what is there once its first frame has waited; else nothing.

        While draining, whatever is ready is a batch.
        """
        ready = self._decoder.ready()
        if ready == 0:
            self._waiting_since = None  # whoever waited was dropped with its partition
            return []
        now = self._clock()
        if self._waiting_since is None:
            self._waiting_since = now
        waited = now - self._waiting_since >= self._max_wait_s
        if ready < self._max_size and not waited and not draining:
            return []
        self._waiting_since = None
        return self._decoder.take(self._max_size)
