"""How far a camera's recent frames are from normal ones, in embedding and in predicted labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from cachetools import LRUCache
from torch import Tensor

#: Frames that define normal when nothing was calibrated.
WARM_UP = 256
#: Windows drawn from the reference to learn how far a normal one strays.
NULL_WINDOWS = 64
#: Cameras followed at a time; the one silent for longest makes room.
MAX_CAMERAS = 10_000


@dataclass(frozen=True, slots=True)
class Summary:
    """First and second moments of unit features, (D,) each, and mean probabilities (K,)."""

    mean_D: Tensor
    square_D: Tensor
    labels_K: Tensor

    @classmethod
    def of(cls, features_ND: Tensor, probabilities_NK: Tensor) -> Summary:
        """Summarise frames: unit features (N, D) and probabilities of the frozen prompt (N, K)."""
        return cls(features_ND.mean(0), features_ND.square().mean(0), probabilities_NK.mean(0))

    def moved(self, frame: Summary, share: float) -> Summary:
        """An exponential step towards `frame`."""
        return Summary(
            torch.lerp(self.mean_D, frame.mean_D, share),
            torch.lerp(self.square_D, frame.square_D, share),
            torch.lerp(self.labels_K, frame.labels_K, share),
        )

    @property
    def deviation_D(self) -> Tensor:
        """Standard deviation per dimension."""
        variance_D: Tensor = (self.square_D - self.mean_D.square()).clamp_min(0)
        return variance_D.sqrt()


def frechet(a: Summary, b: Summary) -> float:
    """Fréchet distance between Gaussians with diagonal covariance.

    |μ₁ − μ₂|² + Σ (σ₁ − σ₂)², Dowson & Landau 1982; the diagonal keeps it meaningful for windows
    with fewer frames than dimensions.
    """
    mean = (a.mean_D - b.mean_D).square().sum()
    spread = (a.deviation_D - b.deviation_D).square().sum()
    return float(mean + spread)


def jensen_shannon(p_K: Tensor, q_K: Tensor) -> float:
    """Jensen–Shannon divergence of two distributions (K,), in bits, 0 to 1. Lin 1991."""
    middle = (p_K + q_K) / 2

    def divergence(p: Tensor) -> Tensor:
        terms: Tensor = torch.special.xlogy(p, p / middle.clamp_min(1e-12))
        return terms.sum()

    value = (divergence(p_K) + divergence(q_K)) / (2 * torch.log(torch.tensor(2.0)))
    return float(value.clamp(0, 1))


@dataclass(frozen=True, slots=True)
class DriftReference:
    """Normal frames: unit features (N, D) and probabilities of the frozen prompt (N, K)."""

    features_ND: Tensor
    probabilities_NK: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """One detector's latest value; `crossed` says that it has just risen above its threshold."""

    detector: str
    score: float
    threshold: float
    crossed: bool


@dataclass(slots=True)
class _Camera:
    summary: Summary
    frames: int = 1
    above: dict[str, bool] = field(default_factory=dict)


class DriftMonitor:
    """A fading window of recent frames per camera, compared with the reference now and then.

    The window is exponential: a weight of 2 / (window + 1) on the newest frame averages over as
    many effective frames, in memory that does not grow with it.
    """

    DETECTORS: ClassVar[tuple[str, ...]] = ("frechet", "labels")

    def __init__(self, window: int, reference: DriftReference | None, seed: int = 0) -> None:
        """`window` is in frames; without a reference the first `WARM_UP` frames are normal."""
        self._window = window
        self._seed = seed
        self._warm_up: list[tuple[Tensor, Tensor]] = []
        self._cameras: LRUCache[str, _Camera] = LRUCache(MAX_CAMERAS)
        self._reference: Summary | None = None
        self.thresholds: dict[str, float] = {}
        if reference is not None:
            self._adopt(reference)

    def observe(
        self, cameras: Sequence[str], features_BD: Tensor, probabilities_BK: Tensor
    ) -> list[tuple[str, Reading]]:
        """Take in a batch; returns the readings that fell due, by camera."""
        readings: list[tuple[str, Reading]] = []
        rows = zip(cameras, features_BD.cpu(), probabilities_BK.cpu(), strict=True)
        for name, feature_D, probability_K in rows:
            if self._reference is None:
                self._warm_up.append((feature_D, probability_K))
                if len(self._warm_up) >= WARM_UP:
                    features, probabilities = zip(*self._warm_up, strict=True)
                    self._adopt(DriftReference(torch.stack(features), torch.stack(probabilities)))
                    self._warm_up.clear()
                continue
            frame = Summary(feature_D, feature_D.square(), probability_K)
            camera = self._cameras.get(name)
            if camera is None:
                self._cameras[name] = _Camera(frame)
                continue
            camera.frames += 1
            share = max(1 / camera.frames, 2 / (self._window + 1))
            camera.summary = camera.summary.moved(frame, share)
            if camera.frames >= self._window and camera.frames % (self._window // 4) == 0:
                readings += [(name, reading) for reading in self._read(camera, self._reference)]
        return readings

    def _read(self, camera: _Camera, reference: Summary) -> list[Reading]:
        readings = []
        for detector, score in _scores(camera.summary, reference).items():
            above = score > self.thresholds[detector]
            crossed = above and not camera.above.get(detector, False)
            camera.above[detector] = above
            readings.append(Reading(detector, score, self.thresholds[detector], crossed))
        return readings

    def _adopt(self, reference: DriftReference) -> None:
        """Learn each detector's threshold from windows of normal frames: mean + 4 deviations.

        Window and reference are both drawn anew: the frames that will be compared with the
        reference are not among it, and its own chance deviation must not count as drift.
        """
        frames = len(reference.features_ND)
        generator = torch.Generator().manual_seed(self._seed)

        def drawn(n: int) -> Summary:
            rows = torch.randint(frames, (n,), generator=generator)
            return Summary.of(reference.features_ND[rows], reference.probabilities_NK[rows])

        null: dict[str, list[float]] = {detector: [] for detector in self.DETECTORS}
        for _ in range(NULL_WINDOWS):
            for detector, score in _scores(drawn(self._window), drawn(frames)).items():
                null[detector].append(score)
        for detector, scores in null.items():
            values = torch.tensor(scores)
            self.thresholds[detector] = float(values.mean() + 4 * values.std())
        self._reference = Summary.of(reference.features_ND, reference.probabilities_NK)


def _scores(recent: Summary, reference: Summary) -> dict[str, float]:
    return {
        "frechet": frechet(recent, reference),
        "labels": jensen_shannon(recent.labels_K, reference.labels_K),
    }
