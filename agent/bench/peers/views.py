"""The random views of CoTTA and of ROID, in plain tensor operations.

CoTTA took them from KATANA (arXiv:2109.08191). As there, one draw serves the whole batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor

BRIGHTNESS = (0.6, 1.4)
CONTRAST = (0.7, 1.3)
SATURATION = (0.5, 1.5)
HUE = (-0.06, 0.06)
GAMMA = (0.7, 1.3)
DEGREES = (-15.0, 15.0)
SCALE = (0.9, 1.1)
#: A sixteenth of the image that the original pads to twice its size.
TRANSLATION = (-1 / 8, 1 / 8)
BLUR_SIGMA = (0.001, 0.5)
BLUR_KERNEL = 5
NOISE_STD = 0.005

#: What stands beyond the edge: CoTTA repeats the edge, ROID mirrors the image.
Edge = Literal["border", "reflection"]


class RandomView:
    """Draws another view of a batch at every call: colour, geometry, and CoTTA's blur and noise.

    The originals pad, move, blur and crop. Here the moved image is sampled at its final size and
    then blurred, which differs within two pixels of the edge, and a mirror repeats the edge pixel.
    """

    def __init__(
        self, seed: int, device: torch.device, *, edge: Edge, blur_and_noise: bool
    ) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._edge: Edge = edge
        self._blur_and_noise = blur_and_noise

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """A view in [0, 1] of square images in [0, 1]."""
        view = self._jittered(pixels_BCHW.clamp(0, 1))
        view = moved(
            view,
            degrees=self._uniform(*DEGREES),
            scale=self._uniform(*SCALE),
            right=self._uniform(*TRANSLATION),
            down=self._uniform(*TRANSLATION),
            edge=self._edge,
        )
        if self._blur_and_noise:
            sigma = self._uniform(*BLUR_SIGMA)
            view = TF.gaussian_blur(view, [BLUR_KERNEL, BLUR_KERNEL], [sigma, sigma])
        if self._uniform(0, 1) < 0.5:
            view = view.flip(-1)
        if self._blur_and_noise:
            noise = torch.randn(view.shape, generator=self._generator, device=view.device)
            view = view + NOISE_STD * noise
        return view.clamp(0, 1)

    def _jittered(self, view: Tensor) -> Tensor:
        steps = [
            (TF.adjust_brightness, BRIGHTNESS),
            (TF.adjust_contrast, CONTRAST),
            (TF.adjust_saturation, SATURATION),
            (TF.adjust_hue, HUE),
            (TF.adjust_gamma, GAMMA),
        ]
        order = torch.randperm(len(steps), generator=self._generator, device=self._generator.device)
        for index in order.tolist():
            adjust, between = steps[index]
            view = adjust(view, self._uniform(*between))
        return view

    def _uniform(self, low: float, high: float) -> float:
        draw = torch.rand((), generator=self._generator, device=self._generator.device)
        return low + (high - low) * float(draw)


def moved(
    pixels_BCHW: Tensor, *, degrees: float, scale: float, right: float, down: float, edge: Edge
) -> Tensor:
    """Square images turned clockwise and scaled about their centre, then shifted.

    `right` and `down` are shares of the side.
    """
    cosine = math.cos(math.radians(degrees)) / scale
    sine = math.sin(math.radians(degrees)) / scale
    # From where in the image each pixel of the view comes; the side is 2 long in these coordinates.
    inverse = torch.tensor([[cosine, sine], [-sine, cosine]], device=pixels_BCHW.device)
    origin = inverse @ torch.tensor([[-2 * right], [-2 * down]], device=pixels_BCHW.device)
    theta = torch.cat([inverse, origin], dim=1).expand(len(pixels_BCHW), -1, -1)
    grid = F.affine_grid(theta, list(pixels_BCHW.shape), align_corners=False)
    return F.grid_sample(pixels_BCHW, grid, padding_mode=edge, align_corners=False)
