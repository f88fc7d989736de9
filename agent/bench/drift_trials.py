"""What is asked of drift metrics: told soon, seldom told falsely, the stronger the higher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from agent.bench.drift_streams import STEPS, Take
from agent.bench.drift_watch import Watch, told
from agent.bench.pool import CLEAR
from agent.drift.reading import DETECTORS, Scope
from agent.drift.statistics import DISTANCES

#: Of each detector, frame after the onset and score over threshold.
Line = list[tuple[int, float]]


def delays(watch: Watch, takes: Sequence[Take]) -> dict[str, float]:
    """Frames from the onset to each detector's first event; infinite where there is none.

    An event before the onset is false and does not count; the detector may have to wait until its
    score has fallen.
    """
    late = 0
    before: dict[str, int] = {}
    found = dict.fromkeys(DETECTORS[Scope.CAMERA], math.inf)
    for take in takes:
        watch.show(take)
        present = told(watch.metrics, Scope.CAMERA)
        if take.condition == CLEAR:
            before = {name: each.events for name, each in present.items()}
            continue
        late += len(take.photos)
        for name, each in present.items():
            if each.events > before[name]:
                found[name] = min(found[name], late)
    return found


def alarms(
    watch: Watch, takes: Sequence[Take], progress: Callable[[], None] = lambda: None
) -> dict[Scope, dict[str, int]]:
    """Events of each detector in a stream without drift."""
    for take in takes:
        watch.show(take)
        progress()
    return {
        scope: {name: each.events for name, each in told(watch.metrics, scope).items()}
        for scope in Scope
    }


def timeline(watch: Watch, takes: Sequence[Take]) -> dict[str, Line]:
    """Each distance over its threshold, by frame after the onset."""
    frames = -sum(len(take.photos) for take in takes if take.condition == CLEAR)
    lines: dict[str, Line] = {name: [] for name in DISTANCES}
    for take in takes:
        watch.show(take)
        frames += len(take.photos)
        present = told(watch.metrics, Scope.CAMERA)
        for name, line in lines.items():
            line.append((frames, present[name].score / present[name].threshold))
    return lines


def severities(watch: Watch, takes: Sequence[Take], step: int) -> dict[str, list[float]]:
    """Each distance over its threshold, averaged over the last third of each step of `gradual`.

    By then the window has left the step before.
    """
    frames = 0
    scores: dict[str, list[list[float]]] = {name: [[] for _ in STEPS] for name in DISTANCES}
    for take in takes:
        watch.show(take)
        place, within = divmod(frames, step)
        frames += len(take.photos)
        if within + len(take.photos) <= 2 * step // 3:
            continue
        present = told(watch.metrics, Scope.CAMERA)
        for name, of_step in scores.items():
            of_step[place].append(present[name].score / present[name].threshold)
    return {name: [float(np.mean(each)) for each in of_step] for name, of_step in scores.items()}


def spearman(scores: Sequence[float], severity: Sequence[float]) -> float:
    """Spearman's rank correlation, where ties share their mean rank; 0 where all are tied."""
    first_N, second_N = _ranks(scores), _ranks(severity)
    if not first_N.std() or not second_N.std():
        return 0.0
    return float(np.corrcoef(first_N, second_N)[0, 1])


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.array(values, dtype=np.float64)
    below = (array[:, None] > array).sum(axis=1)
    tied = (array[:, None] == array).sum(axis=1)
    ranks: NDArray[np.float64] = below + (tied + 1) / 2
    return ranks
