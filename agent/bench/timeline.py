"""The stream as one picture: accuracy, novelty and domain over time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from agent.bench.scoreboard import WINDOW, Outcome
from agent.errors import AgentError

SIZE_IN = (12.0, 8.0)
DPI = 150

# Okabe and Ito's palette, which colour-blind readers can tell apart.
ORANGE, SKY, GREEN, BLUE, VERMILION = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
INK, FAINT, BAND = "#222222", "#888888", "#F1F3F5"

STYLE_SIZE = {"label": 11, "tick": 9.5, "phase": 10.5, "title": 15}


def write_timeline(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Draw the outcomes, in the order in which they were sent, as a PNG.

    Raises:
        AgentError: there is nothing to draw.
    """
    if not outcomes:
        raise AgentError("no verdict came back, so there is no timeline to draw")
    figure = Figure(figsize=SIZE_IN, dpi=DPI, layout="constrained")
    accuracy, novelty, domain = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2.4, 1.6)}
    )
    _draw_accuracy(accuracy, outcomes)
    _draw_novelty(novelty, outcomes)
    _draw_domain(domain, outcomes)
    for axes in (accuracy, novelty, domain):
        _draw_bands(axes, outcomes)
        _tidy(axes)
    _name_bands(accuracy, outcomes)
    domain.set_xlabel("frame", fontsize=STYLE_SIZE["label"])
    domain.set_xlim(outcomes[0].index, outcomes[-1].index + 1)
    figure.suptitle(
        title, x=0.01, ha="left", fontsize=STYLE_SIZE["title"], fontweight="bold", color=INK
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def rolling(hits: Sequence[bool], window: int) -> NDArray[np.float64]:
    """The mean of the last `window` hits after each, of fewer at the start."""
    sums = np.concatenate(([0], np.cumsum(np.asarray(hits, dtype=float))))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_accuracy(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    known = [o for o in outcomes if o.known]
    # A short stream's phases would blur in a long window.
    window = min(WINDOW, max(10, len(outcomes) // 20))
    # The mean of the first few frames would only jump.
    first = min(9, len(known) // 2)
    x = [o.index for o in known][first:]
    frozen = rolling([o.frozen_right for o in known], window)[first:]
    adapted = rolling([o.adapted_right for o in known], window)[first:]
    axes.fill_between(x, frozen, adapted, where=adapted >= frozen, color=BLUE, alpha=0.12, lw=0)
    axes.fill_between(x, frozen, adapted, where=adapted < frozen, color=ORANGE, alpha=0.2, lw=0)
    axes.plot(x, frozen, color=ORANGE, lw=2, label="frozen")
    axes.plot(x, adapted, color=BLUE, lw=2, label="adapted")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel(f"top-1 accuracy\nlast {window} known frames", fontsize=STYLE_SIZE["label"])
    _legend(axes)


def _draw_novelty(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    for known, colour, marker, size, label in (
        (True, SKY, "o", 9, "known"),
        (False, VERMILION, "x", 22, "unknown"),
    ):
        shown = [o for o in outcomes if o.known == known]
        axes.scatter(
            [o.index for o in shown],
            [o.said.novelty for o in shown],
            s=size,
            c=colour,
            marker=marker,
            linewidths=1.1 if marker == "x" else 0,
            label=label,
        )
    # Marks instead of a line: cameras change domain one by one, and a line would zigzag.
    axes.scatter(
        [o.index for o in outcomes],
        [o.said.threshold for o in outcomes],
        s=16,
        c=INK,
        marker="_",
        linewidths=1.4,
        label="threshold",
    )
    axes.set_ylabel("novelty\nhigher is stranger", fontsize=STYLE_SIZE["label"])
    _legend(axes)


def _draw_domain(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    x = [o.index for o in outcomes]
    axes.fill_between(x, [o.said.shift for o in outcomes], color=GREEN, alpha=0.3, lw=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("shift from\nsource, sd", fontsize=STYLE_SIZE["label"], color=GREEN)
    domain = axes.twinx()
    domain.scatter(x, [o.said.domain for o in outcomes], s=9, c=INK, marker="s", linewidths=0)
    domain.set_ylabel("domain id", fontsize=STYLE_SIZE["label"], color=INK)
    domain.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    domain.margins(y=0.15)
    domain.tick_params(labelsize=STYLE_SIZE["tick"], length=0)
    domain.spines[:].set_visible(False)


def _phases(outcomes: Sequence[Outcome]) -> list[tuple[str, int, int]]:
    """Each phase with its first frame and the frame after its last."""
    spans = []
    for phase, group in groupby(outcomes, key=lambda o: o.phase):
        frames = list(group)
        spans.append((phase, frames[0].index, frames[-1].index + 1))
    return spans


def _draw_bands(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    for i, (_, start, end) in enumerate(_phases(outcomes)):
        if i % 2:
            axes.axvspan(start, end, color=BAND, zorder=-2, lw=0)
        if i:
            axes.axvline(start, color=FAINT, lw=0.8, ls=(0, (2, 3)), zorder=-1)


def _name_bands(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    for phase, start, end in _phases(outcomes):
        axes.annotate(
            phase,
            ((start + end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=STYLE_SIZE["phase"],
            fontweight="bold",
            color=INK,
        )


def _legend(axes: Axes) -> None:
    """Right of the panel, where no data can be."""
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.005, 0.5),
        frameon=False,
        markerscale=1.7,
        fontsize=STYLE_SIZE["label"],
    )


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=STYLE_SIZE["tick"], color=FAINT)
    axes.grid(axis="y", color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
