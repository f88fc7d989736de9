"""What becomes of a record that can never be a frame: kept as it was, with the reason beside it."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from agent.sinks.cloudevents import rfc3339
from agent.types import Rejected

Headers = tuple[tuple[str, bytes], ...]

#: Set to `omitted` on a letter whose value the topic would not take.
VALUE_HEADER = "tta.error.value"


class Letter(NamedTuple):
    """A rejected record with its original key, value and headers, and the error's headers."""

    key: bytes | None
    value: bytes | None
    headers: Headers

    @classmethod
    def of(cls, rejected: Rejected, now: float) -> Self:
        """The letter for a record rejected at `now`, in seconds since the epoch.

        Kafka's clients send neither a header without a value nor a record without key and value;
        an empty one stands in for each.
        """
        record = rejected.record
        value = b"" if record.key is None and record.value is None else record.value
        original = tuple((name, content or b"") for name, content in record.headers)
        return cls(record.key, value, original + _error_headers(rejected, now))

    def without_value(self) -> Self:
        """The same letter for a topic whose size limit the original exceeds."""
        return self._replace(value=b"", headers=(*self.headers, (VALUE_HEADER, b"omitted")))


def describe(rejected: Rejected, now: float) -> dict[str, Any]:
    """A rejected record in words, without its bytes, for people and line-based sinks."""
    frame, error = rejected.record.id, rejected.error
    return {
        "reason": error.reason,
        "message": str(error),
        "topic": frame.topic,
        "partition": frame.partition,
        "offset": frame.offset,
        **({} if rejected.record.subject is None else {"subject": rejected.record.subject}),
        "time": rfc3339(now),
    }


def _error_headers(rejected: Rejected, now: float) -> Headers:
    return tuple(
        (f"tta.error.{name}", str(content).encode())
        for name, content in describe(rejected, now).items()
    )
