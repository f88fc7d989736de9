"""What Prometheus would see of a stream: of features encoded before, or of the agent as it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.adapt.style import style
from agent.bench.drift_streams import BATCH, Take
from agent.bench.pool import Condition, Pool
from agent.drift.monitor import DriftMonitor
from agent.drift.reading import Scope, publish
from agent.drift.seen import Seen
from agent.encode import Encoder
from agent.metrics import Metrics
from agent.recognize import Recognizer
from agent.score.ood import ablated_energy
from agent.types import Frame, FrameId, Record

CAMERA = "camera-0"


class Told(NamedTuple):
    """One detector in /metrics."""

    score: float
    threshold: float
    events: int


def told(metrics: Metrics, scope: Scope) -> dict[str, Told]:
    """What every detector of the camera, or of its site, tells at present."""
    prefix = "tta_drift" if scope is Scope.CAMERA else "tta_site_drift"
    names = [f"{prefix}_score", f"{prefix}_threshold", f"{prefix}_events_total"]
    found: dict[str, dict[str, float]] = {}
    for family in metrics.registry.restricted_registry(names).collect():
        for sample in family.samples:
            found.setdefault(sample.labels["detector"], {})[sample.name] = sample.value
    return {
        detector: Told(values[names[0]], values[names[1]], round(values[names[2]]))
        for detector, values in found.items()
    }


class Watch(Protocol):
    """Shows takes to what measures drift, which writes to `metrics`."""

    metrics: Metrics

    def show(self, take: Take) -> None:
        """Take in one batch."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Features (N, D) and styles (N, S) of all photographs under each condition."""

    features_ND: dict[Condition, Tensor]
    styles_NS: dict[Condition, Tensor]
    zero_shot: ZeroShot

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        pool: Pool,
        encoder: Encoder,
        zero_shot: ZeroShot,
        conditions: Iterable[Condition],
        progress: Callable[[], None] = lambda: None,
    ) -> Encoded:
        """Encode by the source model, once; `progress` is called after each condition."""
        features_ND, styles_NS = {}, {}
        for condition in conditions:
            pixels = pool.under(condition)
            encoded, styles = [], []
            for start in range(0, len(pixels), BATCH):
                batch_BCHW = encoder.to_device(list(pixels[start : start + BATCH]))
                encoded.append(encoder.encode_image(batch_BCHW).float())
                styles.append(style(batch_BCHW))
            features_ND[condition], styles_NS[condition] = torch.cat(encoded), torch.cat(styles)
            progress()
        return cls(features_ND, styles_NS, zero_shot)


class FrozenWatch:
    """The monitor alone, on what the strategy `frozen` would answer."""

    def __init__(self, encoded: Encoded, monitor: DriftMonitor) -> None:
        self.metrics = Metrics(max_cameras=1)
        self._encoded = encoded
        self._monitor = monitor

    @torch.no_grad()
    def show(self, take: Take) -> None:
        """Look up what these photographs were encoded to."""
        features_BD = self._encoded.features_ND[take.condition][take.photos]
        logits_BK = self._encoded.zero_shot.logits(features_BD)
        probabilities_BK = logits_BK.softmax(dim=-1)
        styles_BS = self._encoded.styles_NS[take.condition][take.photos]
        seen = Seen(
            features_BD, probabilities_BK, probabilities_BK, styles_BS, ablated_energy(logits_BK)
        )
        publish(self._monitor.observe([CAMERA] * len(take.photos), seen), self.metrics)


class AgentWatch:
    """The agent from decoded frames to metrics, learning as the pipeline lets it."""

    def __init__(self, pool: Pool, recognizer: Recognizer, metrics: Metrics) -> None:
        self.metrics = metrics
        self._pool = pool
        self._recognizer = recognizer
        self._frames = 0

    def show(self, take: Take) -> None:
        """Recognise a batch, then learn."""
        now = time.time()
        pixels = self._pool.under(take.condition)
        frames = [
            Frame(
                Record(FrameId("bench", 0, self._frames + row), None, None, (), now),
                CAMERA,
                now,
                pixels[photo],
            )
            for row, photo in enumerate(take.photos)
        ]
        self._frames += len(frames)
        self._recognizer.recognize(frames)
        self._recognizer.learn()

    def seconds(self) -> dict[str, float]:
        """Time spent in each stage so far."""
        registry = self.metrics.registry.restricted_registry(["tta_stage_seconds_sum"])
        return {
            sample.labels["stage"]: sample.value
            for family in registry.collect()
            for sample in family.samples
            if sample.name == "tta_stage_seconds_sum"
        }
