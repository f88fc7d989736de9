"""The values that flow through the agent, in the order in which a frame becomes them.

    Record → Frame → Batch → Verdict
           ↘ Rejected

Shape suffixes used throughout: B frames, C channels, H/W pixels, D embedding, K labels,
L tokens, M context vectors, S style.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agent.errors import InvalidFrame

#: A subject is carried into verdicts and logs, so it must stay small.
MAX_SUBJECT_BYTES = 1024


class Partition(NamedTuple):
    """One ordered log of records."""

    topic: str
    number: int


class FrameId(NamedTuple):
    """Where a frame stands in its log. Repeats of a frame carry the same id."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"

    @property
    def log(self) -> Partition:
        """The log that the frame stands in."""
        return Partition(self.topic, self.partition)


@dataclass(frozen=True, slots=True)
class Record:
    """What a source delivers: bytes, not yet looked at.

    `timestamp` is in seconds since the epoch, as the source stamped it.
    """

    id: FrameId
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    timestamp: float

    @property
    def subject(self) -> str | None:
        """What the frame is called at its origin, such as a file's name: header `ce_subject`."""
        for name, value in self.headers:
            if value and name.lower() == "ce_subject":
                return value[:MAX_SUBJECT_BYTES].decode(errors="replace")
        return None


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded frame, already at the model's size.

    `pixels` is uint8 of shape (H, W, 3), RGB. `captured_at` is in seconds since the epoch.
    """

    record: Record
    camera: str
    captured_at: float
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that can never become a frame, and why."""

    record: Record
    error: InvalidFrame


class Scored(NamedTuple):
    """A label with the probability the model gives it, 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the agent says of one frame.

    Attributes:
        subject: what the frame is called at its origin, if the record says so.
        top: labels by falling probability, by the adapted model; by the source model where the
            adapted one turned out to be another domain's.
        frozen: the label of the zero-shot prompt, which no adaptation ever touches.
        frozen_encoder: the encoder `frozen` was computed with: "source" (the model as it was
            loaded) or "aligned" (with the domain's statistics; one matrix product, not a second
            encoding).
        confidence: calibrated probability that the first of `top` is right, if any label is.
        energy: energy score in logit units; higher is stranger.
        novelty: the score by which frames are told unknown; higher is stranger.
        threshold: the novelty above which a frame counts as unknown in this domain.
        domain: id of the recognised domain; 0 is the source domain.
        shift: distance of the camera's recent style from the source domain's, in its standard
            deviations.
        version: how many times the domain's adapter had been published when it spoke.
        age_s: seconds from capture to verdict.
        stage_s: seconds each stage took for the frame's batch.
    """

    frame: FrameId
    subject: str | None
    camera: str
    captured_at: float
    top: tuple[Scored, ...]
    frozen: Scored
    frozen_encoder: str
    confidence: float
    energy: float
    novelty: float
    threshold: float
    ood: bool
    domain: int
    shift: float
    strategy: str
    version: int
    model: str
    age_s: float
    stage_s: dict[str, float]
