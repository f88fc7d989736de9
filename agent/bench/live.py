"""The demo as a person watches it: a live terminal view, and the table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from agent.bench.schedule import Phase
from agent.bench.scoreboard import Outcome, Score, Snapshot, by_phase, score

FROZEN_STYLE = "dark_orange"
ADAPTED_STYLE = "dodger_blue1"
# These fit a terminal of 80 columns.
BAR_WIDTH = 24
SPARKLINE_WIDTH = 30
#: Without a terminal, one line is printed as often as this.
PLAIN_EVERY_S = 3.0

_BLOCKS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Shows snapshots as they come; a context manager.

    On a terminal it is redrawn in place, elsewhere it is one plain line every few seconds.
    """

    def __init__(
        self,
        console: Console,
        schedule: Sequence[Phase],
        model: str,
        strategy: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._phases = [phase.name for phase in schedule]
        self._total = sum(phase.frames for phase in schedule)
        self._title = f"[bold]tta-agent demo[/]  model {model}, strategy {strategy}"
        self._clock = clock
        self._printed_at = -math.inf
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("frames,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("stream", total=self._total)
        self._live = Live(console=console, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
            self._live.update(self._framed(Text("waiting for the first verdict …")))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Draw the snapshot, or print its line when one is due."""
        if self._console.is_terminal:
            self._progress.update(self._task, completed=snapshot.scored)
            self._live.update(self._framed(self._body(snapshot)))
        elif self._clock() - self._printed_at >= PLAIN_EVERY_S:
            self._printed_at = self._clock()
            self._console.print(self._line(snapshot), highlight=False, soft_wrap=True)

    def _framed(self, body: RenderableType) -> Panel:
        return Panel(body, title=self._title, title_align="left", padding=(1, 2))

    def _body(self, snapshot: Snapshot) -> RenderableType:
        late = snapshot.late
        frozen, adapted = zip(*snapshot.history, strict=True)
        accuracy = Table.grid(padding=(0, 2))
        for name, share, past, style in (
            ("frozen", late.frozen, frozen, FROZEN_STYLE),
            ("adapted", late.adapted, adapted, ADAPTED_STYLE),
        ):
            accuracy.add_row(
                Text(name, style=f"bold {style}"),
                ProgressBar(
                    total=1,
                    completed=_or_zero(share),
                    width=BAR_WIDTH,
                    complete_style=style,
                    finished_style=style,
                ),
                Text(percent(share), style=f"bold {style}"),
                Text(sparkline(past, SPARKLINE_WIDTH), style=style),
            )
        facts = Table.grid(padding=(0, 3))
        facts.add_row("rate", f"[bold]{snapshot.frames_per_s:.1f}[/] frames/s")
        facts.add_row("age", f"p50 {_age(snapshot.age_p50_s)}   p99 {_age(snapshot.age_p99_s)}")
        facts.add_row("domain", f"[bold]{snapshot.domain}[/]   shift {snapshot.shift:.1f} sd")
        facts.add_row(
            "unknown",
            f"flagged [bold]{percent(late.flagged)}[/]   found {percent(late.recall)}"
            f"   false alarms {percent(late.false_alarms)}",
        )
        return Group(
            self._route(snapshot.phase),
            Text(),
            Text(f"top-1 accuracy over the last {late.frames} frames", style="dim"),
            accuracy,
            Text(),
            facts,
            Rule(style="dim"),
            self._progress,
        )

    def _route(self, current: str) -> Text:
        """The phases in order, the current one marked."""
        route = Text()
        for i, name in enumerate(self._phases):
            route.append(" → " if i else "", style="dim")
            route.append(f" {name} ", style="reverse bold" if name == current else "dim")
        return route

    def _line(self, snapshot: Snapshot) -> str:
        late = snapshot.late
        return (
            f"{snapshot.scored:>5}/{self._total} frames  {snapshot.phase:<15}  "
            f"frozen {percent(late.frozen):>5}  adapted {percent(late.adapted):>5}  "
            f"domain {snapshot.domain}  shift {snapshot.shift:5.1f}  "
            f"unknown {percent(late.flagged):>5}  {snapshot.frames_per_s:5.1f} frames/s  "
            f"age p99 {_age(snapshot.age_p99_s)}"
        )


def summary(outcomes: Sequence[Outcome]) -> Table:
    """The table of phases, with the totals below."""
    table = Table(
        title="What the agent made of each phase",
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("phase", no_wrap=True)
    for heading in ("frames", "frozen", "adapted", "gain", "flagged", "found", "false\nalarms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("domain")
    for phase in by_phase(outcomes):
        table.add_row(*_cells(phase))
    table.add_section()
    table.add_row(*_cells(score("all", outcomes)), style="bold")
    table.caption = (
        "frozen, adapted: top-1 accuracy on known things\n"
        "flagged: called unknown; found: share of the unknown that were\n"
        "domain: ids by falling frequency"
    )
    return table


def _cells(row: Score) -> list[str | Text]:
    gain = Text("-")
    if not math.isnan(row.gain):
        points = round(100 * row.gain, 1)
        gain = Text(f"{points:+.1f}", style="green" if points > 0 else "red" if points < 0 else "")
    return [
        row.name,
        str(row.frames),
        percent(row.frozen),
        percent(row.adapted),
        gain,
        percent(row.flagged),
        percent(row.recall),
        percent(row.false_alarms),
        ", ".join(map(str, row.domains)),
    ]


def sparkline(shares: Sequence[float], width: int) -> str:
    """The last of the shares, 0 to 1, as blocks: at most `width` of them, each a mean of equals."""
    shares = [share for share in shares if not math.isnan(share)]
    n = min(width, len(shares))
    cuts = [round(i * len(shares) / n) for i in range(n + 1)] if n else [0]
    means = [sum(shares[a:b]) / (b - a) for a, b in pairwise(cuts)]
    return "".join(_BLOCKS[min(int(mean * len(_BLOCKS)), len(_BLOCKS) - 1)] for mean in means)


def percent(share: float) -> str:
    """A share from 0 to 1 for a reader; a dash where there was nothing to count."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def _age(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _or_zero(share: float) -> float:
    return 0.0 if math.isnan(share) else share
