"""Recognising the domain a camera is in, and returning to it at no cost.

A domain shows in simple image statistics long before it shows in the label: the level, contrast
and colour of the pixels and the energy at fine scales. `style` measures these per image. The
memory keeps one centroid per domain; each camera is followed with hysteresis, so that a single odd
frame does not switch its domain and a new domain opens only when many frames in a row fit none.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cachetools import LRUCache
from torch import Tensor

#: The domain that the checkpoint, or the calibration, calls normal. It is never adapted to.
SOURCE = 0
#: Cameras followed at a time; the one silent for longest makes room.
MAX_CAMERAS = 10_000


def style(pixels_BCHW: Tensor) -> Tensor:
    """Style of images in [0, 1]: shape (B, 20), float32.

    Per opponent channel (grey, red-green, yellow-blue): mean and log standard deviation of the
    pixels; then, for grey at four octaves and for colour at two, the log energy of the difference
    between an image and its blurred self, whose slope tells noise from blur from fog; the darkest
    and brightest deciles; and the energy of blocks of eight against its neighbours, for JPEG.
    """
    red, green, blue = pixels_BCHW.float().unbind(1)
    opponent = torch.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], dim=1)
    level = opponent.mean(dim=(2, 3))
    spread = _log(opponent.std(dim=(2, 3)))
    bands = []
    octave = opponent
    for depth in range(4):
        smooth = F.avg_pool2d(octave, 2)
        detail = octave - F.interpolate(smooth, size=octave.shape[-2:], mode="nearest")
        energy = _log(detail.std(dim=(2, 3)))
        bands.append(energy if depth < 2 else energy[:, :1])
        octave = smooth
    grey = opponent[:, 0, ::4, ::4].flatten(1)
    ends = torch.quantile(grey, torch.tensor([0.05, 0.25, 0.75, 0.95], device=grey.device), dim=1)
    across = (opponent[:, 0, :, 1:] - opponent[:, 0, :, :-1]).abs().mean(dim=1)
    on_grid = across[:, 7::8].mean(dim=1)
    off_grid = across[:, 3::8].mean(dim=1)
    blocks = (_log(on_grid) - _log(off_grid))[:, None]
    flat = (across < 1 / 512).float().mean(dim=1)[:, None]
    return torch.cat([level, spread, *bands, ends.T, blocks, flat], dim=1)


def _log(x: Tensor) -> Tensor:
    return torch.log(x + 1e-3)


@dataclass(frozen=True, slots=True)
class StyleReference:
    """Mean (S,) and standard deviation (S,) of the style of normal frames."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, styles_NS: Tensor) -> StyleReference:
        """Measure the styles of normal frames."""
        return cls(styles_NS.mean(dim=0), styles_NS.std(dim=0).clamp_min(1e-2))


@dataclass(frozen=True, slots=True)
class DomainConfig:
    """When a camera changes its domain.

    Attributes:
        window: frames whose mean style stands for the camera's present.
        radius: root mean square distance, in standard deviations of single normal frames, within
            which a window belongs to a domain.
        patience: frames in a row that must disagree before a camera switches.
        reference_frames: frames that define the source domain when nothing was calibrated.
        max_domains: ids in use at most, the source among them; bounds memory and metrics.
    """

    window: int = 8
    radius: float = 0.9
    patience: int = 6
    reference_frames: int = 64
    max_domains: int = 16


@dataclass(slots=True)
class _Camera:
    recent: deque[Tensor]
    domain: int = SOURCE
    dissent: int = 0


@dataclass(frozen=True, slots=True)
class Assignment:
    """A frame's domain: its camera's, or the source if the frame looks more like that.

    `shift` is how far its camera's present is from the source, in standard deviations; `switched`
    says that the camera changed its domain with this frame.
    """

    domain: int
    shift: float
    switched: bool = False


@dataclass(slots=True)
class _Centroid:
    mean: Tensor
    frames: int
    last_seen: int


@dataclass(slots=True)
class DomainMemory:
    """All known domains, and which of them each camera is in.

    `reference` is measured from the first frames when it is not given; until then every frame
    belongs to the source domain.
    """

    config: DomainConfig
    reference: StyleReference | None = None
    _warm_up: list[Tensor] = field(default_factory=list)
    _centroids: dict[int, _Centroid] = field(default_factory=dict)
    _cameras: LRUCache[str, _Camera] = field(default_factory=lambda: LRUCache(MAX_CAMERAS))
    _clock: int = 0
    _opened: list[int] = field(default_factory=list)

    @property
    def domains(self) -> list[int]:
        """Ids of all domains, the source first."""
        return [SOURCE, *self._centroids]

    def opened(self) -> list[int]:
        """Domains opened since the last call; what was learned under their ids before is void."""
        opened, self._opened = self._opened, []
        return opened

    def assign(self, cameras: tuple[str, ...], styles_BS: Tensor) -> list[Assignment]:
        """Follow each frame's camera; frames are taken in order."""
        return [
            self._assign(camera, style_S)
            for camera, style_S in zip(cameras, styles_BS.cpu(), strict=True)
        ]

    def _assign(self, camera: str, style_S: Tensor) -> Assignment:
        self._clock += 1
        if self.reference is None:
            self._warm_up.append(style_S)
            if len(self._warm_up) >= self.config.reference_frames:
                self.reference = StyleReference.of(torch.stack(self._warm_up))
                self._warm_up.clear()
            return Assignment(SOURCE, 0.0)
        state = self._cameras.get(camera)
        if state is None:
            state = self._cameras[camera] = _Camera(deque(maxlen=self.config.window))
        before = state.domain
        white_S = (style_S - self.reference.mean) / self.reference.deviation
        state.recent.append(white_S)
        present_S = torch.stack(list(state.recent)).mean(dim=0)
        nearest, distance = self._nearest(present_S)
        fits = distance <= self.config.radius
        if fits and nearest == state.domain:
            state.dissent = 0
            self._follow(nearest, white_S)
        else:
            state.dissent += 1
            full = len(state.recent) == self.config.window
            if full and state.dissent >= self.config.patience:
                # Has the camera left? What came before the change must not blur the centroid, and
                # the median does not follow an odd frame that moves the mean of a whole window.
                tail = torch.stack(list(state.recent)[-self.config.patience :]).quantile(0.5, dim=0)
                nearest, distance = self._nearest(tail)
                if distance > self.config.radius and self.config.max_domains > 1:
                    nearest = self._open(tail)
                state.domain = nearest
                state.dissent = 0
        shift = float(present_S.square().mean().sqrt())
        switched = state.domain != before
        return Assignment(self._domain_of(white_S, state.domain), shift, switched)

    def _domain_of(self, white_S: Tensor, domain: int) -> int:
        """The camera's domain, or the source if the frame looks more like that: do no harm."""
        if domain == SOURCE:
            return SOURCE
        stranger = (white_S - self._centroids[domain].mean).norm() > white_S.norm()
        return SOURCE if bool(stranger) else domain

    def _nearest(self, present_S: Tensor) -> tuple[int, float]:
        """The closest domain and its root mean square distance."""
        best, distance = SOURCE, float(present_S.square().mean().sqrt())
        for domain, centroid in self._centroids.items():
            other = float((present_S - centroid.mean).square().mean().sqrt())
            if other < distance:
                best, distance = domain, other
        return best, distance

    def _follow(self, domain: int, white_S: Tensor) -> None:
        """Let a domain's centroid settle; the source's is fixed."""
        if domain != SOURCE:
            centroid = self._centroids[domain]
            centroid.frames = min(centroid.frames + 1, 256)
            centroid.mean = centroid.mean + (white_S - centroid.mean) / centroid.frames
            centroid.last_seen = self._clock

    def _open(self, present_S: Tensor) -> int:
        """A new domain; when all ids are taken, the one unseen for longest gives its id up."""
        free = [d for d in range(SOURCE + 1, self.config.max_domains) if d not in self._centroids]
        if free:
            domain = free[0]
        else:
            domain = min(self._centroids, key=lambda d: self._centroids[d].last_seen)
            for camera in self._cameras.values():
                if camera.domain == domain:
                    camera.domain = SOURCE
        self._centroids[domain] = _Centroid(present_S, self.config.patience, self._clock)
        self._opened.append(domain)
        return domain
