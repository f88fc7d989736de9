"""A source over a list of records, for tests and demonstrations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from agent.sources import EndOfStream
from agent.types import Partition, Record


class MemorySource:
    """Delivers records in the order given, then ends.

    `committed` holds the next offset to read of each partition, as a broker would.
    """

    def __init__(self, records: Iterable[Record], max_records: int = 32) -> None:
        self._records = list(records)
        self._max_records = max_records
        self._waiting = list(self._records)
        self._lost: frozenset[Partition] = frozenset()
        self._paused = False
        self.committed: dict[Partition, int] = {}

    def poll(self, timeout_s: float) -> list[Record]:
        """The next records; never waits."""
        if self._paused:
            return []
        if not self._waiting:
            raise EndOfStream
        polled = self._waiting[: self._max_records]
        del self._waiting[: self._max_records]
        return polled

    def lose(self, partitions: frozenset[Partition]) -> None:
        """Play a rebalance: the partitions leave, and return at their committed offsets."""
        self._lost |= partitions
        self._waiting = [
            *(record for record in self._waiting if record.id.log not in partitions),
            *(record for record in self._records if self._is_due(record, partitions)),
        ]

    def lost(self) -> frozenset[Partition]:
        """Partitions that `lose` took since the last call."""
        lost, self._lost = self._lost, frozenset()
        return lost

    def pause(self) -> None:
        """Deliver nothing until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Deliver again."""
        self._paused = False

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Keep the offsets in `committed`."""
        self.committed.update(offsets)

    def lag(self) -> dict[Partition, int]:
        """Records not yet polled, by partition."""
        return dict(Counter(record.id.log for record in self._waiting))

    @property
    def ready(self) -> bool:
        """Always: nothing has to be assigned."""
        return True

    def close(self) -> None:
        """Nothing to release."""

    def _is_due(self, record: Record, partitions: frozenset[Partition]) -> bool:
        log = record.id.log
        return log in partitions and record.id.offset >= self.committed.get(log, 0)
