"""Finds, made up for tests."""

import numpy as np

from agent.finds.find import Find, Outcome
from agent.types import FrameId, Scored, Verdict

D = 8
DAY_S = 86_400.0


def verdict(offset=0, camera="cam", margin=1.0, subject=None, captured_at=1_748_779_200.25):
    return Verdict(
        frame=FrameId("frames", 0, offset),
        subject=subject,
        camera=camera,
        captured_at=captured_at,
        top=(Scored("dog", 0.5), Scored("cat", 0.25)),
        frozen=Scored("dog", 0.5),
        frozen_encoder="source",
        confidence=0.5,
        energy=-1.0,
        novelty=margin - 2.0,
        threshold=-2.0,
        ood=True,
        domain=3,
        shift=0.0,
        strategy="frozen",
        version=0,
        model="tiny",
        age_s=0.0,
        stage_s={},
    )


def embedding(thing):
    """A unit vector: whole numbers are different things, fractions are on the way between."""
    whole = int(thing)
    vector = np.zeros(D, np.float32)
    vector[whole % D] = 1 - (thing - whole)
    vector[(whole + 1) % D] += thing - whole
    return vector / np.linalg.norm(vector)


def find(offset=0, thing=0, margin=1.0, **verdict_parts):
    """A frame that shows `thing`; None is a frame without a feature."""
    pixels = np.random.default_rng(offset).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    vector = np.zeros(D, np.float32) if thing is None else embedding(thing)
    return Find(verdict(offset, margin=margin, **verdict_parts), pixels, vector, margin)


class MemoryStore:
    """Keeps finds in a list, or refuses them."""

    def __init__(self, past=()):
        self.kept, self.past, self.refuses, self.closed = [], past, False, False
        self._outcomes = []

    def put(self, find):
        if not self.refuses:
            self.kept.append(find)
        self._outcomes.append((find, Outcome.FAILED if self.refuses else Outcome.KEPT))

    def outcomes(self):
        outcomes, self._outcomes = self._outcomes, []
        return iter(outcomes)

    def tend(self):
        pass

    def remembered(self):
        return iter(self.past)

    @property
    def held_bytes(self):
        return 7 * len(self.kept)

    def close(self):
        self.closed = True
