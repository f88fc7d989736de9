"""How well the unknown is told, how often it is a false alarm, and what confidence is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.bench.competitors import AgentCompetitor
from agent.bench.photos import builtin_photos, frame_of
from agent.bench.pool import Condition, Pool, fitted
from agent.bench.pool import of as pool_of
from agent.bench.suites import Shot, Suite
from agent.calibration import Calibration
from agent.encode import Encoder
from agent.score.novelty import Novelty, Score
from agent.types import Verdict

#: The first classes of ImageNet, in its order, are animals; the others are mostly things.
ANIMALS = 398
#: Crops of each texture.
CROPS = 12
#: Random halves of the labels that are held out in turn.
HALVES = 3
#: Bins of the expected calibration error.
BINS = 15
#: Images encoded together.
BATCH = 32


@dataclass(frozen=True, slots=True)
class Split:
    """Labels that the model is told; photographs of all others are unknown to it."""

    kind: str
    known: tuple[str, ...]


def splits(labels: Sequence[str], shown: Sequence[str], has_animals: bool) -> list[Split]:
    """Near: labels held out at random. Far: animals from things, and things from animals.

    `shown` are the labels that photographs show. `has_animals` says that labels are ImageNet's in
    its order.
    """
    found = []
    for seed in range(HALVES):
        names = np.random.default_rng(seed).permutation(sorted(set(shown)))
        held_out = set(names[: len(names) // 2].tolist())
        found.append(Split("near", tuple(label for label in labels if label not in held_out)))
    if has_animals:
        animals, things = labels[:ANIMALS], labels[ANIMALS:]
        found += [Split("far", tuple(animals)), Split("far", tuple(things))]
    return found


def textures(size: int, crop_ratio: float, cache: Path, seed: int) -> Pool:
    """Crops of what no noun is for: bricks, gravel, a page, a retina; at the model's size."""
    rng = np.random.default_rng(seed)
    crops = [
        (photo.label, fitted(Image.fromarray(frame_of(photo, rng)), size, crop_ratio))
        for photo in builtin_photos()
        if not photo.known
        for _ in range(CROPS)
    ]
    labels, pixels = zip(*crops, strict=True)
    return pool_of(labels, np.stack(pixels), cache)


@dataclass(frozen=True, slots=True)
class Separation:
    """How well a score tells unknown frames (the positives) from known ones, all 0 to 1."""

    auroc: float
    aupr: float
    fpr95: float

    @classmethod
    def of(cls, unknown_N: NDArray[np.bool_], scores_N: NDArray[np.floating]) -> Separation:
        """Of N frames; higher scores are stranger. There must be frames of both kinds."""
        false_N, true_N, _ = roc_curve(unknown_N, scores_N)
        return cls(
            float(roc_auc_score(unknown_N, scores_N)),
            float(average_precision_score(unknown_N, scores_N)),
            float(false_N[np.searchsorted(true_N, 0.95)]),
        )


@torch.no_grad()
def features(encoder: Encoder, images: NDArray[np.uint8]) -> Tensor:
    """The source model's unit features (N, D) of images (N, S, S, 3)."""
    starts = range(0, len(images), BATCH)
    parts = [encoder.to_device(list(images[start : start + BATCH])) for start in starts]
    return torch.cat([encoder.encode_image(part) for part in parts])


def novelty(calibration: Calibration, labels: ZeroShot) -> Novelty:
    """The scores under a calibration; `labels` have temperature 1."""
    tempered = labels.tempered(calibration.temperature)
    return Novelty(tempered, calibration.temperature, calibration.negatives_MD, calibration.normal)


def scored(scorer: Novelty, features_ND: Tensor) -> dict[Score, NDArray[np.floating]]:
    """Every score of frames (N,)."""
    logits_NK = scorer.zero_shot.logits(features_ND)
    return {score: scorer.score(score, features_ND, logits_NK).cpu().numpy() for score in Score}


@dataclass(slots=True)
class Told:
    """What the agent said of the frames of a phase, against what was true; one entry a frame."""

    known: list[bool] = field(default_factory=list)
    flagged: list[bool] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    softmax: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)

    def note(self, verdict: Verdict, truth: str, known: bool) -> None:
        """One frame."""
        self.known.append(known)
        self.flagged.append(verdict.ood)
        self.margin.append(verdict.novelty - verdict.threshold)
        self.right.append(verdict.top[0].label == truth)
        self.softmax.append(verdict.top[0].probability)
        self.confidence.append(verdict.confidence)

    def joined(self, other: Told) -> Told:
        """Both, one after the other."""
        return Told(
            self.known + other.known,
            self.flagged + other.flagged,
            self.margin + other.margin,
            self.right + other.right,
            self.softmax + other.softmax,
            self.confidence + other.confidence,
        )

    @property
    def false_alarms(self) -> float:
        """Share of known frames that were flagged."""
        return float(np.mean(np.array(self.flagged)[self.known]))

    @property
    def recall(self) -> float:
        """Share of unknown frames that were flagged; NaN if there are none."""
        unknown = ~np.array(self.known)
        return float(np.array(self.flagged)[unknown].mean()) if unknown.any() else float("nan")

    @property
    def separation(self) -> Separation:
        """Of the distance to the threshold, which moves with the domain."""
        return Separation.of(~np.array(self.known), np.array(self.margin))

    def calibration_error(self, of: Sequence[float]) -> float:
        """Expected calibration error (Guo et al. 2017, eq. 3) of `of` on known frames."""
        known = np.array(self.known)
        return calibration_error(np.array(of)[known], np.array(self.right)[known])


def calibration_error(confidence_N: NDArray[np.floating], right_N: NDArray[np.bool_]) -> float:
    """Mean gap between confidence and accuracy over `BINS` bins, weighted by their frames."""
    error = 0.0
    for _, trust, accuracy, share in reliability(confidence_N, right_N):
        error += share * abs(trust - accuracy)
    return error


def reliability(
    confidence_N: NDArray[np.floating], right_N: NDArray[np.bool_]
) -> Iterator[tuple[int, float, float, float]]:
    """Of each bin that holds frames: its number, mean confidence, accuracy, share of the frames."""
    bin_N = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    for number in range(BINS):
        inside = bin_N == number
        if inside.any():
            trust, accuracy = confidence_N[inside].mean(), right_N[inside].mean()
            yield number, float(trust), float(accuracy), float(inside.mean())


def play(
    suite: Suite, pool: Pool, agent: AgentCompetitor, progress: Callable[[int], None]
) -> dict[str, Told]:
    """Show the suite to the agent; what it told, by phase."""
    told: dict[str, Told] = {}
    for start in range(0, len(suite.shots), suite.batch):
        batch = suite.shots[start : start + suite.batch]
        pixels = np.stack([pool.under(shot.condition)[shot.photo] for shot in batch])
        verdicts = agent.verdicts([shot.camera for shot in batch], pixels)
        for shot, verdict in zip(batch, verdicts, strict=True):
            truth = pool.labels[shot.photo]
            phase = told.setdefault(shot.phase, Told())
            phase.note(verdict, truth, truth not in suite.held_out)
        progress(len(batch))
    return told


def together(told: Mapping[str, Told]) -> Told:
    """All phases."""
    whole = Told()
    for phase in told.values():
        whole = whole.joined(phase)
    return whole


def open_storm(
    pool: Pool,
    conditions: Sequence[Condition],
    frames: int,
    share: float,
    rng: np.random.Generator,
) -> Suite:
    """Each condition in turn; `share` of the frames show one half of the labels, held out."""
    names = rng.permutation(sorted(set(pool.labels)))
    held_out = frozenset(names[: len(names) // 2].tolist())
    strange = np.array([i for i in pool.stream if pool.labels[i] in held_out])
    known = np.array([i for i in pool.stream if pool.labels[i] not in held_out])
    shots = [
        Shot(int(rng.choice(strange if rng.random() < share else known)), condition, str(condition))
        for condition in conditions
        for _ in range(frames)
    ]
    return Suite("open storm", tuple(shots), held_out=held_out)
