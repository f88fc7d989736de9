"""Unknown frames in a Kafka topic, keyed by camera: CloudEvents that hold the picture."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self

from kafka import KafkaProducer
from kafka.errors import KafkaError

from agent.config import KafkaConfig
from agent.finds.entry import event, thumbnail
from agent.finds.find import Find, Outcome, Remembered, Trouble
from agent.sinks.cloudevents import CONTENT_TYPE
from agent.sinks.kafka import connect_producer

#: Events on their way at a time; while there are as many, others fail.
MAX_IN_FLIGHT = 64
#: The longest that handing one over may hold up the stream, as when no broker knows the topic.
_MAX_BLOCK_S = 0.1
_CLOSE_S = 5.0
_HEADERS = [("content-type", CONTENT_TYPE.encode())]

_log = logging.getLogger(__name__)


class TopicStore:
    """Sends each find once and waits for nothing. What the broker keeps is the topic's affair."""

    def __init__(self, producer: KafkaProducer, topic: str) -> None:
        self._producer = producer
        self._topic = topic
        self._trouble = Trouble(f"topic {topic}")
        self._in_flight: list[tuple[Find, Any]] = []
        self._refused: list[Find] = []

    @classmethod
    def connect(cls, config: KafkaConfig, topic: str) -> Self:
        """Reach a broker; see `KafkaSink.connect`."""
        producer = connect_producer(config, idempotent=False, max_block_s=_MAX_BLOCK_S)
        with suppress(KafkaError):  # asks about the topic, so that the first find need not wait
            producer.partitions_for(topic)
        return cls(producer, topic)

    def put(self, find: Find) -> None:
        """Send a find, unless too many are on their way."""
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            self._trouble.failed(BufferError(f"{MAX_IN_FLIGHT} of them wait for the broker"))
            self._refused.append(find)
            return
        try:
            future = self._producer.send(
                self._topic,
                key=find.verdict.camera.encode(errors="replace"),
                value=event(find, thumbnail(find)),
                headers=_HEADERS,
            )
        except KafkaError as error:
            self._trouble.failed(error)
            self._refused.append(find)
        else:
            self._in_flight.append((find, future))

    def outcomes(self) -> Iterator[tuple[Find, Outcome]]:
        """What was acknowledged, or given up, since this was last asked."""
        refused, self._refused = self._refused, []
        yield from ((find, Outcome.FAILED) for find in refused)
        sent, self._in_flight = self._in_flight, []
        for find, future in sent:
            if not future.is_done:
                self._in_flight.append((find, future))
            elif future.failed():
                self._trouble.failed(future.exception)
                yield find, Outcome.FAILED
            else:
                self._trouble.worked()
                yield find, Outcome.KEPT

    def tend(self) -> None:
        """Nothing: retention is the topic's own."""

    def remembered(self) -> Iterator[Remembered]:
        """Nothing: the topic is not read back, so a restart may send a thing once more."""
        return iter(())

    @property
    def held_bytes(self) -> int:
        """None: what the broker holds is not known."""
        return 0

    def close(self) -> None:
        """Give what is on its way a few seconds."""
        try:
            self._producer.flush(_CLOSE_S)
            self._producer.close(timeout=_CLOSE_S)
        except KafkaError as error:
            _log.warning("the producer for %s did not end in time: %s", self._topic, error)
