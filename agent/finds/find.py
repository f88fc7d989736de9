"""An unknown frame, and the places that may keep it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from agent.types import Frame, Verdict

_log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """What became of an unknown frame."""

    KEPT = "kept"
    DUPLICATE = "duplicate"
    RATE_LIMITED = "rate_limited"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, eq=False)
class Find:
    """An unknown frame, without the bytes it came in.

    Attributes:
        verdict: what the agent said of it.
        pixels: uint8 of shape (H, W, 3), RGB, at the model's size.
        embedding_D: its unit feature; zero where the model gave none that is finite.
        margin: how far its novelty lies above the threshold.
    """

    verdict: Verdict
    pixels: NDArray[np.uint8]
    embedding_D: NDArray[np.float32]
    margin: float

    @classmethod
    def of(cls, frame: Frame, verdict: Verdict, embedding_D: NDArray[np.float32]) -> Self:
        """The find that a flagged frame is.

        A frame without a feature has no novelty that means anything: it comes after all others.
        """
        margin = verdict.novelty - verdict.threshold
        means_something = bool(embedding_D.any()) and math.isfinite(margin)
        return cls(verdict, frame.pixels, embedding_D, margin if means_something else 0.0)


class Remembered(NamedTuple):
    """What is known of a frame that an earlier run kept."""

    embedding_D: NDArray[np.float32]
    kept_at: float


class Store(Protocol):
    """Keeps finds as well as it can. No trouble of its own may reach the stream."""

    def put(self, find: Find) -> None:
        """Take a find; `outcomes` says later whether it was kept. Never raises, never waits."""

    def outcomes(self) -> Iterator[tuple[Find, Outcome]]:
        """What became of finds since this was last asked."""

    def tend(self) -> None:
        """Let go of what is too old; called every few seconds."""

    def remembered(self) -> Iterator[Remembered]:
        """What earlier runs kept, as far as that is known, the oldest first."""

    @property
    def held_bytes(self) -> int:
        """Bytes that the store takes up."""

    def close(self) -> None:
        """Bring to an end what is under way, within seconds."""


class Trouble:
    """Tells of a run of failures once, and of its end."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._failing = False

    def failed(self, error: Exception) -> None:
        """Something did not work."""
        if not self._failing:
            _log.warning("unknown frames cannot be kept in %s: %s", self._place, error)
        self._failing = True

    def worked(self) -> None:
        """Something did."""
        if self._failing:
            _log.info("unknown frames are kept in %s again", self._place)
        self._failing = False
