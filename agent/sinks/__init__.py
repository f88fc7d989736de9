"""Where verdicts and dead letters go. What was sent is promised only after `flush`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agent.types import Rejected, Verdict


class Sink(Protocol):
    """Takes the two outputs of the agent."""

    def send(self, verdicts: Sequence[Verdict], rejected: Sequence[Rejected]) -> None:
        """Hand over a batch's outputs; may return before they are acknowledged.

        Raises:
            PublishFailed: an output could not even be queued.
        """

    def flush(self) -> None:
        """Wait until everything sent since the last flush is acknowledged.

        Raises:
            PublishFailed: something was not; the batch must be sent again.
        """

    def close(self) -> None:
        """Release the sink."""
