"""A sink over two Kafka topics: verdicts, keyed by camera, and dead letters."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError

from agent.config import KafkaConfig
from agent.connection import explain, settings
from agent.errors import PublishFailed
from agent.sinks import cloudevents
from agent.sinks.dead_letter import Letter
from agent.types import Rejected, Verdict

_log = logging.getLogger(__name__)

#: The broker's own limit shall decide, so the client's stands far above it.
_MAX_REQUEST_BYTES = 100 * 1024 * 1024
_REQUEST_TIMEOUT_MS = 30_000

#: Beyond the delivery timeout, in which the client settles every record one way or the other.
_FLUSH_MARGIN_S = 5.0

_HEADERS = (("content-type", cloudevents.CONTENT_TYPE.encode()),)


class KafkaSink:
    """Publishes through one producer for each topic, acknowledged by all in-sync replicas.

    That of the verdicts is idempotent, so a retry within the client repeats nothing. That of the
    dead letters is not: kafka-python's idempotent producer refuses every later record once the
    broker found one too large, and a dead letter may be.
    """

    def __init__(self, verdicts: Outbox, letters: Outbox, now: Callable[[], float]) -> None:
        self._verdicts = verdicts
        self._letters = letters
        self._now = now

    @classmethod
    def connect(cls, config: KafkaConfig, now: Callable[[], float] = time.time) -> Self:
        """Reach a broker.

        Args:
            config: servers, topics, delivery timeout and credentials.
            now: seconds since the epoch, stamped on dead letters.

        Raises:
            BrokerUnavailable: no broker answered in time.
            InvalidConfig: the broker refused the credentials, or a certificate cannot be read.
        """
        return cls(
            Outbox.connect(config, config.verdicts_topic, idempotent=True),
            Outbox.connect(config, config.dead_letter_topic, idempotent=False),
            now,
        )

    def send(self, verdicts: Sequence[Verdict], rejected: Sequence[Rejected]) -> None:
        """Queue a batch's outputs.

        Raises:
            PublishFailed: an output could not be queued, for instance because its topic is
                neither there nor created on demand.
        """
        for verdict in verdicts:
            event = Letter(verdict.camera.encode(), cloudevents.encode(verdict), _HEADERS)
            self._verdicts.publish(event)
        for one in rejected:
            self._letters.publish(Letter.of(one, self._now()))

    def flush(self) -> None:
        """Wait until everything sent since the last flush is acknowledged.

        A dead letter larger than its topic allows is sent again without its value: it would
        otherwise stop the stream for good.

        Raises:
            PublishFailed: something was not acknowledged; the batch must be sent again.
        """
        # Both are settled before either is judged: nothing may linger into the next batch.
        unpublished, undelivered = self._verdicts.settle(), self._letters.settle()
        too_large = [f for f in undelivered if isinstance(f.error, MessageSizeTooLargeError)]
        _check([*unpublished, *(f for f in undelivered if f not in too_large)])
        for failure in too_large:
            _log.warning("%s takes no record of this size: value omitted", failure.topic)
            self._letters.publish(failure.letter.without_value())
        _check(self._letters.settle())

    def close(self) -> None:
        """End the producers; what was not flushed was never promised."""
        self._verdicts.close()
        self._letters.close()


class Failure(NamedTuple):
    """A record that was not acknowledged."""

    topic: str
    letter: Letter
    error: Exception


class Outbox:
    """One topic's producer, and what was handed to it since it was last settled."""

    def __init__(self, producer: KafkaProducer, topic: str, flush_timeout_s: float) -> None:
        self._producer = producer
        self._topic = topic
        self._flush_timeout_s = flush_timeout_s
        self._sent: list[tuple[Letter, Any]] = []

    @classmethod
    def connect(cls, config: KafkaConfig, topic: str, *, idempotent: bool) -> Self:
        """Reach a broker; see `KafkaSink.connect`."""
        producer = connect_producer(
            config, idempotent=idempotent, max_block_s=config.delivery_timeout_s
        )
        return cls(producer, topic, config.delivery_timeout_s + _FLUSH_MARGIN_S)

    def publish(self, letter: Letter) -> None:
        """Hand over a record.

        Raises:
            PublishFailed: the topic is not there, or no broker answers.
        """
        try:
            future = self._producer.send(
                self._topic, key=letter.key, value=letter.value, headers=list(letter.headers)
            )
        except KafkaError as error:
            raise _failed(Failure(self._topic, letter, error)) from error
        self._sent.append((letter, future))

    def settle(self) -> list[Failure]:
        """Wait for every record's fate; those that failed, in order."""
        sent, self._sent = self._sent, []
        try:
            self._producer.flush(self._flush_timeout_s)
        except KafkaError as error:
            return [Failure(self._topic, letter, error) for letter, _ in sent]
        return [
            Failure(self._topic, letter, future.exception)
            for letter, future in sent
            if future.failed()
        ]

    def close(self) -> None:
        """End the producer within seconds."""
        try:
            self._producer.close(timeout=_FLUSH_MARGIN_S)
        except KafkaError as error:
            _log.warning("the producer for %s did not end in time: %s", self._topic, error)


def connect_producer(config: KafkaConfig, *, idempotent: bool, max_block_s: float) -> KafkaProducer:
    """Reach a broker; see `KafkaSink.connect`. `send` waits for `max_block_s` at most."""
    arguments = settings(config)
    delivery_ms = int(config.delivery_timeout_s * 1000)
    try:
        return KafkaProducer(
            **arguments,
            acks="all",
            enable_idempotence=idempotent,
            max_in_flight_requests_per_connection=1,  # a retry must not overtake
            delivery_timeout_ms=delivery_ms,
            request_timeout_ms=min(delivery_ms, _REQUEST_TIMEOUT_MS),
            max_block_ms=int(max_block_s * 1000),
            max_request_size=_MAX_REQUEST_BYTES,
        )
    except KafkaError as error:
        raise explain(error, config) from error


def _check(failures: Sequence[Failure]) -> None:
    if failures:
        raise _failed(failures[0], len(failures)) from failures[0].error


def _failed(failure: Failure, count: int = 1) -> PublishFailed:
    what = f"{type(failure.error).__name__}: {failure.error}"
    return PublishFailed(f"{count} records for {failure.topic} were not acknowledged: {what}")
