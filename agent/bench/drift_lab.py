"""The trials of the drift metrics, on one pool of photographs and one calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from agent import encode
from agent.adapt.strategy import ZeroShot
from agent.assemble import recognizer
from agent.bench.corruptions import IMAGENET_C
from agent.bench.drift_streams import gradual, onset, takes
from agent.bench.drift_trials import Line, alarms, delays, severities, timeline
from agent.bench.drift_watch import AgentWatch, Encoded, FrozenWatch, Watch
from agent.bench.pool import CLEAR, Condition, Pool
from agent.calibration import Calibration
from agent.config import Config, ModelConfig
from agent.drift.monitor import DriftMonitor, DriftPolicy
from agent.drift.reading import Scope
from agent.metrics import Metrics

#: Severities whose onset is timed.
ONSETS = (3, 5)
#: Clear frames before an onset, and frames after it.
CLEAR_FRAMES, FRAMES = 128, 224
#: Frames of each step of a corruption that waxes and wanes.
STEP = 96
#: Onsets that are drawn, at the lesser severity.
DRAWN = ("fog", "jpeg_compression", "brightness", "elastic_transform")
#: Trials of one strategy, without repeats.
TRIALS = (len(ONSETS) + 1) * len(IMAGENET_C)


@dataclass(slots=True)
class Outcome:
    """What came out under one strategy. Scores are multiples of their thresholds.

    Attributes:
        delays: of each condition and detector, frames to the event after each onset.
        severity: of each corruption and detector, the mean score of each of `STEPS`.
    """

    strategy: str
    delays: dict[Condition, dict[str, list[float]]] = field(default_factory=dict)
    severity: dict[str, dict[str, list[float]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lab:
    """What all trials share."""

    pool: Pool
    model: ModelConfig
    labels: ZeroShot
    normal: Calibration
    encoded: Encoded
    seed: int

    def stationary(self, frames: int, progress: Callable[[], None]) -> dict[Scope, dict[str, int]]:
        """Events in so many clear frames; `progress` is called after each batch."""
        return alarms(self.frozen(), takes(self.pool, CLEAR, frames, self._rng()), progress)

    def frozen(self) -> FrozenWatch:
        """The strategy that does nothing, on frames encoded before."""
        generator = torch.Generator().manual_seed(self.seed)
        monitor = DriftMonitor(DriftPolicy(), self.normal.drift, self.labels.text_KD, generator)
        return FrozenWatch(self.encoded, monitor)

    def agent(self, strategy: str) -> AgentWatch:
        """The agent as it runs."""
        adapt = {"strategy": strategy, "seed": self.seed}
        config = Config.model_validate({"adapt": adapt, "model": self.model})
        metrics = Metrics(config.http.max_cameras)
        built = recognizer(config, encode.load(self.model), self.labels, self.normal, metrics)
        return AgentWatch(self.pool, built, metrics)

    def _rng(self, repeat: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, repeat])

    def outcome(
        self, strategy: str, watch: Callable[[], Watch], repeats: int, progress: Callable[[], None]
    ) -> Outcome:
        """Every onset so many times, and every corruption waxing and waning once.

        `watch` makes a new one for each trial; `progress` is called after each of `TRIALS`.
        """
        found = Outcome(strategy)
        for condition in [Condition(name, step) for step in ONSETS for name in IMAGENET_C]:
            trials = [
                delays(
                    watch(), onset(self.pool, condition, CLEAR_FRAMES, FRAMES, self._rng(repeat))
                )
                for repeat in range(repeats)
            ]
            found.delays[condition] = {
                name: [trial[name] for trial in trials] for name in trials[0]
            }
            progress()
        for name in IMAGENET_C:
            steps = gradual(self.pool, name, STEP, self._rng())
            found.severity[name] = severities(watch(), steps, STEP)
            progress()
        return found

    def timelines(self) -> dict[str, dict[str, Line]]:
        """Scores about some onsets, by condition and detector."""
        shown = [Condition(name, ONSETS[0]) for name in DRAWN]
        return {
            str(condition): timeline(
                self.frozen(), onset(self.pool, condition, CLEAR_FRAMES, FRAMES, self._rng())
            )
            for condition in shown
        }
