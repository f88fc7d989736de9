"""Small stand-ins for tests: two tiny encoders of real architectures, a clock, frames."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from agent.adapt.alignment import Alignment
from agent.adapt.information import FalseAdvantage, usual_variety
from agent.adapt.reference import Centre, Reference
from agent.adapt.restore import Spectrum
from agent.adapt.strategy import ZeroShot, entropy
from agent.adapt.style import StyleReference, style
from agent.encode import Encoder, Preprocess
from agent.types import FrameId, Record

LABELS = ("cat", "dog", "truck", "boat")
TEMPLATES = ("a photo of a {}.", "art of the {}.")

_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
_VISION = {
    "batch_norm": {
        "timm_model_name": "resnet10t",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    },
    "layer_norm": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
}
#: Names of the tiny encoders: a convolutional tower and a vision transformer.
ARCHITECTURES = tuple(_VISION)


def tiny_encoder(architecture: str = "batch_norm", seed: int = 0) -> Encoder:
    """An open_clip model with random weights, small enough for unit tests."""
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(embed_dim=24, vision_cfg=_VISION[architecture], text_cfg=_TEXT)
    model.requires_grad_(False).eval()
    _spread(model)
    half = (0.5, 0.5, 0.5)
    return Encoder(
        model,
        open_clip.SimpleTokenizer(context_length=_TEXT["context_length"]),
        Preprocess(size=32, crop_ratio=1.0, mean=half, std=half),
        name=f"tiny-{architecture}",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def pictures(n: int, seed: int) -> Tensor:
    """Random smooth images in [0, 1] at the tiny encoders' size, (n, 3, 32, 32)."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)


@torch.no_grad()
def _spread(model: Any) -> None:
    """Remove the direction that random towers send every image to, so that images differ."""
    mean_D = F.normalize(model.encode_image(pictures(64, seed=0) * 2 - 1).mean(dim=0), dim=-1)
    rest_DD = torch.eye(len(mean_D)) - torch.outer(mean_D, mean_D)
    if hasattr(model.visual, "trunk"):
        model.visual.head.proj.weight.copy_(rest_DD @ model.visual.head.proj.weight)
    else:
        model.visual.proj.copy_(model.visual.proj @ rest_DD)


@torch.no_grad()
def tiny_reference(encoder: Encoder, seed: int = 0) -> Reference:
    """What pictures look like, also to the tower's normalisation layers."""
    normal = pictures(64, seed)
    with Alignment(encoder.visual).measured(align=False) as measured:
        features_ND = encoder.encode_image(normal)
    logits_NK = tiny_zero_shot(encoder).logits(features_ND)
    return Reference(
        measured[0].moments(),
        Spectrum.of(normal),
        StyleReference.of(style(normal)),
        FalseAdvantage(0.0, 0.0),
        Centre(features_ND.mean(dim=0), len(features_ND)),
        usual_variety(logits_NK.argmax(dim=-1).tolist()),
        float(entropy(logits_NK.softmax(dim=-1)).mean()),
    )


def tiny_zero_shot(encoder: Encoder) -> ZeroShot:
    """Four labels in two templates."""
    return ZeroShot(LABELS, encoder.encode_labels(LABELS, TEMPLATES), encoder.logit_scale)


def tiny_words(encoder: Encoder) -> Tensor:
    """Text features of a few words that are none of the labels, and of one that is, (6, D)."""
    words = ["cloud", "spoon", "window", "river", "violin", LABELS[0]]
    return encoder.encode_labels(words, TEMPLATES[:1])[0]


@dataclass(slots=True)
class FakeClock:
    """Seconds that pass only when told to."""

    now: float = 0.0

    def __call__(self) -> float:
        """The present."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def picture(rng: np.random.Generator, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A random smooth image, uint8 (height, width, 3)."""
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """The image as JPEG bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def record(value: bytes | None, offset: int = 0, camera: str = "cam", partition: int = 0) -> Record:
    """A raw record of the topic "frames", stamped one second after the epoch per offset."""
    return Record(FrameId("frames", partition, offset), camera.encode(), value, (), float(offset))
