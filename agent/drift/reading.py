"""What the monitor tells, and where it goes: metrics and the log."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from agent.drift.change import CHANGE_DETECTORS
from agent.drift.statistics import DISTANCES
from agent.metrics import Metrics

_log = logging.getLogger(__name__)


class Scope(StrEnum):
    """Whose frames are compared."""

    CAMERA = "camera"
    SITE = "site"


#: Names of the detectors of each scope.
DETECTORS: dict[Scope, tuple[str, ...]] = {
    Scope.CAMERA: (*DISTANCES, *CHANGE_DETECTORS),
    Scope.SITE: tuple(DISTANCES),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """One detector's latest value; `began` says that it reports drift since these frames.

    The score of a camera or site that is followed since this batch is not a number.
    """

    scope: Scope
    name: str
    detector: str
    score: float
    threshold: float
    began: bool


def publish(readings: Iterable[Reading], metrics: Metrics) -> None:
    """Set scores and thresholds, count and log what began."""
    for reading in readings:
        if reading.scope is Scope.CAMERA:
            name = metrics.camera_label(reading.name)
            score, threshold = metrics.drift_score, metrics.drift_threshold
            events = metrics.drift_events
        else:
            name = metrics.site_label(reading.name)
            score, threshold = metrics.site_drift_score, metrics.site_drift_threshold
            events = metrics.site_drift_events
        score.labels(name, reading.detector).set(reading.score)
        threshold.labels(reading.detector).set(reading.threshold)
        # Also where it is none: the series must exist for its first event to be seen.
        events.labels(name, reading.detector).inc(reading.began)
        if reading.began:
            _log.info(
                "%s drifts: %s is %.4g, above %.4g",
                reading.scope,
                reading.detector,
                reading.score,
                reading.threshold,
                extra={str(reading.scope): reading.name},
            )
