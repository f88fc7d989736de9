"""What is normal, measured once on a folder of the operator's own frames, without labels.

The file is safetensors with JSON in its header. It belongs to one checkpoint and one set of labels
and prompts, and says so; with others it is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from agent.score.ood import energy
from agent.score.threshold import EnergyReference

FORMAT = "tta-calibration-6"
#: Fewer frames than this say too little of what is normal.
MIN_FRAMES = 16
#: Frames kept for the drift reference.
MAX_FEATURES = 1024
#: Of a larger batch not every image would be measured.
BATCH = MEASURED_IMAGES


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured on normal frames; `frames` of them.

    `temperature` divides the checkpoint's logit scale. `reference` is what strategies lead other
    domains back to.
    """

    subject: str
    frames: int
    temperature: float
    energies: EnergyReference
    drift: DriftReference
    reference: Reference

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {
            "energies": self.energies.sorted_N,
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
    def load(cls, path: Path, subject: str) -> Calibration:
        """Read the file that was made for this subject.

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
            if frames < MIN_FRAMES or not 0 < temperature < math.inf:
                raise ValueError("its header makes no sense")
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                raise ValueError("it holds numbers that are not finite")
            return cls(
                subject=subject,
                frames=frames,
                temperature=temperature,
                energies=EnergyReference(tensors["energies"]),
                drift=_drift(tensors, frames),
                reference=_reference(tensors, frames),
            )
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise InvalidConfig([f"calibration: {path} cannot be read: {error}"]) from error


def subject_of(encoder: Encoder, model: ModelConfig) -> str:
    """Hash of what a calibration depends on: checkpoint, labels and templates."""
    words = json.dumps([encoder.fingerprint, model.labels, model.templates])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


@torch.no_grad()
def calibrate(
    encoder: Encoder,
    zero_shot: ZeroShot,
    images: Sequence[NDArray[np.uint8]],
    subject: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure images of shape (H, W, 3) at the model's size; `zero_shot` has temperature 1.

    Raises:
        InvalidConfig: there are too few.
    """
    if len(images) < MIN_FRAMES:
        raise InvalidConfig(
            [f"calibration needs {MIN_FRAMES} readable images or more, got {len(images)}"]
        )
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
        progress(min(start + BATCH, len(images)), 2 * len(images))
    features_ND, views_ND = torch.cat(features), torch.cat(views)
    temperature = fit_temperature(zero_shot.logits(features_ND), zero_shot.logits(views_ND))
    logits_NK = zero_shot.logits(features_ND) / temperature
    styles_NS, energies = torch.cat(styles).cpu(), EnergyReference.of(energy(logits_NK))
    # Unreachable with MIN_FRAMES > 0; keeps the type honest.
    if moments is None or spectrum is None:
        raise InvalidConfig(["calibration needs images"])
    alignment, advantages = Alignment(encoder.visual, moments), []
    for start in range(0, len(images) - BATCH + 1, BATCH):  # whole galleries
        with alignment.measured():
            aligned_BD = encoder.encode_image(encoder.to_device(images[start : start + BATCH]))
        aligned_BK = (zero_shot.logits(aligned_BD) / temperature).softmax(dim=-1)
        plain_BK = logits_NK[start : start + BATCH].softmax(dim=-1)
        advantages.append(advantage(information(aligned_BK), information(plain_BK)))
        progress(len(images) + start + BATCH, 2 * len(images))
    progress(2 * len(images), 2 * len(images))
    return Calibration(
        subject=subject,
        frames=len(images),
        temperature=temperature,
        energies=energies,
        drift=DriftReference(
            features_ND[:MAX_FEATURES].cpu(),
            logits_NK[:MAX_FEATURES].softmax(-1).cpu(),
            styles_NS[:MAX_FEATURES],
            energies.sorted_N,
        ),
        reference=Reference(
            moments,
            spectrum,
            StyleReference.of(styles_NS),
            FalseAdvantage.of(advantages),
            Centre(features_ND.mean(dim=0), len(features_ND)),
            usual_variety(logits_NK.argmax(dim=-1).tolist()),
            float(entropy(logits_NK.softmax(dim=-1)).mean()),
        ),
    )


def _drift(tensors: dict[str, Tensor], frames: int) -> DriftReference:
    """The frames that drift is measured against."""
    features_ND, probabilities_NK = tensors["drift.features"], tensors["drift.probabilities"]
    styles_NS, energies_N = tensors["drift.styles"], tensors["energies"]
    kept = min(frames, MAX_FEATURES)
    if any(len(each) != kept or each.ndim != 2 for each in (features_ND, probabilities_NK)):
        raise ValueError("its features and probabilities are not those of its frames")
    if styles_NS.shape != (kept, MEASURES):
        raise ValueError(f"its styles are not {MEASURES} measures of each frame")
    if energies_N.shape != (frames,):
        raise ValueError("its energies are not those of its frames")
    return DriftReference(features_ND, probabilities_NK, styles_NS, energies_N)


def _reference(tensors: dict[str, Tensor], frames: int) -> Reference:
    moments = Moments.named(tensors, "moments.", frames)
    spectrum = Spectrum(tensors["spectrum.energy"], tensors["spectrum.level"], frames)
    styles = StyleReference(tensors["style.mean"], tensors["style.whitening"], frames)
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

    grid = torch.logspace(-1, 1, 121, base=20.0).tolist()
    best: float = min(grid, key=loss)
    return best


def _other_view(pixels_BCHW: Tensor) -> Tensor:
    """Mirrored, and the central three quarters at full size: the same object, seen otherwise."""
    size = pixels_BCHW.shape[-1]
    edge = size // 8
    centre = pixels_BCHW[..., edge : size - edge, edge : size - edge].flip(-1)
    return F.interpolate(centre, size=(size, size), mode="bilinear", align_corners=False)
