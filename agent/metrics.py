"""Every metric the agent exports: instrument → registry → text.

Names begin with `tta_`, units are base units, counters end in `_total`, ratios run from 0 to 1.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)
from prometheus_client.process_collector import ProcessCollector

from agent import __version__
from agent.errors import InvalidFrame

#: The label value of cameras beyond the first `max_cameras`.
OTHER = "other"

#: Values of `outcome` and `reason`; their series exist from the start, so that rates see the first.
FRAME_OUTCOMES = ("verdict", "dead_letter")
COMMIT_OUTCOMES = ("committed", "failed")
DEAD_LETTER_REASONS = tuple(kind.reason for kind in InvalidFrame.__subclasses__())
UPDATE_OUTCOMES = ("stepped", "aligned", "declined", "nonfinite")
RESET_REASONS = ("collapse", "disagreement", "distance", "evicted")
RELOAD_OUTCOMES = ("applied", "refused")
NOVELTY_OUTCOMES = ("kept", "duplicate", "rate_limited", "failed")

_AGE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_STAGE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# CLIP's logits are a hundred cosines, so energies of known frames lie near -30 to -15.
_ENERGY = tuple(range(-60, -40, 5)) + tuple(range(-40, -9)) + (-5, 0)
_NOVELTY = (-4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20)
_CONFIDENCE = tuple(step / 10 for step in range(1, 11))
_ENTROPY = (0.01, 0.025, 0.05, *(step / 10 for step in range(1, 11)))

_UNITS = frozenset({"seconds", "frames", "records", "logits", "ratio", "deviations", "bytes"})


class Described(NamedTuple):
    """One line of the metrics reference."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    unit: str


class Metrics:
    """The agent's instruments, on a registry of their own.

    Values of the labels `camera` and `site` come from `camera_label` and `site_label`, so that
    their number is bounded.
    """

    def __init__(self, max_cameras: int) -> None:
        """Register every instrument; the first `max_cameras` cameras get series of their own.

        So do as many sites.
        """
        self.registry = CollectorRegistry()
        self.described: list[Described] = []
        self._max_cameras = max_cameras
        self._cameras: set[str] = set()
        self._sites: set[str] = set()
        # They would double the number of series, and nobody reads them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._stream()
        self._scores()
        self._adaptation()
        self._novelty()
        self._operation()

    def camera_label(self, camera: str) -> str:
        """`camera` for the first `max_cameras` that are seen, "other" for the rest.

        One thread may call this.
        """
        return self._bounded(camera, self._cameras)

    def site_label(self, site: str) -> str:
        """`site` for as many sites as cameras may have series, "other" for the rest.

        One thread may call this.
        """
        return self._bounded(site, self._sites)

    def _bounded(self, name: str, known: set[str]) -> str:
        if name not in known:
            if len(known) >= self._max_cameras:
                return OTHER
            known.add(name)
        return name

    def _stream(self) -> None:
        self.frames = self._counter("frames", "Frames dealt with.", "camera", "outcome")
        self.frame_age = self._histogram(
            "frame_age_seconds", "Seconds from the capture of a frame to its verdict.", _AGE_S
        )
        self.stage = self._histogram(
            "stage_seconds", "Seconds a batch spent in a stage.", _STAGE_S, "stage"
        )
        self.batch_size = self._histogram("batch_size_frames", "Frames in a batch.", _BATCH)
        self.queue_depth = self._gauge("queue_depth_frames", "Frames that wait for a batch.")
        self.pauses = self._counter("pauses", "Times the source was paused by a full queue.")
        self.lag = self._gauge(
            "consumer_lag_records", "Records not yet polled, over all assigned partitions."
        )
        self.commits = self._counter("commits", "Commits of offsets.", "outcome")
        self.dead_letters = self._counter(
            "dead_letters", "Records written to the dead-letter topic.", "reason"
        )
        _start_at_zero(self.commits, COMMIT_OUTCOMES)
        _start_at_zero(self.dead_letters, DEAD_LETTER_REASONS)

    def _scores(self) -> None:
        self.energy = self._histogram(
            "energy_logits",
            "Energy of frames under the frozen prompt; higher is stranger.",
            _ENERGY,
            "domain",
        )
        self.entropy = self._histogram(
            "entropy_ratio",
            "Entropy of adapted predictions, as a share of the highest there can be.",
            _ENTROPY,
            "domain",
        )
        self.ood_flagged = self._counter("ood_flagged", "Frames flagged as unknown.", "camera")
        self.novelty = self._histogram(
            "novelty_deviations",
            "Novelty of frames, in median absolute deviations above the median of normal frames.",
            _NOVELTY,
            "domain",
        )
        self.novelty_threshold = self._gauge(
            "novelty_threshold_deviations",
            "Novelty above which a frame counts as unknown.",
            "domain",
        )
        self.confidence = self._histogram(
            "confidence_ratio",
            "Calibrated probability that a frame's first label is right, if any label is.",
            _CONFIDENCE,
            "domain",
        )
        self.expected_accuracy = self._gauge(
            "expected_accuracy_ratio",
            "Mean confidence of recent known frames: the accuracy to expect, found without labels.",
            "domain",
        )
        self.drift_score = self._gauge(
            "drift_score",
            "Distance of a camera's recent frames from normal ones, or evidence of a change.",
            "camera",
            "detector",
        )
        self.drift_threshold = self._gauge(
            "drift_threshold",
            "Score above which a detector reports drift of a camera; of ADWIN a guide only.",
            "detector",
        )
        self.drift_events = self._counter(
            "drift_events",
            "Times a detector began to report drift of a camera, or found a change.",
            "camera",
            "detector",
        )
        self.site_drift_score = self._gauge(
            "site_drift_score",
            "Distance of recent frames of a site's cameras, taken together, from normal ones.",
            "site",
            "detector",
        )
        self.site_drift_threshold = self._gauge(
            "site_drift_threshold",
            "Score above which a detector reports drift of a site.",
            "detector",
        )
        self.site_drift_events = self._counter(
            "site_drift_events",
            "Times a detector began to report drift of a site.",
            "site",
            "detector",
        )
        self.domain_active = self._gauge(
            "domain_active", "Id of the domain a camera is in; 0 is the source domain.", "camera"
        )
        self.domain_switches = self._counter(
            "domain_switches", "Times a camera changed its domain.", "camera"
        )
        self.domain_splits = self._counter(
            "domain_splits",
            "Times a camera was given a new domain because the correction of its own did not fit.",
            "camera",
        )

    def _adaptation(self) -> None:
        self.adapter_updates = self._counter(
            "adapter_updates", "Steps of the adapter that were taken or skipped.", "outcome"
        )
        self.adapter_resets = self._counter(
            "adapter_resets", "Times the guard took a domain back to its source.", "reason"
        )
        self.adapter_distance = self._gauge(
            "adapter_distance",
            "Distance of a domain's prompt from the source, relative to the source's norm.",
            "domain",
        )
        self.adapter_agreement = self._gauge(
            "adapter_agreement_ratio",
            "Share of recent frames on which adapted and frozen labels agree.",
            "domain",
        )
        self.adapter_budget_used = self._gauge(
            "adapter_budget_used_ratio",
            "Adaptation time as a share of inference time, since the start.",
        )
        _start_at_zero(self.adapter_updates, UPDATE_OUTCOMES)
        _start_at_zero(self.adapter_resets, RESET_REASONS)

    def _novelty(self) -> None:
        self.novelty_frames = self._counter(
            "novelty_frames",
            "Unknown frames that were kept for people to look at, or why not.",
            "outcome",
        )
        self.novelty_held = self._gauge(
            "novelty_held_bytes", "Bytes of the kept frames in the folder."
        )
        _start_at_zero(self.novelty_frames, NOVELTY_OUTCOMES)

    def _operation(self) -> None:
        self.config_info = self._info(
            "config", "The configuration in force.", "fingerprint", "strategy", "model"
        )
        self.config_reloads = self._counter(
            "config_reloads", "Times the configuration was read again.", "outcome"
        )
        self.config_last_success = self._gauge(
            "config_last_success_timestamp_seconds",
            "When a configuration was last accepted, since the epoch.",
        )
        self.build_info = self._info("build", "The agent that runs.", "version", "python")
        _start_at_zero(self.config_reloads, RELOAD_OUTCOMES)
        self.build_info.info({"version": __version__, "python": platform.python_version()})
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        self._describe(f"{name}_total", "counter", labels, meaning)
        return Counter(f"tta_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        self._describe(name, "gauge", labels, meaning)
        return Gauge(f"tta_{name}", meaning, labels, registry=self.registry)

    def _histogram(
        self, name: str, meaning: str, buckets: Sequence[float], *labels: str
    ) -> Histogram:
        self._describe(name, "histogram", labels, meaning)
        return Histogram(f"tta_{name}", meaning, labels, buckets=buckets, registry=self.registry)

    def _info(self, name: str, meaning: str, *labels: str) -> Info:
        self._describe(f"{name}_info", "info", labels, meaning)
        return Info(f"tta_{name}", meaning, registry=self.registry)

    def _describe(self, name: str, kind: str, labels: tuple[str, ...], meaning: str) -> None:
        unit = name.rsplit("_", 1)[-1]
        described_unit = unit if unit in _UNITS else ""
        self.described.append(Described(f"tta_{name}", kind, labels, meaning, described_unit))


def _start_at_zero(counter: Counter, values: Iterable[str]) -> None:
    for value in values:
        counter.labels(value)


def reference() -> str:
    """Every metric, as a Markdown page."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{name}`' for name in metric.labels)} "
        f"| {metric.meaning} | {metric.unit} |"
        for metric in Metrics(max_cameras=1).described
    ]
    return "\n".join(
        [
            "# Metrics",
            "",
            "Made by `tta-agent metrics`. Cameras beyond the first `http.max_cameras` share "
            f'`camera="{OTHER}"`, and likewise sites;',
            "gauges of that series hold the last value that any of them reported.",
            "The conventional `process_*` metrics (memory, CPU, open files) are exported too.",
            "",
            "| Name | Type | Labels | Meaning | Unit |",
            "|-|-|-|-|-|",
            *rows,
            "",
        ]
    )
