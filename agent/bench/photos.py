"""Labelled photographs, and a virtual camera that makes many frames of each.

The built-in photographs come inside the wheels of scikit-image, scikit-learn and matplotlib. There
are few, so they are demonstration material and no benchmark: the known ones were chosen because the
offline model recognises most of their frames on a clear day; bad weather had no part in the choice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from agent.errors import AgentError

SKIMAGE = ("skimage", "data")
SKLEARN = ("sklearn", "datasets/images")
MATPLOTLIB = ("matplotlib", "mpl-data/sample_data")

KNOWN = {
    "cat": (SKIMAGE, "chelsea.png"),
    "coffee": (SKIMAGE, "coffee.png"),
    "motorcycle": (SKIMAGE, "motorcycle_left.png"),
    "rocket": (SKIMAGE, "rocket.jpg"),
    "tripod": (SKIMAGE, "camera.png"),
    "palace": (SKLEARN, "china.jpg"),
    "flower": (SKLEARN, "flower.jpg"),
    "suit": (MATPLOTLIB, "grace_hopper.jpg"),
}
#: Things that no label of the demo names.
UNKNOWN = {
    "astronaut": (SKIMAGE, "astronaut.png"),
    "bricks": (SKIMAGE, "brick.png"),
    "coins": (SKIMAGE, "coins.png"),
    "galaxies": (SKIMAGE, "hubble_deep_field.jpg"),
    "grass": (SKIMAGE, "grass.png"),
    "gravel": (SKIMAGE, "gravel.png"),
    "handwriting": (SKIMAGE, "text.png"),
    "moon": (SKIMAGE, "moon.png"),
    "page": (SKIMAGE, "page.png"),
    "retina": (SKIMAGE, "retina.jpg"),
    "tissue": (SKIMAGE, "ihc.png"),
}
_EVERYDAY = """
airplane ambulance backpack ball balloon banana barn bear bench bicycle bird boat bookcase
bottle bridge broom bucket bus butterfly camel canoe car chair church clock corn crab desk
dog drum duck elephant fence fish flute fountain fox frog fruit goat goose guitar hammer
hat helmet horse insect jellyfish keyboard knife lamp lemon lighthouse lion lizard
microphone monkey mountain mushroom ox piano pig pizza purse rabbit sandal shark sheep
shirt shovel snail snake sofa spider spoon stove sunglasses telephone television tent
tiger toaster tractor train truck umbrella vase violin volcano wallet wolf zebra
"""
#: Labels beside the known ones that no built-in photograph is of. The list is long, as an
#: operator's is: among few labels even a ruined picture is easily told. A word that the model takes
#: for a known thing on a clear day has no place in it.
DISTRACTORS = tuple(_EVERYDAY.split())

#: Frames are rendered at this (width, height).
FRAME_SIZE = (320, 240)
#: The virtual camera sees between this share of the widest view and all of it.
NARROWEST_VIEW = 0.7

#: A folder's share of labels that the model is not told, so that their photographs are unknown.
HELD_OUT = 0.2
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
#: A folder's photographs are kept in memory, so no more than these, and no larger side than this.
MOST_PHOTOS = 1000
LONGEST_SIDE = 640


@dataclass(frozen=True, slots=True)
class Photo:
    """A photograph, uint8 (H, W, 3) RGB, and whether the model is told its label."""

    label: str
    pixels: NDArray[np.uint8]
    known: bool


def builtin_photos() -> list[Photo]:
    """The photographs in the wheels of the ``demo`` extra.

    Raises:
        AgentError: a package or its photograph is not there.
    """
    return [
        Photo(label, _read(_in_wheel(*place)), known)
        for table, known in ((KNOWN, True), (UNKNOWN, False))
        for label, place in table.items()
    ]


def labelled_folder(folder: Path, seed: int = 0) -> list[Photo]:
    """The photographs under `folder`, labelled by sub-folder or else by file name.

    ``goldfish/1.jpg``, ``goldfish_12.jpg`` and ``n01443537_goldfish.jpg`` all show a goldfish. A
    fifth of three or more labels, drawn by `seed`, is held out as unknown.

    Raises:
        AgentError: there are no images, fewer than two labels, or a file is no image.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise AgentError(f"{folder} holds no images ({kinds})")
    rng = random.Random(seed)
    paths = sorted(rng.sample(paths, min(len(paths), MOST_PHOTOS)))
    labels = sorted({label_of(path, folder) for path in paths})
    if len(labels) < 2:
        raise AgentError(
            f"{folder} has only the label {labels[0]!r}: name sub-folders or files after what "
            "they show, two labels or more"
        )
    n_held_out = max(1, round(HELD_OUT * len(labels))) if len(labels) > 2 else 0
    held_out = set(rng.sample(labels, n_held_out))
    return [
        Photo(label, _read(path), label not in held_out)
        for path in paths
        for label in [label_of(path, folder)]
    ]


def label_of(path: Path, folder: Path) -> str:
    """What the sub-folder of `folder` or the file name says the photograph shows."""
    inside = path.relative_to(folder)
    in_sub_folder = len(inside.parts) > 1
    name = inside.parts[0] if in_sub_folder else re.sub(r"[_ -]*\d+$", "", inside.stem)
    words = re.sub(r"^n\d{8}[_-]", "", name).replace("_", " ").strip()
    return words or inside.stem


def known_labels(photos: Iterable[Photo]) -> list[str]:
    """The labels of the known photographs, each once, sorted."""
    return sorted({photo.label for photo in photos if photo.known})


def frame_of(photo: Photo, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One view of the photograph: zoomed, panned and perhaps mirrored; shape (240, 320, 3)."""
    height, width = photo.pixels.shape[:2]
    aspect = FRAME_SIZE[0] / FRAME_SIZE[1]
    view_width = min(width, height * aspect) * rng.uniform(NARROWEST_VIEW, 1)
    view_height = view_width / aspect
    left = rng.uniform(0, width - view_width)
    top = rng.uniform(0, height - view_height)
    view = Image.fromarray(photo.pixels).resize(
        FRAME_SIZE,
        Image.Resampling.BILINEAR,
        box=(left, top, min(left + view_width, width), min(top + view_height, height)),
    )
    return np.asarray(ImageOps.mirror(view) if rng.random() < 0.5 else view)


def deck(photos: Sequence[Photo], rng: np.random.Generator) -> Iterator[Photo]:
    """Photographs without end, each as often as any other: shuffled, dealt, shuffled again."""
    while photos:
        for index in rng.permutation(len(photos)):
            yield photos[index]


def _in_wheel(folder: tuple[str, str], name: str) -> Path:
    package, inside = folder
    try:
        path = Path(str(files(package))) / inside / name
    except ModuleNotFoundError as error:
        raise AgentError(
            f"the demo's photographs need {package}: pip install 'streaming-tta-agent[demo]'"
        ) from error
    return path


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise AgentError(f"{path} cannot be read as an image: {error}") from error
