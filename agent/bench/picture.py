"""One suite as a picture: how much each competitor gains over doing nothing, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from agent.bench.arena import Score

DPI = 120
#: Points at which the colour is full; more is written, not shown.
FULL = 30.0


def write_picture(scores: Sequence[Score], baseline: str, path: Path) -> None:
    """Draw the competitors' gains over `baseline` as a PNG: blue is better, red is worse.

    The best competitor is on top; the last column is the mean over the phases.
    """
    base = next(score for score in scores if score.competitor == baseline)
    rest = [score for score in scores if score is not base]
    if not rest:
        return
    phases = [p for p in base.accuracy if all(p in score.accuracy for score in rest)]
    gains = {
        score.competitor: [100 * (score.accuracy[p] - base.accuracy[p]) for p in phases]
        for score in rest
    }
    names = sorted(gains, key=lambda name: -float(np.mean(gains[name])))
    table = np.array([[*gains[name], float(np.mean(gains[name]))] for name in names])
    size = (3.0 + 0.62 * table.shape[1], 2.2 + 0.4 * table.shape[0])
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(table, cmap="RdBu", vmin=-FULL, vmax=FULL, aspect="auto")
    for (row, column), gain in np.ndenumerate(table):
        colour = "white" if abs(gain) > 0.6 * FULL else "#222222"
        weight = "bold" if column == len(phases) else "normal"
        text = f"{gain:+.0f}" if column < len(phases) else f"{gain:+.1f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, weight=weight, size=9)
    heads = [f"{phase}\n{100 * base.accuracy[phase]:.0f}" for phase in phases]
    mean = 100 * float(np.mean([base.accuracy[phase] for phase in phases]))
    axes.set_xticks(range(table.shape[1]), [*heads, f"mean\n{mean:.1f}"], rotation=60, size=9)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(len(phases) - 0.5, color="white", linewidth=3)
    axes.tick_params(length=0)
    axes.set_title(
        f"{base.suite}: points of top-1 gained over {baseline}, whose own are below each phase",
        loc="left",
        size=11,
    )
    figure.savefig(path, format="png")
