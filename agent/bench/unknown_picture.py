"""Pictures of what `bench-unknown` found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from agent.bench.picture import DPI
from agent.bench.unknown import Separation, Told, reliability

_FIXED, _FOLLOWED = "#c0a080", "#2a6fb0"


def draw_scores(means: Mapping[tuple[str, str, str], Separation], path: Path) -> None:
    """AUROC of each score (rows) under each condition (columns), one kind of unknown a plot."""
    kinds = list(dict.fromkeys(kind for kind, _, _ in means))
    conditions = list(dict.fromkeys(condition for _, _, condition in means))
    scores = {kind: list(dict.fromkeys(s for k, s, _ in means if k == kind)) for kind in kinds}
    rows = sum(len(each) for each in scores.values())
    size = (3 + 0.55 * len(conditions), 1.4 + 0.9 * len(kinds) + 0.36 * rows)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    plots = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    for axes, kind in zip(plots, kinds, strict=True):
        grid = np.array([[means[kind, s, c].auroc for c in conditions] for s in scores[kind]])
        axes.imshow(grid, cmap="viridis", vmin=0.5, vmax=1.0, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            colour = "black" if value > 0.8 else "white"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour)
        axes.set_yticks(range(len(grid)), scores[kind])
        axes.set_xticks(range(len(conditions)), conditions if kind == kinds[-1] else [])
        axes.tick_params(axis="x", rotation=60, length=0)
        axes.set_title(f"AUROC of {kind} unknowns, %", loc="left", size=11)
    figure.savefig(path, format="png")


def draw_alarms(
    fixed: Mapping[str, float], followed: Mapping[str, float], rate: float, path: Path
) -> None:
    """False alarms under each condition: the threshold of calibration, and the domain's own."""
    figure = Figure(figsize=(3 + 0.5 * len(fixed), 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(fixed))
    axes.bar(places - 0.2, [100 * v for v in fixed.values()], 0.4, color=_FIXED, label="fixed")
    axes.bar(
        places + 0.2, [100 * v for v in followed.values()], 0.4, color=_FOLLOWED, label="followed"
    )
    axes.axhline(100 * rate, color="#222222", linewidth=1, label="asked for")
    axes.axhline(200 * rate, color="#222222", linewidth=1, linestyle=":", label="twice that")
    axes.set_xticks(places, list(fixed), rotation=60, ha="right")
    axes.set_ylabel("known frames flagged, %")
    axes.set_title("False alarms with a fixed threshold and with each domain's own", loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def draw_reliability(told: Mapping[str, Told], path: Path) -> None:
    """How often answers are right, against how sure they were: softmax and confidence."""
    figure = Figure(figsize=(9, 4.6), dpi=DPI, layout="constrained")
    for axes, what in zip(
        figure.subplots(1, 2, sharey=True), ("softmax", "confidence"), strict=True
    ):
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1)
        for name, each in told.items():
            known = np.array(each.known)
            sure = np.array(getattr(each, what))[known]
            bins = list(reliability(sure, np.array(each.right)[known]))
            error = 100 * each.calibration_error(getattr(each, what))
            label = f"{name}, ECE {error:.1f} %"
            axes.plot([b[1] for b in bins], [b[2] for b in bins], marker="o", ms=3, label=label)
        axes.set_title(what, loc="left")
        axes.set_xlabel("probability said")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share that was right")
    figure.savefig(path, format="png")
