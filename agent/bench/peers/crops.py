"""Random resized crops, the augmentation of published methods that compare views of an image."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Aspect ratios of the cropped box, and how often a box that does not fit is drawn again, as in
#: torchvision's RandomResizedCrop, which the published methods use.
_RATIOS = (3 / 4, 4 / 3)
_ATTEMPTS = 10


def random_resized_crops(
    image_CHW: Tensor, n: int, min_area: float, rng: np.random.Generator
) -> Tensor:
    """Views (n, C, H, W) of one image: a random box at the image's size, half of them mirrored.

    The box covers between `min_area` and all of the image.
    """
    height, width = image_CHW.shape[1:]
    views = []
    for _ in range(n):
        top, left, h, w = _box(height, width, min_area, rng)
        crop_CHW = image_CHW[:, top : top + h, left : left + w]
        if rng.random() < 0.5:
            crop_CHW = crop_CHW.flip(-1)
        # A box is never larger than its view, so that nothing needs antialiasing.
        views.append(
            F.interpolate(
                crop_CHW[None], size=(height, width), mode="bilinear", align_corners=False
            )
        )
    return torch.cat(views)


def _box(
    height: int, width: int, min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random box; the whole image where none fits."""
    low, high = map(math.log, _RATIOS)
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, height, width
