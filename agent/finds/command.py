"""The command `review`: a folder of kept frames in, a contact sheet out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from agent.errors import AgentError
from agent.finds.review import grouped, read, since
from agent.finds.sheet import Sheet, render


def write_sheet(
    folder: Path, out: Path, cameras: Sequence[str], start: str | None, similarity: float
) -> int:
    """Write the page `out` on the frames kept in `folder`; how many there are.

    Args:
        folder: what `novelty.directory` names.
        out: the HTML file.
        cameras: ids of those to show; empty shows all.
        start: the earliest moment of capture, as `since` reads it.
        similarity: cosine from which frames form a group.

    Raises:
        AgentError: there is nothing to show, or the page cannot be written.
    """
    moment = None if start is None else _moment(start)
    with Progress(console=Console(stderr=True), transient=True) as progress:

        def stage(name: str) -> Progressed:
            return Progressed(progress, name)

        frames, skipped = read(folder, cameras, moment, stage("reading"))
        sheet = Sheet(grouped(frames, similarity, stage("grouping")), str(folder), skipped)
        try:
            with out.open("w", encoding="utf-8", errors="replace") as file:
                file.writelines(render(sheet, stage("writing")))
        except OSError as error:
            raise AgentError(f"{out} cannot be written: {error.strerror}") from error
    return len(frames)


class Progressed:
    """One bar of a progress display, called with what is done and the total."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Show so much as done."""
        self._progress.update(self._task, completed=done, total=total)


def _moment(text: str) -> datetime:
    try:
        return since(text, datetime.now(UTC))
    except (ValueError, OverflowError):
        raise AgentError(
            f"--since {text}: expected hours (24h), days (7d) or a date (2026-11-23T09:00)"
        ) from None
