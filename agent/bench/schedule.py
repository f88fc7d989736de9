"""A labelled stream of frames whose domain drifts on a schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from agent.bench.corruptions import corrupt
from agent.bench.photos import FRAME_SIZE, Photo, deck, frame_of
from agent.errors import AgentError

CAMERAS = ("camera-north", "camera-east", "camera-south")
JPEG_QUALITY = 90
#: Frames are published as VGA but hold half as many lines: the corruptions are defined for 224
#: pixels, and a model that reads about as many must not average them away.
PUBLISHED_SIZE = (2 * FRAME_SIZE[0], 2 * FRAME_SIZE[1])

DEFAULT_FRAMES = 900
#: The severest of ImageNet-C, which is where adaptation is usually compared.
SEVERITY = 5
#: Strange things pass by in any weather.
USUAL_UNKNOWN_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the stream in one domain.

    Attributes:
        corruption: a name in `corruptions.CORRUPTIONS`; None leaves frames as they are.
        severity: 1 to 5; without a corruption it means nothing.
        unknown_share: how many of the frames show something no label names, 0 to 1.
    """

    name: str
    corruption: str | None
    severity: int
    frames: int
    unknown_share: float


@dataclass(frozen=True, slots=True)
class LabelledFrame:
    """A frame as it goes out, and the truth about it. `jpeg` is what a camera would send."""

    index: int
    phase: str
    label: str
    known: bool
    jpeg: bytes
    camera: str


def drifting(frames: int = DEFAULT_FRAMES) -> list[Phase]:
    """Clear, fog, night, sensor noise, unknown objects and clear again, `frames` in all.

    Raises:
        AgentError: there is not a frame for each phase.
    """
    plan = (
        ("clear", None, USUAL_UNKNOWN_SHARE),
        ("fog", "fog", USUAL_UNKNOWN_SHARE),
        ("night", "night", USUAL_UNKNOWN_SHARE),
        ("sensor noise", "gaussian_noise", USUAL_UNKNOWN_SHARE),
        ("unknown objects", None, 0.5),
        ("clear again", None, USUAL_UNKNOWN_SHARE),
    )
    if frames < len(plan):
        raise AgentError(f"the schedule has {len(plan)} phases and needs as many frames or more")
    ends = [round(frames * (i + 1) / len(plan)) for i in range(len(plan))]
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return [
        Phase(name, corruption, SEVERITY, length, share)
        for (name, corruption, share), length in zip(plan, lengths, strict=True)
    ]


def stream(
    photos: Sequence[Photo], schedule: Sequence[Phase], seed: int
) -> Iterator[LabelledFrame]:
    """The frames of the schedule, the same for the same seed; cameras take turns.

    Photographs are dealt like cards, so that every phase shows them about equally often. Without
    unknown photographs every frame is a known one.
    """
    rng = np.random.default_rng(seed)
    known = deck([photo for photo in photos if photo.known], rng)
    strange = [photo for photo in photos if not photo.known]
    unknown = deck(strange, rng)
    index = 0
    for phase in schedule:
        for _ in range(phase.frames):
            shows_unknown = bool(strange) and rng.random() < phase.unknown_share
            photo = next(unknown if shows_unknown else known)
            pixels = frame_of(photo, rng)
            if phase.corruption is not None:
                pixels = corrupt(pixels, phase.corruption, phase.severity, rng)
            camera = CAMERAS[index % len(CAMERAS)]
            yield LabelledFrame(
                index, phase.name, photo.label, photo.known, _encode(pixels), camera
            )
            index += 1


def _encode(pixels: NDArray[np.uint8]) -> bytes:
    file = BytesIO()
    enlarged = Image.fromarray(pixels).resize(PUBLISHED_SIZE, Image.Resampling.BILINEAR)
    enlarged.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
