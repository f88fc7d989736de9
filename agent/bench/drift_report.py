"""What the drift metrics did, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from agent.bench.drift_lab import Outcome
from agent.bench.drift_streams import STEPS
from agent.bench.drift_trials import spearman
from agent.bench.report import grid
from agent.drift.reading import DETECTORS, Scope
from agent.drift.statistics import DISTANCES


def alarms(found: Mapping[Scope, Mapping[str, int]], frames: int) -> str:
    """Events in a stream without drift."""
    rows = [
        [name, *(str(found[scope].get(name, "")) for scope in Scope)]
        for name in DETECTORS[Scope.CAMERA]
    ]
    rows.append(["all", *(str(sum(found[scope].values())) for scope in Scope)])
    title = f"False alarms in {frames:,} stationary clear frames"
    return _section(title, ["detector", *(str(scope) for scope in Scope)], rows)


def outcome(found: Outcome) -> str:
    """Frames from each onset to the first event, and how scores follow severity."""
    detectors = DETECTORS[Scope.CAMERA]
    rows = []
    for condition, delays in found.delays.items():
        repeats = zip(*(delays[name] for name in detectors), strict=True)
        soonest = [min(each) for each in repeats]
        rows.append(
            [str(condition), *(_frames(delays[name]) for name in detectors), _frames(soonest)]
        )
    late = _section(
        f"{found.strategy}: frames from the onset to the event, the latest of the repeats",
        ["condition", *detectors, "any"],
        rows,
    )
    monotony = {
        name: [spearman(steps[name], STEPS) for steps in found.severity.values()]
        for name in DISTANCES
    }
    return (
        late
        + "\n"
        + _section(
            f"{found.strategy}: rank correlation of score and severity, waxing and waning",
            ["corruption", *DISTANCES],
            [
                *(
                    [corruption, *(f"{monotony[name][row]:.2f}" for name in DISTANCES)]
                    for row, corruption in enumerate(found.severity)
                ),
                ["mean", *(f"{np.mean(monotony[name]):.2f}" for name in DISTANCES)],
                [
                    "of the median corruption's score",
                    *(f"{_of_median(found, name):.2f}" for name in DISTANCES),
                ],
            ],
        )
    )


def cost(seconds: Sequence[Mapping[str, float]]) -> str:
    """Time spent on drift, as a share of all time spent on answers."""
    drift = sum(each["drift"] for each in seconds)
    answers = sum(sum(each.values()) for each in seconds) - drift
    return f"## Cost\n\nDrift took {drift / answers:.2%} of the time that answering took.\n"


def _of_median(found: Outcome, detector: str) -> float:
    table = np.array([steps[detector] for steps in found.severity.values()])
    middle: list[float] = np.median(table, axis=0).tolist()
    return spearman(middle, STEPS)


def _frames(delays: Sequence[float]) -> str:
    latest = max(delays)
    return f"{latest:.0f}" if math.isfinite(latest) else "–"


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"## {title}\n\n{grid(head, rows)}"
