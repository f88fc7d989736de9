"""What an image looks like, apart from what it shows: the statistics by which domains differ.

Level, contrast and colour; the energy of fine and coarse detail, whose slope tells noise from blur
from fog; how peaked detail is, which tells single bad pixels from noise everywhere; which way
edges run and where they are sharp, which tells blurs from each other; blocks of eight, flat and
saturated pixels, for compression and exposure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Measures in a style.
MEASURES = 20
#: How much of the covariance of normal styles is taken for chance at least, and so how much of it
#: is replaced by independence (Ledoit & Wolf 2004 shrink likewise); more where there are few.
SHRINKAGE = 0.1


def style(pixels_BCHW: Tensor) -> Tensor:
    """Style of images in [0, 1]: shape (B, 20), float32.

    Colours are opponent: grey, red-green, yellow-blue. The finest detail is measured in the central
    quarter of the image, the rest in the whole at half its size.
    """
    pixels_BCHW = pixels_BCHW.float()
    side = pixels_BCHW.shape[-1]
    edge = side // 4 // 8 * 8  # on the grid of JPEG's blocks
    raw = pixels_BCHW[..., edge : edge + side // 2, edge : edge + side // 2].contiguous()
    half = _opponent(F.avg_pool2d(pixels_BCHW, 2))
    grey = half[:, 0]
    detail, _ = _split(_grey(raw))
    coarser, grey_2 = _split(grey)
    coarse, grey_4 = _split(grey_2)
    coarsest, _ = _split(grey_4)
    measures = [half.mean(dim=(2, 3)), _log(_deviation(half))]
    measures += [_log(_size(each))[:, None] for each in (detail, coarser, coarse, coarsest)]
    measures += [_peakedness(detail), _peakedness(coarser), _centre(coarser)]
    measures += [_directions(grey), _blocks(_grey(raw))]
    dark, bright = raw < 1 / 510, raw > 1 - 1 / 510
    measures += [_log(each.float().mean(dim=(1, 2, 3)))[:, None] for each in (dark, bright)]
    return torch.cat(measures, dim=1)


@dataclass(frozen=True, slots=True)
class StyleReference:
    """The styles of normal frames: mean (S,), what whitens (S, S), and how many frames there were.

    Whitened, normal styles have mean zero, variance one, and are all but uncorrelated; distances
    are then Mahalanobis's (1936).
    """

    mean: Tensor
    whitening: Tensor
    frames: int

    @classmethod
    def of(cls, styles_NS: Tensor) -> StyleReference:
        """Measure the styles of normal frames."""
        styles_NS = styles_NS.double()
        mean = styles_NS.mean(dim=0)
        unit = styles_NS.std(dim=0).clamp_min(1e-2)
        standard = (styles_NS - mean) / unit
        correlation = torch.cov(standard.T)
        independent = torch.eye(len(mean), dtype=correlation.dtype)
        share = max(SHRINKAGE, len(mean) / (len(mean) + 2 * len(styles_NS)))
        correlation = torch.lerp(correlation, independent, share)
        root = torch.linalg.cholesky(torch.linalg.inv(correlation))
        # Few frames vary less along the axes that were fitted to them than others will.
        floor = min(1.0, 0.5 + len(mean) / len(styles_NS))
        root = root / (standard @ root).std(dim=0).clamp_min(floor)
        return cls(mean.float(), (root / unit[:, None]).float(), len(styles_NS))

    def to(self, device: torch.device) -> StyleReference:
        """The same on another device."""
        return StyleReference(self.mean.to(device), self.whitening.to(device), self.frames)

    def whitened(self, styles_BS: Tensor) -> Tensor:
        """Styles in units of chance, (B, S)."""
        return (styles_BS - self.mean) @ self.whitening


def _grey(pixels_BCHW: Tensor) -> Tensor:
    return pixels_BCHW.mean(dim=1)


def _opponent(pixels_BCHW: Tensor) -> Tensor:
    red, green, blue = pixels_BCHW.unbind(1)
    return torch.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], dim=1)


def _split(octave: Tensor) -> tuple[Tensor, Tensor]:
    """The detail of an octave (B, H, W), and what is left at half its size."""
    smooth = F.avg_pool2d(octave, 2)
    images, height, width = smooth.shape
    even = octave[:, : 2 * height, : 2 * width]
    blocks = even.reshape(images, height, 2, width, 2) - smooth[:, :, None, :, None]
    return blocks.view(images, 2 * height, 2 * width), smooth


def _deviation(channels: Tensor) -> Tensor:
    """Standard deviation per channel, (B, C)."""
    centred = channels - channels.mean(dim=(2, 3), keepdim=True)
    return torch.stack([_size(channel) for channel in centred.unbind(1)], dim=1)


def _size(detail: Tensor) -> Tensor:
    """Root mean square of (B, H, W)."""
    norm: Tensor = torch.linalg.vector_norm(detail.flatten(1), dim=1)
    size: Tensor = norm / detail[0].numel() ** 0.5
    return size


def _peakedness(detail: Tensor) -> Tensor:
    """Mean size over root mean square: small when few values are large."""
    mean_size = torch.linalg.vector_norm(detail.flatten(1), ord=1, dim=1) / detail[0].numel()
    return (_log(mean_size) - _log(_size(detail)))[:, None]


def _centre(detail: Tensor) -> Tensor:
    """How much sharper the middle is than the whole: zoom blur spares it."""
    size = detail.abs()
    quarter = size.shape[-1] // 4
    middle = size[:, quarter : size.shape[1] - quarter, quarter : size.shape[2] - quarter]
    return (_log(middle.mean(dim=(1, 2))) - _log(size.mean(dim=(1, 2))))[:, None]


def _directions(grey: Tensor) -> Tensor:
    """Which way edges run: across against down, and one diagonal against the other."""
    across = grey[:, :, 1:] - grey[:, :, :-1]
    down = grey[:, 1:] - grey[:, :-1]
    falling = grey[:, 1:, 1:] - grey[:, :-1, :-1]
    rising = grey[:, 1:, :-1] - grey[:, :-1, 1:]
    sizes = [_log(each.abs().mean(dim=(1, 2))) for each in (across, down, falling, rising)]
    return torch.stack([sizes[0] - sizes[1], sizes[2] - sizes[3]], dim=1)


def _blocks(grey: Tensor) -> Tensor:
    """Fine edges across against down; edges on JPEG's grid against off it; pixels without edge."""
    across = (grey[:, :, 1:] - grey[:, :, :-1]).abs()
    down = (grey[:, 1:] - grey[:, :-1]).abs()
    columns = across.mean(dim=1)
    on_grid, off_grid = columns[:, 7::8].mean(dim=1), columns[:, 3::8].mean(dim=1)
    flat = (across < 1 / 512).float().mean(dim=(1, 2))
    direction = _log(across.mean(dim=(1, 2))) - _log(down.mean(dim=(1, 2)))
    return torch.stack([direction, _log(on_grid) - _log(off_grid), flat], dim=1)


def _log(x: Tensor) -> Tensor:
    return torch.log(x + 1e-3)
