"""Drift as pictures: scores over time about an onset, and scores against severity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agent.bench.drift_streams import STEPS
from agent.bench.drift_trials import Line
from agent.bench.picture import DPI

#: Scores are shown as multiples of the threshold, down to this one.
_LEAST = 0.03
_TICKS = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


def write_timeline(lines: Mapping[str, Mapping[str, Line]], path: Path) -> None:
    """Draw each detector's score over time as a PNG, a panel for each condition.

    `lines` are by condition and detector. A score above the dashed line is drift.
    """
    rows = -(-len(lines) // 2)
    figure = Figure(figsize=(10.0, 3.2 * rows + 0.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (condition, of_detector) in zip(panels, lines.items(), strict=False):
        for detector, line in of_detector.items():
            frames, ratios = zip(*line, strict=True)
            axes.plot(frames, np.maximum(ratios, _LEAST), label=detector, linewidth=1.4)
        axes.axhline(1, color="black", linestyle="--", linewidth=0.8)
        axes.axvline(0, color="#888888", linewidth=0.8)
        _logarithmic(axes)
        axes.set_title(condition, loc="left", size=10)
    for axes in panels[len(lines) :]:
        axes.set_visible(False)
    figure.supxlabel("frames after the onset", size=10)
    figure.supylabel("score / threshold", size=10)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=9)
    figure.savefig(path, format="png")


def write_severity(steps: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw scores against severity as a PNG, a panel for each detector, a line for each corruption.

    `steps` are by corruption and detector, one value for each of `STEPS`.
    """
    detectors = list(next(iter(steps.values())))
    figure = Figure(figsize=(12.0, 6.4), dpi=DPI, layout="constrained")
    rows = -(-len(detectors) // 3)
    panels = figure.subplots(rows, 3, sharex=True, squeeze=False).flatten()
    place = np.arange(len(STEPS))
    for axes, detector in zip(panels, detectors, strict=False):
        table = np.array([of_detector[detector] for of_detector in steps.values()])
        for line in np.maximum(table, _LEAST):
            axes.plot(place, line, color="#88aacc", linewidth=0.8)
        middle = np.median(np.maximum(table, _LEAST), axis=0)
        axes.plot(place, middle, color="#114477", linewidth=2.4, label="median corruption")
        axes.axhline(1, color="black", linestyle="--", linewidth=0.8)
        _logarithmic(axes)
        axes.set_title(detector, loc="left", size=10)
        axes.set_xticks(place, [str(step) for step in STEPS])
    for axes in panels[len(detectors) :]:
        axes.set_visible(False)
    figure.supxlabel("severity, waxing and waning", size=10)
    figure.supylabel("score / threshold", size=10)
    panels[0].legend(fontsize=8, loc="upper left")
    figure.savefig(path, format="png")


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in _TICKS if low <= tick <= high])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
