"""What the agent said against what was true, frame by frame."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agent.bench.schedule import LabelledFrame
from agent.errors import AgentError
from agent.types import FrameId

#: Frames that "rolling" and "of late" mean.
WINDOW = 100
#: Verdicts of this many seconds make the rate shown.
RATE_SPAN_S = 5.0


@dataclass(frozen=True, slots=True)
class Said:
    """The part of a verdict that is scored; fields as in `agent.types.Verdict`."""

    frame: FrameId
    adapted: str
    frozen: str
    novelty: float
    threshold: float
    ood: bool
    domain: int
    shift: float
    age_s: float


def said_in(verdict: Mapping[str, Any]) -> Said:
    """Read the `data` of a verdict event; a null, which stands for no finite number, becomes NaN.

    Raises:
        AgentError: it is not shaped like one.
    """
    try:
        frame = verdict["frame"]
        return Said(
            frame=FrameId(frame["topic"], frame["partition"], frame["offset"]),
            adapted=verdict["top"][0]["label"],
            frozen=verdict["frozen"]["label"],
            novelty=_number(verdict["novelty"]),
            threshold=_number(verdict["threshold"]),
            ood=verdict["ood"],
            domain=verdict["domain"],
            shift=_number(verdict["shift"]),
            age_s=_number(verdict["age_s"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise AgentError(f"not a verdict ({error!r}): {verdict!r}") from error


@dataclass(frozen=True, slots=True)
class Outcome:
    """A frame's truth beside its verdict."""

    index: int
    phase: str
    label: str
    known: bool
    said: Said

    @property
    def adapted_right(self) -> bool:
        """Whether the adapted model's first label is the truth."""
        return self.said.adapted == self.label

    @property
    def frozen_right(self) -> bool:
        """Whether the frozen model's label is the truth."""
        return self.said.frozen == self.label


@dataclass(frozen=True, slots=True)
class Score:
    """Rates from 0 to 1 over some frames; NaN where there was nothing to count.

    Attributes:
        frozen, adapted: top-1 accuracy on the frames whose label the model was told, flagged or
            not.
        flagged: share of all frames called unknown.
        recall: share of the unknown frames that were.
        false_alarms: share of the known frames that were.
        domains: domain ids by falling frequency.
    """

    name: str
    frames: int
    frozen: float
    adapted: float
    flagged: float
    recall: float
    false_alarms: float
    domains: tuple[int, ...]

    @property
    def gain(self) -> float:
        """Adapted less frozen accuracy."""
        return self.adapted - self.frozen


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the stream at one moment.

    Attributes:
        late: score over the last `WINDOW` frames.
        phase: the phase of the newest frame.
        domain, shift: as the newest verdict has them.
        frames_per_s: verdicts a second over the last few seconds.
        age_p50_s, age_p99_s: quantiles of seconds from capture to verdict, of late.
        history: (frozen, adapted) rolling accuracy after each frame so far.
    """

    scored: int
    late: Score
    phase: str
    domain: int
    shift: float
    frames_per_s: float
    age_p50_s: float
    age_p99_s: float
    history: tuple[tuple[float, float], ...]


class Scoreboard:
    """Joins truths and verdicts by frame id, in whichever order they come.

    A repeated verdict counts once. Truths may come from another thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._truths: dict[FrameId, LabelledFrame] = {}
        self._waiting: dict[FrameId, Said] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._late: deque[Outcome] = deque(maxlen=WINDOW)
        self._times: deque[float] = deque()
        self._history: list[tuple[float, float]] = []

    def sent(self, frame_id: FrameId, frame: LabelledFrame) -> None:
        """Note the truth about the frame that stands at `frame_id`."""
        with self._lock:
            # The picture has gone out; a long stream of them would fill the memory.
            self._truths[frame_id] = replace(frame, jpeg=b"")
            said = self._waiting.pop(frame_id, None)
            if said is not None:
                self._score(frame, said)

    def heard(self, said: Said) -> None:
        """Note a verdict."""
        with self._lock:
            frame = self._truths.get(said.frame)
            if frame is None:
                self._waiting[said.frame] = said
            elif frame.index not in self._outcomes:
                self._score(frame, said)

    @property
    def scored(self) -> int:
        """How many frames have both a truth and a verdict."""
        return len(self._outcomes)

    def outcomes(self) -> list[Outcome]:
        """Everything scored so far, in the order in which it was sent."""
        with self._lock:
            return [self._outcomes[index] for index in sorted(self._outcomes)]

    def now(self) -> Snapshot | None:
        """The state at this moment; None before the first verdict."""
        with self._lock:
            if not self._late:
                return None
            newest = self._late[-1]
            ages = [outcome.said.age_s for outcome in self._late]
            return Snapshot(
                scored=len(self._outcomes),
                late=score("of late", self._late),
                phase=newest.phase,
                domain=newest.said.domain,
                shift=newest.said.shift,
                frames_per_s=self._rate(),
                age_p50_s=float(np.quantile(ages, 0.5)),
                age_p99_s=float(np.quantile(ages, 0.99)),
                history=tuple(self._history),
            )

    def _score(self, frame: LabelledFrame, said: Said) -> None:
        outcome = Outcome(frame.index, frame.phase, frame.label, frame.known, said)
        self._outcomes[frame.index] = outcome
        self._late.append(outcome)
        self._times.append(self._clock())
        late = score("", self._late)
        self._history.append((late.frozen, late.adapted))

    def _rate(self) -> float:
        now = self._clock()
        while self._times and self._times[0] < now - RATE_SPAN_S:
            self._times.popleft()
        span = now - self._times[0] if self._times else 0.0
        return len(self._times) / span if span > 0 else 0.0


def score(name: str, outcomes: Iterable[Outcome]) -> Score:
    """Count the outcomes."""
    every = list(outcomes)
    known = [o for o in every if o.known]
    return Score(
        name=name,
        frames=len(every),
        frozen=_share(o.frozen_right for o in known),
        adapted=_share(o.adapted_right for o in known),
        flagged=_share(o.said.ood for o in every),
        recall=_share(o.said.ood for o in every if not o.known),
        false_alarms=_share(o.said.ood for o in known),
        domains=tuple(domain for domain, _ in Counter(o.said.domain for o in every).most_common()),
    )


def by_phase(outcomes: Sequence[Outcome]) -> list[Score]:
    """A score for each phase, in the order in which they were sent."""
    phases = dict.fromkeys(o.phase for o in outcomes)
    return [score(phase, [o for o in outcomes if o.phase == phase]) for phase in phases]


def _share(hits: Iterable[bool]) -> float:
    counted = list(hits)
    return sum(counted) / len(counted) if counted else float("nan")


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
