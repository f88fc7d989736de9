"""What the benchmark found: tables for people, JSON for machines, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from agent.bench.arena import Score

BASELINE = "frozen"
#: The rows below the phases.
SUMMARY = ("mean", "gain over frozen", "least gain", "ms a frame", "time, of frozen's")


def table(scores: Sequence[Score]) -> Table:
    """One suite: a row for each phase, a column for each competitor."""
    out = Table(title=f"{scores[0].suite}: top-1, %")
    head, *rows = _cells(scores)
    for heading in head:
        out.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        out.add_row(*row, style="bold" if row[0] in SUMMARY else "")
    return out


def markdown(scores: Sequence[Score]) -> str:
    """The same table for a document."""
    head, *rows = _cells(scores)
    return grid(head, rows)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def save(path: Path, scores: Sequence[Score], about: dict[str, Any]) -> None:
    """Every score, with what it was measured on."""
    content = {
        **about,
        "scores": [
            {
                "suite": score.suite,
                "competitor": score.competitor,
                "mean": score.mean,
                "accuracy": score.accuracy,
                "frames": score.frames,
                "seconds": score.seconds,
            }
            for score in scores
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _cells(scores: Sequence[Score]) -> list[list[str]]:
    """The table's text: headings, then rows."""
    baseline = _of(BASELINE, scores)
    summaries = [_summary(score, baseline) for score in scores]
    return [
        ["", *(score.competitor for score in scores)],
        *(
            [phase, *(_percent(score.accuracy.get(phase)) for score in scores)]
            for phase in scores[0].accuracy
        ),
        *(
            [name, *column]
            for name, column in zip(SUMMARY, zip(*summaries, strict=True), strict=True)
        ),
    ]


def _summary(score: Score, baseline: Score | None) -> list[str]:
    each_s = score.seconds / score.frames
    cells = [_percent(score.mean), "", "", f"{1000 * each_s:.1f}", ""]
    if baseline is not None:
        # A method that is shown a part of the frames may lack a phase of few.
        shared = score.accuracy.keys() & baseline.accuracy.keys()
        gains = [score.accuracy[phase] - baseline.accuracy[phase] for phase in shared]
        if gains:
            cells[1] = f"{100 * float(np.mean(gains)):+.1f}"
            cells[2] = f"{100 * min(gains):+.1f}"
        cells[4] = f"{each_s * baseline.frames / baseline.seconds:.2f}"
    return cells


def _of(name: str, scores: Sequence[Score]) -> Score | None:
    return next((score for score in scores if score.competitor == name), None)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
