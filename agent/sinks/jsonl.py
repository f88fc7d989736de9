"""A sink of JSON lines: each verdict a CloudEvent, each rejected frame a `dead_letter`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TextIO

from agent.errors import PublishFailed
from agent.sinks.cloudevents import compact, to_event
from agent.sinks.dead_letter import describe
from agent.types import Rejected, Verdict


class JsonlSink:
    """Writes to a text stream. A reader that goes away ends the agent with BrokenPipeError."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.time) -> None:
        self._stream = stream
        self._now = now

    def send(self, verdicts: Sequence[Verdict], rejected: Sequence[Rejected]) -> None:
        """Write a batch's outputs, without the bytes of rejected images.

        Raises:
            PublishFailed: the stream takes no more, as when a disk is full.
        """
        lines = [compact(to_event(verdict)) for verdict in verdicts]
        lines += [
            compact({"type": "dead_letter", **describe(one, self._now())}) for one in rejected
        ]
        self._attempt(lambda: self._stream.writelines(f"{line}\n" for line in lines))

    def flush(self) -> None:
        """Hand the lines to the operating system.

        Raises:
            PublishFailed: the stream takes no more, as when a disk is full.
        """
        self._attempt(self._stream.flush)

    def close(self) -> None:
        """Leave the stream open: it belongs to whoever opened it."""

    @staticmethod
    def _attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise PublishFailed(f"the output stream refused a line: {error}") from error
