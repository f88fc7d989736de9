"""Labelled photographs at the model's size, and their corrupted copies, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from agent.bench.corruptions import Pixels, corrupt
from agent.bench.photos import IMAGE_SUFFIXES, label_of
from agent.errors import AgentError

#: Photographs set aside to calibrate on; streams never show them.
CALIBRATION = 128
#: Images that make a benchmark.
FEWEST = 64
#: Part of the cache's key: raise it when a corruption changes.
_RECIPE = 1


class Condition(NamedTuple):
    """What befalls the images: a corruption of `corruptions`, `lowres`, or nothing.

    The severity of `lowres` is the power of two that the resolution is divided by.
    """

    corruption: str = "clear"
    severity: int = 0

    def __str__(self) -> str:
        return f"{self.corruption} {self.severity}" if self.severity else self.corruption


CLEAR = Condition()


@dataclass(frozen=True, slots=True)
class Pool:
    """Photographs, uint8 (N, S, S, 3), and the true label of each; corrupted copies on demand."""

    labels: tuple[str, ...]
    pixels: NDArray[np.uint8]
    cache: Path

    @property
    def calibration(self) -> range:
        """Photographs that streams do not show."""
        return range(min(CALIBRATION, len(self.labels) // 4))

    @property
    def stream(self) -> range:
        """Photographs that streams are made of."""
        return range(len(self.calibration), len(self.labels))

    def under(self, condition: Condition) -> NDArray[np.uint8]:
        """All photographs under a condition, (N, S, S, 3), mapped from the cache."""
        if condition == CLEAR:
            return self.pixels
        path = self.cache / f"{condition.corruption}-{condition.severity}.npy"
        if not path.is_file():
            self._make(condition, path)
        mapped: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped

    def _make(self, condition: Condition, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = int.from_bytes(hashlib.sha256(str(condition).encode()).digest()[:4], "big")
        rng = np.random.default_rng(seed)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, np.stack([_apply(image, condition, rng) for image in self.pixels]))
        part.replace(path)


def load(
    folder: Path,
    size: int,
    crop_ratio: float,
    cache: Path,
    *,
    truth: Callable[[Path, Path], str | None] = label_of,
    seed: int = 0,
) -> Pool:
    """Read the images under `folder` that `truth` has a label for, cropped as the model wants.

    They are shuffled by `seed`.

    Raises:
        AgentError: there are too few images to calibrate and to stream, or one cannot be read.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    found = [(path, label) for path in paths if (label := truth(path, folder)) is not None]
    if len(found) < FEWEST:
        raise AgentError(f"{folder} holds {len(found)} images; a benchmark needs {FEWEST} or more")
    found = [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
    pixels = np.stack([_read(path, size, crop_ratio) for path, _ in found])
    return of(tuple(label for _, label in found), pixels, cache)


def of(labels: tuple[str, ...], pixels: NDArray[np.uint8], cache: Path) -> Pool:
    """A pool of images at the model's size, (N, S, S, 3), with a place of its own in the cache."""
    key = hashlib.sha256(bytes([_RECIPE]))
    key.update(pixels.data)
    return Pool(labels, pixels, cache / key.hexdigest()[:16])


def _read(path: Path, size: int, crop_ratio: float) -> Pixels:
    try:
        with Image.open(path) as image:
            rgb = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise AgentError(f"{path} cannot be read as an image: {error}") from error
    return fitted(rgb, size, crop_ratio)


def fitted(rgb: Image.Image, size: int, crop_ratio: float) -> Pixels:
    """The middle of an image, resized as the model wants it: uint8 (size, size, 3)."""
    scale = size / crop_ratio / min(rgb.size)
    if round(scale * min(rgb.size)) != min(rgb.size):
        side = (round(rgb.width * scale), round(rgb.height * scale))
        rgb = rgb.resize(side, Image.Resampling.BICUBIC)
    left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))


def _apply(image: Pixels, condition: Condition, rng: np.random.Generator) -> Pixels:
    if condition.corruption == "lowres":
        small = max(1, len(image) // 2**condition.severity)
        reduced = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
        return np.asarray(reduced.resize((len(image), len(image)), Image.Resampling.BICUBIC))
    return corrupt(image, condition.corruption, condition.severity, rng)


def prepare(pool: Pool, conditions: Sequence[Condition], progress: Callable[[], None]) -> None:
    """Fill the cache; `progress` is called after each condition."""
    for condition in conditions:
        pool.under(condition)
        progress()
