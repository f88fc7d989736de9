"""Runs a competitor over a suite: accuracy by phase and time by frame."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from agent.bench.competitors import Competitor
from agent.bench.pool import Pool
from agent.bench.suites import Suite


@dataclass(slots=True)
class Score:
    """What a competitor did on a suite.

    Attributes:
        right: of each phase, for each known frame in order, whether its top label was true.
        seconds: time spent answering and learning, without reading the frames.
        frames: frames answered.
    """

    suite: str
    competitor: str
    right: dict[str, list[bool]] = field(default_factory=dict)
    seconds: float = 0.0
    frames: int = 0

    @property
    def accuracy(self) -> dict[str, float]:
        """Top-1 of each phase, 0 to 1."""
        return {phase: float(np.mean(right)) for phase, right in self.right.items() if right}

    @property
    def mean(self) -> float:
        """Top-1, averaged over the phases."""
        return float(np.mean(list(self.accuracy.values())))


def play(
    suite: Suite,
    pool: Pool,
    name: str,
    competitor: Competitor,
    *,
    every: int = 1,
    progress: Callable[[int], None] = lambda frames: None,
) -> Score:
    """Show the suite to the competitor.

    `every` shows every n-th frame only; that is honest for methods that keep nothing from one batch
    to the next, and only for those. `progress` is told how many frames each batch had.
    """
    score = Score(suite.name, name)
    shots = suite.shots[::every]
    for start in range(0, len(shots), suite.batch):
        batch = shots[start : start + suite.batch]
        pixels = np.stack([pool.under(shot.condition)[shot.photo] for shot in batch])
        began = time.perf_counter()
        answers = competitor.answer([shot.camera for shot in batch], pixels)
        score.seconds += time.perf_counter() - began
        score.frames += len(batch)
        for shot, answer in zip(batch, answers, strict=True):
            truth = pool.labels[shot.photo]
            if truth not in suite.held_out:
                score.right.setdefault(shot.phase, []).append(answer == truth)
        progress(len(batch))
    return score
