"""What is normal, measured once on a folder of the operator's own frames, without labels.

The file is safetensors with JSON in its header. It belongs to one checkpoint and one set of labels
and prompts, and says so; with others it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agent.adapt.alignment import MEASURED_IMAGES, Alignment
from agent.adapt.information import (
    WINDOW,
    FalseAdvantage,
    advantage,
    information,
    usual_variety,
)
from agent.adapt.moments import Moments
from agent.adapt.reference import Centre, Reference
from agent.adapt.restore import Spectrum
from agent.adapt.strategy import ZeroShot, entropy
from agent.adapt.style import MEASURES, StyleReference, style
from agent.config import ModelConfig
from agent.drift.statistics import DriftReference
from agent.encode import Encoder
from agent.errors import InvalidConfig
from agent.score import negatives
from agent.score.confidence import GRIDS, MAX_DOUBT, ConfidenceModel, shuffled
from agent.score.novelty import MEMBERS, Normal, Novelty, Score

FORMAT = "tta-calibration-7"
#: Fewer frames than this say too little of what is normal.
MIN_FRAMES = 16
#: The lowest temperature that is tried; the highest is its inverse.
COLDEST = 1 / 20
#: Frames kept for the drift reference.
MAX_FEATURES = 1024
#: Frames that are spoilt to learn what answers are worth.
MAX_SPOILT = 256
#: Of a larger batch not every image would be measured.
BATCH = MEASURED_IMAGES


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured on normal frames; `frames` of them.

    `temperature` divides the checkpoint's logit scale. `negatives_MD` are unit text features of
    what the labels do not name, `normal` the scores of novelty that normal frames have.
    `reference` is what strategies lead other domains back to.
    """

    subject: str
    frames: int
    temperature: float
    negatives_MD: Tensor
    normal: dict[Score, Normal]
    confidence: ConfidenceModel
    drift: DriftReference
    reference: Reference

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {
            "negatives": self.negatives_MD.half(),
            "confidence": torch.tensor(
                [self.confidence.doubt, self.confidence.usual], dtype=torch.float64
            ),
            "style.mean": self.reference.style.mean,
            "style.whitening": self.reference.style.whitening,
            "drift.features": self.drift.features_ND,
            "drift.probabilities": self.drift.probabilities_NK,
            "drift.styles": self.drift.styles_NS,
            "spectrum.energy": self.reference.spectrum.energy_OA,
            "spectrum.level": self.reference.spectrum.level_A,
            "centre.mean": self.reference.centre.mean_D,
            "answers": torch.tensor(
                [self.reference.variety, self.reference.vagueness], dtype=torch.float64
            ),
            "false_advantage": torch.tensor(
                [self.reference.false_advantage.mean, self.reference.false_advantage.deviation]
            ),
        }
        tensors |= {f"novelty.{score}": normal.sorted_N for score, normal in self.normal.items()}
        moments = self.reference.moments.tensors()
        tensors |= {f"moments.{name}": tensor for name, tensor in moments.items()}
        header = {
            "format": FORMAT,
            "subject": self.subject,
            "frames": str(self.frames),
            "temperature": json.dumps(self.temperature),
        }
        part = path.with_name(path.name + ".part")
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, part, metadata=header)
        part.replace(path)

    @classmethod
    def load(cls, path: Path, subject: str, labels: int | None = None) -> Calibration:
        """Read the file that was made for this subject, and so for that many labels.

        Raises:
            InvalidConfig: it is not there, is not a calibration, or was made for another
                checkpoint, other labels or other templates.
        """
        if not path.is_file():
            raise InvalidConfig(
                [f"calibration: {path} is not a file; make it with tta-agent calibrate"]
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header.get("format") != FORMAT:
                raise InvalidConfig([f"calibration: {path} is not of format {FORMAT}"])
            if header["subject"] != subject:
                raise InvalidConfig(
                    [
                        f"calibration: {path} was made for another checkpoint, other labels or "
                        "other templates; run tta-agent calibrate again"
                    ]
                )
            frames, temperature = int(header["frames"]), float(header["temperature"])
            if frames < MIN_FRAMES or not COLDEST <= temperature <= 1 / COLDEST:
                raise ValueError("its header makes no sense")
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                raise ValueError("it holds numbers that are not finite")
            return cls(
                subject=subject,
                frames=frames,
                temperature=temperature,
                negatives_MD=_negatives(tensors),
                normal=_normal(tensors, frames),
                confidence=_confidence_model(tensors["confidence"]),
                drift=_drift(tensors, frames, labels),
                reference=_reference(tensors, frames),
            )
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise InvalidConfig([f"calibration: {path} cannot be read: {error}"]) from error


def subject_of(encoder: Encoder, model: ModelConfig) -> str:
    """Hash of what a calibration depends on: checkpoint, labels and templates."""
    words = json.dumps([encoder.fingerprint, model.labels, model.templates])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


@torch.no_grad()
def word_features(
    encoder: Encoder,
    template: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Unit text features (V, D) of the words that negative labels are mined from.

    Of a checkpoint with a small vocabulary, those that it was taught.
    """
    words = negatives.words()
    untaught = set(encoder.unknown_labels(words))
    taught = [word for word in words if word not in untaught]
    return encoder.encode_labels(taught, [template], progress)[0]


@torch.no_grad()
def calibrate(
    encoder: Encoder,
    zero_shot: ZeroShot,
    images: Sequence[NDArray[np.uint8]],
    words_VD: Tensor,
    subject: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure images of shape (H, W, 3) at the model's size; `zero_shot` has temperature 1.

    `words_VD` are the `word_features`.

    Raises:
        InvalidConfig: there are too few.
    """
    if len(images) < MIN_FRAMES:
        raise InvalidConfig(
            [f"calibration needs {MIN_FRAMES} readable images or more, got {len(images)}"]
        )
    spoilt = images[:MAX_SPOILT]
    total = 2 * len(images) + (len(GRIDS) - 1) * len(spoilt)
    alignment = Alignment(encoder.visual)
    features, views, styles = [], [], []
    moments: Moments | None = None
    spectrum: Spectrum | None = None
    for start in range(0, len(images), BATCH):
        pixels_BCHW = encoder.to_device(images[start : start + BATCH])
        with alignment.measured(align=False) as measured:
            features.append(encoder.encode_image(pixels_BCHW))
        here, colours = measured[0].moments(), Spectrum.of(pixels_BCHW)
        moments = here if moments is None else moments.merged(here)
        spectrum = colours if spectrum is None else spectrum.merged(colours)
        views.append(encoder.encode_image(_other_view(pixels_BCHW)))
        styles.append(style(pixels_BCHW))
        progress(min(start + BATCH, len(images)), total)
    features_ND, views_ND = torch.cat(features), torch.cat(views)
    temperature = fit_temperature(zero_shot.logits(features_ND), zero_shot.logits(views_ND))
    tempered = zero_shot.tempered(temperature)
    logits_NK = tempered.logits(features_ND)
    probabilities_NK = logits_NK.softmax(dim=-1)
    styles_NS = torch.cat(styles).cpu()
    # Unreachable with MIN_FRAMES > 0; keeps the type honest.
    if moments is None or spectrum is None:
        raise InvalidConfig(["calibration needs images"])
    alignment, advantages = Alignment(encoder.visual, moments), []
    for start in range(0, len(images) - BATCH + 1, BATCH):  # whole galleries
        with alignment.measured():
            aligned_BD = encoder.encode_image(encoder.to_device(images[start : start + BATCH]))
        aligned_BK = tempered.logits(aligned_BD).softmax(dim=-1)
        plain_BK = probabilities_NK[start : start + BATCH]
        advantages.append(advantage(information(aligned_BK), information(plain_BK)))
        progress(len(images) + start + BATCH, total)
    confidence = _confidence(
        encoder,
        tempered,
        spoilt,
        probabilities_NK[: len(spoilt)],
        lambda done: progress(2 * len(images) + done, total),
    )
    progress(total, total)
    # As the file keeps them, so that normal frames are scored like all that come later.
    negatives_MD = negatives.mine(words_VD, zero_shot.text_KD).half().float()
    normal = normal_scores(tempered, temperature, negatives_MD, features_ND)
    return Calibration(
        subject=subject,
        frames=len(images),
        temperature=temperature,
        negatives_MD=negatives_MD,
        normal=normal,
        confidence=confidence,
        drift=DriftReference(
            features_ND[:MAX_FEATURES].cpu(),
            probabilities_NK[:MAX_FEATURES].cpu(),
            styles_NS[:MAX_FEATURES],
            normal[Score.ABLATED_ENERGY].sorted_N,
        ),
        reference=Reference(
            moments,
            spectrum,
            StyleReference.of(styles_NS),
            FalseAdvantage.of(advantages),
            Centre(features_ND.mean(dim=0), len(features_ND)),
            usual_variety(logits_NK.argmax(dim=-1).tolist()),
            float(entropy(probabilities_NK).mean()),
        ),
    )


def normal_scores(
    zero_shot: ZeroShot, temperature: float, negatives_MD: Tensor, features_ND: Tensor
) -> dict[Score, Normal]:
    """Every score on the unit features (N, D) of normal frames; `zero_shot` is tempered."""
    logits_NK = zero_shot.logits(features_ND)
    normal: dict[Score, Normal] = {}
    # The ensemble comes last: its members' scores are what it is standardised by.
    for score in (*MEMBERS, *(other for other in Score if other not in MEMBERS)):
        novelty = Novelty(zero_shot, temperature, negatives_MD, normal)
        normal[score] = Normal.of(novelty.score(score, features_ND, logits_NK))
    return normal


def _confidence(
    encoder: Encoder,
    zero_shot: ZeroShot,
    images: Sequence[NDArray[np.uint8]],
    sound_NK: Tensor,
    progress: Callable[[int], None],
) -> ConfidenceModel:
    generator = torch.Generator().manual_seed(0)
    spoilt = [sound_NK]
    for nth, grid in enumerate(GRIDS[1:]):
        features = []
        for start in range(0, len(images), BATCH):
            pixels_BCHW = encoder.to_device(images[start : start + BATCH])
            features.append(encoder.encode_image(shuffled(pixels_BCHW, grid, generator)))
            progress(nth * len(images) + min(start + BATCH, len(images)))
        spoilt.append(zero_shot.logits(torch.cat(features)).softmax(dim=-1))
    return ConfidenceModel.fit(sound_NK, spoilt)


def _confidence_model(weights: Tensor) -> ConfidenceModel:
    doubt, usual = weights.tolist()
    if not 0 <= doubt <= MAX_DOUBT or not 0 <= usual <= 1:
        raise ValueError("its confidence makes no sense")
    return ConfidenceModel(doubt, usual)


def _negatives(tensors: dict[str, Tensor]) -> Tensor:
    negatives_MD = tensors["negatives"].float()
    norms_M = negatives_MD.norm(dim=-1)
    alike = negatives_MD.shape[1:] == tensors["drift.features"].shape[1:]
    if not alike or not len(norms_M) or (norms_M - 1).abs().max() > 0.01:
        raise ValueError("its negative labels are none")
    return negatives_MD


def _normal(tensors: dict[str, Tensor], frames: int) -> dict[Score, Normal]:
    normal = {score: Normal(tensors[f"novelty.{score}"]) for score in Score}
    if any(scores.sorted_N.shape != (frames,) for scores in normal.values()):
        raise ValueError("its scores are not one of each frame")
    if any(bool((scores.sorted_N.diff() < 0).any()) for scores in normal.values()):
        raise ValueError("its scores are not sorted")
    return normal


def _drift(tensors: dict[str, Tensor], frames: int, labels: int | None) -> DriftReference:
    """The frames that drift is measured against."""
    features_ND, probabilities_NK = tensors["drift.features"], tensors["drift.probabilities"]
    styles_NS, energies_N = tensors["drift.styles"], tensors["novelty.ablated_energy"]
    kept = min(frames, MAX_FEATURES)
    if any(len(each) != kept or each.ndim != 2 for each in (features_ND, probabilities_NK)):
        raise ValueError("its features and probabilities are not those of its frames")
    if labels is not None and probabilities_NK.shape[1] != labels:
        raise ValueError(f"its probabilities are not those of {labels} labels")
    sums_N = probabilities_NK.sum(dim=-1)
    if probabilities_NK.min() < 0 or (sums_N - 1).abs().max() > 0.01:
        raise ValueError("its probabilities are none")
    if (features_ND.norm(dim=-1) - 1).abs().max() > 0.01:
        raise ValueError("its features are not of unit length")
    if styles_NS.shape != (kept, MEASURES):
        raise ValueError(f"its styles are not {MEASURES} measures of each frame")
    return DriftReference(features_ND, probabilities_NK, styles_NS, energies_N)


def _reference(tensors: dict[str, Tensor], frames: int) -> Reference:
    moments = Moments.named(tensors, "moments.", frames)
    spectrum = Spectrum(tensors["spectrum.energy"], tensors["spectrum.level"], frames)
    styles = StyleReference(tensors["style.mean"], tensors["style.whitening"], frames)
    if styles.mean.shape != (MEASURES,) or styles.whitening.shape != (MEASURES, MEASURES):
        raise ValueError(f"its style is not of {MEASURES} measures")
    if moments.variance.min() < 0 or spectrum.energy_OA.min() < 0:
        raise ValueError("its moments or its spectrum are below zero")
    false_advantage = FalseAdvantage(*tensors["false_advantage"].tolist())
    centre = Centre(tensors["centre.mean"], frames)
    if centre.mean_D.shape != tensors["drift.features"].shape[1:] or centre.mean_D.norm() > 1.001:
        raise ValueError("its mean feature is none")
    variety, vagueness = tensors["answers"].tolist()
    if not 1 <= variety <= WINDOW + 1e-6 or vagueness < 0:
        raise ValueError("its answers make no sense")
    return Reference(moments, spectrum, styles, false_advantage, centre, variety, vagueness)


def fit_temperature(first_NK: Tensor, second_NK: Tensor) -> float:
    """The temperature at which one view's confidence is the rate at which the other view agrees.

    Temperature scaling (Guo et al. 2017) with the prediction on the other view in the label's
    place: cross-entropy both ways, minimised over a logarithmic grid from 1/20 to 20. One frame's
    worth of doubt is added, so that a few frames that all agree do not make it certain.
    """
    first_N, second_N = first_NK.argmax(-1), second_NK.argmax(-1)
    doubt = 1 / (len(first_N) + 1)

    def loss(temperature: float) -> float:
        return float(
            F.cross_entropy(first_NK / temperature, second_N, label_smoothing=doubt)
            + F.cross_entropy(second_NK / temperature, first_N, label_smoothing=doubt)
        )

    grid = torch.logspace(-1, 1, 121, base=1 / COLDEST, dtype=torch.float64).tolist()
    best: float = min(grid, key=loss)
    return best


def _other_view(pixels_BCHW: Tensor) -> Tensor:
    """Mirrored, and the central three quarters at full size: the same object, seen otherwise."""
    size = pixels_BCHW.shape[-1]
    edge = size // 8
    centre = pixels_BCHW[..., edge : size - edge, edge : size - edge].flip(-1)
    return F.interpolate(centre, size=(size, size), mode="bilinear", align_corners=False)
