"""A sink that keeps everything, for tests and demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

from agent.types import Rejected, Verdict


class MemorySink:
    """Keeps what was sent; `verdicts` and `rejected` hold only what was flushed."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []
        self.rejected: list[Rejected] = []
        self._sent: list[Verdict | Rejected] = []

    def send(self, verdicts: Sequence[Verdict], rejected: Sequence[Rejected]) -> None:
        """Take a batch's outputs."""
        self._sent += [*verdicts, *rejected]

    def flush(self) -> None:
        """Move what was sent to where it can be seen."""
        self.verdicts += [output for output in self._sent if isinstance(output, Verdict)]
        self.rejected += [output for output in self._sent if isinstance(output, Rejected)]
        self._sent.clear()

    def close(self) -> None:
        """Nothing to release."""
