"""Streams that the drift metrics are measured on: clear photographs, then those of a condition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from agent.bench.pool import CLEAR, Condition, Pool

BATCH = 32
#: A corruption waxes through these severities and wanes again.
STEPS = (1, 2, 3, 4, 5, 4, 3, 2, 1)


class Take(NamedTuple):
    """Photographs of one camera that come together, under one condition."""

    condition: Condition
    photos: list[int]


def takes(pool: Pool, condition: Condition, frames: int, rng: np.random.Generator) -> list[Take]:
    """So many photographs that were not calibrated on, each as often as any other, shuffled."""
    dealt = _dealt(pool, rng)
    photos = [next(dealt) for _ in range(frames)]
    return [Take(condition, photos[at : at + BATCH]) for at in range(0, frames, BATCH)]


def onset(
    pool: Pool, condition: Condition, clear: int, frames: int, rng: np.random.Generator
) -> list[Take]:
    """`clear` frames, and then `frames` under the condition."""
    return takes(pool, CLEAR, clear, rng) + takes(pool, condition, frames, rng)


def gradual(pool: Pool, corruption: str, frames: int, rng: np.random.Generator) -> list[Take]:
    """A corruption that waxes from severity 1 to 5 and wanes again, `frames` a step."""
    steps = [takes(pool, Condition(corruption, step), frames, rng) for step in STEPS]
    return [take for step in steps for take in step]


def _dealt(pool: Pool, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(np.array(pool.stream)).tolist()
