"""A source over a Kafka topic, as a member of a consumer group.

A partition that stays with this member through a rebalance keeps its position, so its frames in
flight stay valid. One that leaves is reported by `lost`, even when it comes back at once: it then
starts again at its committed offset, and delivers nothing before `lost` was called, so that new
frames are never mistaken for the old ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.errors import (
    CommitFailedError,
    FencedInstanceIdError,
    IllegalGenerationError,
    KafkaError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)
from kafka.structs import OffsetAndMetadata

from agent.config import KafkaConfig
from agent.connection import explain, settings
from agent.types import FrameId, Partition, Record

_log = logging.getLogger(__name__)

#: The group moved on while a batch was computed. Nothing failed: what the member still owns is
#: committed once it has rejoined, and the rest is another's to deliver again.
_GROUP_MOVED_ON = (
    CommitFailedError,
    FencedInstanceIdError,
    IllegalGenerationError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)

_REQUEST_TIMEOUT_MS = 10_000

#: A topic that is created, or grows, is found within this time.
_METADATA_MAX_AGE_MS = 15_000

#: After so long without a record the broker is asked whether it is still there: a client whose
#: broker is gone looks the same as one whose cameras are quiet.
_QUIET_S = 10.0

#: Room for a record's key and headers beside its value.
_RECORD_OVERHEAD_BYTES = 64 * 1024
_FETCH_MIN_LIMIT_BYTES = 16 * 1024 * 1024


class KafkaSource:
    """Delivers the records of `frames_topic`, sharing its partitions with the group's members."""

    def __init__(
        self,
        consumer: KafkaConsumer,
        config: KafkaConfig,
        now: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._consumer = consumer
        self._config = config
        self._now = now
        self._clock = clock
        self._heard_at = clock()
        self._idle = 0  # signs asked for while nothing was assigned
        self._paused = False
        self._owned: set[TopicPartition] = set()
        self._lost: set[TopicPartition] = set()
        self._position: dict[TopicPartition, int] = {}
        self._uncommitted: dict[TopicPartition, int] = {}

    @classmethod
    def connect(
        cls,
        config: KafkaConfig,
        max_bytes: int,
        max_records: int,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Reach a broker and ask to join the group; partitions come with the first polls.

        Args:
            config: servers, topic, group and credentials.
            max_bytes: bytes of the largest frame that is accepted. Larger ones still arrive, one
                at a time, to be rejected.
            max_records: records that one poll returns at most.
            now: seconds since the epoch, for records without a timestamp.
            clock: monotonic seconds.

        Raises:
            BrokerUnavailable: no broker answered in time.
            InvalidConfig: the broker refused the credentials, or a certificate cannot be read.
        """
        arguments = settings(config)
        partition_bytes = max_bytes + _RECORD_OVERHEAD_BYTES
        session_ms = int(config.session_timeout_s * 1000)
        try:
            consumer = KafkaConsumer(
                **arguments,
                group_id=config.group_id,
                auto_offset_reset=config.auto_offset_reset,
                enable_auto_commit=False,
                session_timeout_ms=session_ms,
                heartbeat_interval_ms=min(3000, session_ms // 3),
                max_poll_interval_ms=int(config.max_poll_interval_s * 1000),
                max_poll_records=max_records,
                max_partition_fetch_bytes=partition_bytes,
                fetch_max_bytes=max(2 * partition_bytes, _FETCH_MIN_LIMIT_BYTES),
                metadata_max_age_ms=_METADATA_MAX_AGE_MS,
            )
        except KafkaError as error:
            raise explain(error, config) from error
        source = cls(consumer, config, now, clock)
        source._join()
        return source

    def _join(self) -> None:
        self._consumer.subscribe([self._config.frames_topic], listener=_Rebalances(self))

    def poll(self, timeout_s: float) -> list[Record]:
        """Records of all assigned partitions; see `Source.poll`.

        Raises:
            BrokerUnavailable: no broker answers; the same call may succeed later.
            InvalidConfig: the broker denies access to the topic or the group.
        """
        # Commits come first: a failure after the fetch would lose the records it returned.
        self._commit_what_is_due()
        try:
            polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000))
            if polled:
                self._heard_at = self._clock()
            elif not self._paused and self._clock() - self._heard_at > _QUIET_S:
                self._ask_for_a_sign()
        except KafkaError as error:
            raise explain(error, self._config) from error
        for partition, batch in polled.items():
            self._position[partition] = batch[-1].offset + 1
        return [self._record(record) for batch in polled.values() for record in batch]

    def lost(self) -> frozenset[Partition]:
        """Partitions that went since the last call; see `Source.lost`."""
        lost, self._lost = self._lost, set()
        if not self._paused:
            self._consumer.resume(*(lost & self._owned))
        return frozenset(Partition(*partition) for partition in lost)

    def pause(self) -> None:
        """Stop fetching; polls still keep the membership."""
        self._paused = True
        self._consumer.pause(*self._owned)

    def resume(self) -> None:
        """Fetch again."""
        self._paused = False
        self._heard_at = self._clock()
        self._consumer.resume(*(self._owned - self._lost))

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Commit the offsets of partitions that are still owned; see `Source.commit`.

        While the group rebalances this returns at once, and a later poll commits for what stayed.

        Raises:
            BrokerUnavailable: nothing was committed; the same call may succeed later.
            InvalidConfig: the broker denies access to the topic or the group.
        """
        due = {TopicPartition(*partition): offset for partition, offset in offsets.items()}
        # The broker would take offsets of any partition, also of one that is another's by now.
        self._uncommitted.update(
            {
                partition: offset
                for partition, offset in due.items()
                if partition in self._owned - self._lost
            }
        )
        self._commit_what_is_due()

    def lag(self) -> dict[Partition, int]:
        """Records not yet polled, for the partitions that delivered something."""
        lag = {}
        for partition, position in self._position.items():
            end = self._consumer.highwater(partition)
            lag[Partition(*partition)] = max(0, (end or position) - position)
        return lag

    @property
    def ready(self) -> bool:
        """Whether partitions are assigned to this member."""
        return bool(self._owned)

    def close(self) -> None:
        """Leave the group, so that the others need not wait for the session to end."""
        try:
            self._consumer.close(autocommit=False, timeout_ms=_REQUEST_TIMEOUT_MS)
        except KafkaError as error:
            _log.warning("could not leave the group %s: %s", self._config.group_id, error)

    def gain(self, assigned: Iterable[TopicPartition]) -> None:
        """Take note of a completed rebalance. Called by the client, within a poll."""
        self.lose(self._owned.difference(assigned))
        self._owned = set(assigned)
        self._consumer.pause(*(self._owned if self._paused else self._owned & self._lost))
        _log.info("assigned partitions: %s", sorted(p.partition for p in self._owned))

    def lose(self, partitions: Iterable[TopicPartition]) -> None:
        """Take note of partitions that are gone. Called by the client, within a poll."""
        for partition in partitions:
            self._owned.discard(partition)
            self._lost.add(partition)
            self._position.pop(partition, None)
            self._uncommitted.pop(partition, None)

    def _commit_what_is_due(self) -> None:
        if not self._uncommitted:
            return
        offsets = {
            partition: OffsetAndMetadata(offset, "", -1)
            for partition, offset in self._uncommitted.items()
        }
        try:
            self._consumer.commit(offsets, timeout_ms=_REQUEST_TIMEOUT_MS)
        except _GROUP_MOVED_ON as error:
            _log.info("commit put off, the group is rebalancing: %s", error)
        except KafkaError as error:
            raise explain(error, self._config) from error
        else:
            self._uncommitted.clear()

    def _ask_for_a_sign(self) -> None:
        if self._owned:
            self._consumer.end_offsets(list(self._owned), timeout_ms=_REQUEST_TIMEOUT_MS)
        else:
            _log.warning(
                "no partition assigned yet: does the topic %s exist, and has it more partitions "
                "than the group %s has members?",
                self._config.frames_topic,
                self._config.group_id,
            )
            # A group whose leader had not heard of a young topic assigns nothing, and the client
            # does not always notice (seen with kafka-python 3.0). Joining anew mends it. The others
            # must rebalance, and a spare member may take a busy one's place, so each member does it
            # ever more rarely, however often it was assigned something since.
            self._idle += 1
            if self._idle > 1 and self._idle.bit_count() == 1:
                self._consumer.unsubscribe()
                self.lose(set(self._owned))
                self._join()
        self._heard_at = self._clock()

    def _record(self, record: Any) -> Record:
        return Record(
            id=FrameId(record.topic, record.partition, record.offset),
            key=record.key,
            value=record.value,
            headers=tuple(record.headers),
            timestamp=record.timestamp / 1000 if record.timestamp >= 0 else self._now(),
        )


class _Rebalances(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python is untyped
    """Tells the source what the group decided. Runs while the polling thread waits."""

    def __init__(self, source: KafkaSource) -> None:
        self._source = source

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Nothing yet: most of them come back with the assignment that follows."""

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """The rebalance is complete."""
        self._source.gain(assigned)

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        """The group went on without this member, which starts afresh."""
        self._source.lose(lost)
