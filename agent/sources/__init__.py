"""Where records come from. A source is polled by one thread, which also commits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from agent.types import Partition, Record


class EndOfStream(Exception):
    """Raised by `Source.poll` when nothing will ever come again. A signal, not an error."""


class Source(Protocol):
    """An ordered supply of records, in one or more partitions."""

    def poll(self, timeout_s: float) -> list[Record]:
        """Records that are ready, waiting up to `timeout_s` for the first; often none.

        A paused source returns none but keeps its place in the consumer group.

        Raises:
            EndOfStream: nothing will ever come again.
            BrokerUnavailable: no broker answers; the same call may succeed later.
        """

    def lost(self) -> frozenset[Partition]:
        """Partitions that went to another member since the last call.

        Their records that were polled but not committed will be delivered again, elsewhere or
        here: they must be dropped, not committed.
        """

    def pause(self) -> None:
        """Stop fetching while a batch is computed or the queue is full."""

    def resume(self) -> None:
        """Fetch again."""

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Record the next offset to read of each partition, synchronously.

        Raises:
            BrokerUnavailable: nothing was committed; the same call may succeed later.
        """

    def lag(self) -> dict[Partition, int]:
        """Records not yet polled, by assigned partition, as far as is known without asking."""

    @property
    def ready(self) -> bool:
        """Whether records may come: for a consumer group, that partitions are assigned."""

    def close(self) -> None:
        """Leave, without committing anything more."""
