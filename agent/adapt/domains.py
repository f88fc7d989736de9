"""Recognising the domain a camera is in, and returning to it at no cost.

A domain shows in an image's style long before it shows in the label. Each domain is a Gaussian over
whitened styles; each camera is followed by the forward filter of a hidden Markov model whose states
are the known domains and seldom change (Rabiner 1989, "A tutorial on hidden Markov models"), so
that one look is enough where domains differ much, and an odd frame does not count where they don't.
A new domain opens when two stretches of frames, one after the other, fit none that is known: short
ones, which tell a great change at once, or long ones, which tell a small change in time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from cachetools import Cache, LRUCache
from numpy.typing import NDArray
from torch import Tensor

from agent.adapt.style import StyleReference

Array = NDArray[np.float64]

#: The domain that the checkpoint, or the calibration, calls normal. It is never adapted to.
SOURCE = 0
#: Cameras followed at a time; the one silent for longest makes room.
MAX_CAMERAS = 10_000


@dataclass(frozen=True, slots=True)
class DomainConfig:
    """When a camera changes its domain, and what makes a new one.

    Attributes:
        hazard: chance that a camera is elsewhere with the next frame.
        trust: share of a frame's log likelihood that counts. Measures are not independent, nor
            are frames.
        tail: degrees of freedom of Student's t, in which styles are measured.
        stretches: frames that are compared with the known domains, twice as many at a time.
        radius: root mean square distance, in standard errors, within which a stretch fits a domain.
        reach: the same in standard deviations, within which a single frame looks like its domain.
        caution: a camera whose chance of being in the source domain is above this is taken to be
            there. What is normal is ruined by a correction, what is not loses a few frames' gain.
        prior: frames that a domain's variances are shrunk to their mean by.
        settled: frames that a domain is measured on. Then it stays what it is: weather that
            thickens goes on to another, and comes back to this one when it clears.
        kinship: root mean square distance, in the known one's standard deviations, within which a
            new domain is taken for a change of it.
        patience: frames in a row in another domain that make a camera's switch.
        reference_frames: frames that define the source domain when nothing was calibrated.
        max_domains: ids in use at most, the source among them; bounds memory and metrics.
    """

    hazard: float = 0.001
    trust: float = 0.25
    tail: float = 4.0
    stretches: tuple[int, ...] = (4, 8, 16, 32)
    radius: float = 1.7
    reach: float = 2.5
    caution: float = 0.1
    prior: int = 4
    settled: int = 128
    kinship: float = 1.0
    patience: int = 4
    reference_frames: int = 64
    max_domains: int = 32


@dataclass(frozen=True, slots=True)
class Assignment:
    """The domain that a frame belongs to.

    `shift` is how far its camera's last frames are from the source, in standard deviations;
    `switched` says that the camera has settled in another domain with this frame.
    """

    domain: int
    shift: float
    switched: bool = False


@dataclass(frozen=True, slots=True)
class Opening:
    """A new domain, and the known one that it looks like a change of, if there is one."""

    domain: int
    kin: int | None


#: Frames whose mean style makes the shift.
_SHIFT_FRAMES = 8
#: A domain that never varied is still not known beyond this, in variances of normal frames.
_LEAST_VARIANCE = 0.01


class _Camera:
    """Which domain it is likely in, (K,), and its last whitened styles, the newest last.

    `frames` of them belong together, as far as is known. `unfit` are domains that turned out not to
    be its own, however alike they look.
    """

    def __init__(self, domains: int, frames: int, measures: int) -> None:
        self.belief = np.zeros(domains)
        self.belief[SOURCE] = 1.0
        self.recent = np.zeros((frames, measures))
        self.owners = np.full(frames, SOURCE)  # whose statistics each has yet to join
        self.frames = 0
        self.domain = SOURCE
        self.dissent = 0
        self.unfit: set[int] = set()

    def take(self, style_S: Array) -> tuple[int, Array]:
        """Remember the newest style; the oldest, and whose it is."""
        oldest = int(self.owners[0]), self.recent[0].copy()
        self.recent[:-1], self.owners[:-1] = self.recent[1:], self.owners[1:]
        self.recent[-1], self.owners[-1] = style_S, SOURCE
        self.frames += 1
        return oldest

    def switched(self, domain: int, patience: int) -> bool:
        """Whether it has now settled in another domain than before."""
        self.dissent = 0 if domain == self.domain else self.dissent + 1
        if self.dissent < patience:
            return False
        self.domain, self.dissent = domain, 0
        self.frames = min(self.frames, patience)  # what was before is another stretch
        return True

    def leave(self, domain: int) -> None:
        """Go back to the source, as the domain is no more."""
        self.belief[SOURCE] += self.belief[domain]
        self.belief[domain] = 0
        self.owners[self.owners == domain] = SOURCE
        self.unfit.discard(domain)
        if self.domain == domain:
            self.domain, self.dissent = SOURCE, 0
            self.frames = 0  # or cameras would take ids from each other frame by frame


class _Gaussians:
    """The domains' means and variances, (K, S), one row an id; rows not in use are never read."""

    def __init__(self, config: DomainConfig, source_frames: int, measures: int) -> None:
        shape = (config.max_domains, measures)
        self._config = config
        self.known = np.zeros(config.max_domains, dtype=bool)
        self.known[SOURCE] = True
        self._mean = np.zeros(shape)
        self._raw = np.ones(shape)
        self.frames = np.ones(config.max_domains)
        self.frames[SOURCE] = source_frames
        self._variance = np.ones(shape)

    def likelihood(self, style_S: Array) -> Array:
        """Log likelihood of a style in each domain, (K,), under Student's t."""
        tail = self._config.tail
        variance = self._variance * (1 + 1 / self.frames[:, None])
        terms = np.log1p((style_S - self._mean) ** 2 / (tail * variance))
        total: Array = -(tail + 1) / 2 * terms.sum(axis=1) - 0.5 * np.log(variance).sum(axis=1)
        return np.where(self.known, total, -np.inf)

    def fits(self, stretch_NS: Array) -> bool:
        """Whether these frames may all belong to one of the domains.

        Their median, which an odd one does not move, is compared with each domain's mean. Frames
        that resemble each other more than a domain's own do, as those of a camera at rest, count
        for fewer (the ratio of von Neumann 1941).
        """
        centre = np.median(stretch_NS, axis=0)
        steps = np.square(np.diff(stretch_NS, axis=0)).mean(axis=0) / 2
        roughness = np.minimum(1, steps / self._variance).mean(axis=1)
        effective = 1 + (len(stretch_NS) - 1) * roughness
        distance = ((centre - self._mean) ** 2 / self._variance).mean(axis=1)
        errors = distance / (1 / effective + 1 / self.frames)
        return bool((errors[self.known] <= self._config.radius**2).any())

    def kin(self, stretch_NS: Array, strangers: set[int]) -> int | None:
        """The domain that these frames look like a change of, if not of the source.

        `strangers` are out of the question.
        """
        distance = np.square(np.median(stretch_NS, axis=0) - self._mean) / self._variance
        distances = np.where(self.known, distance.mean(axis=1), np.inf)
        distances[list(strangers)] = np.inf
        nearest = int(distances.argmin())
        near = distances[nearest] <= self._config.kinship**2
        return nearest if near and nearest != SOURCE else None

    def resembles(self, domain: int, style_S: Array) -> bool:
        """Whether a single frame may belong to the domain."""
        distance = (style_S - self._mean[domain]) ** 2 / self._variance[domain]
        return bool(distance.mean() <= self._config.reach**2)

    def follow(self, domain: int, style_S: Array) -> None:
        """Let a domain settle on its first frames; the source is fixed."""
        if domain == SOURCE or self.frames[domain] >= self._config.settled:
            return
        self.frames[domain] += 1
        share = 1 / self.frames[domain]
        before = style_S - self._mean[domain]
        self._mean[domain] += share * before
        after = style_S - self._mean[domain]
        self._raw[domain] += share * (before * after - self._raw[domain])
        self._shrink(domain)

    def open(self, domain: int, stretch_NS: Array) -> None:
        """Begin a domain with these frames."""
        self.known[domain] = True
        self.frames[domain] = len(stretch_NS)
        self._mean[domain] = np.median(stretch_NS, axis=0)
        squares = np.square(stretch_NS - self._mean[domain])
        # An odd frame must not make room for everything.
        usual = np.median(squares.mean(axis=1))
        self._raw[domain] = squares[squares.mean(axis=1) <= 9 * usual].mean(axis=0)
        self._shrink(domain)

    def _shrink(self, domain: int) -> None:
        share = self._config.prior / (self.frames[domain] + self._config.prior)
        raw = self._raw[domain]
        self._variance[domain] = np.maximum(raw + share * (raw.mean() - raw), _LEAST_VARIANCE)


@dataclass(slots=True)
class DomainMemory:
    """All known domains, and which of them each camera is in.

    `reference` is measured from the first frames when it is not given; until then every frame
    belongs to the source domain.
    """

    config: DomainConfig
    reference: StyleReference | None = None
    _warm_up: list[Tensor] = field(default_factory=list)
    _gaussians: _Gaussians | None = None
    _last_seen: dict[int, int] = field(default_factory=dict)
    _cameras: LRUCache[str, _Camera] = field(default_factory=lambda: LRUCache(MAX_CAMERAS))
    _clock: int = 0
    _opened: list[Opening] = field(default_factory=list)

    @property
    def domains(self) -> list[int]:
        """Ids of all domains, the source first."""
        return [SOURCE, *sorted(self._last_seen)]

    def opened(self) -> list[Opening]:
        """Domains opened since the last call; what was learned under their ids before is void."""
        opened, self._opened = self._opened, []
        return opened

    def split(self, name: str, domain: int) -> bool:
        """Begin a domain with a camera's last frames, since `domain` turned out not to be theirs.

        False where the camera has left it already, or too few frames are known.
        """
        camera = self._cameras.get(name)
        if camera is None or self._gaussians is None or int(camera.belief.argmax()) != domain:
            return False
        frames = min(camera.frames, max(self.config.stretches))
        if frames < min(self.config.stretches):
            return False
        camera.unfit.add(domain)
        # What was wrong for these frames is their kin's, too.
        own = self._open(camera, self._gaussians, camera.recent[-frames:], inherits=False)
        camera.domain, camera.dissent = own, 0
        return True

    def assign(self, cameras: tuple[str, ...], styles_BS: Tensor) -> list[Assignment]:
        """Follow each frame's camera; frames are taken in order."""
        return [
            self._assign(camera, style_S)
            for camera, style_S in zip(cameras, styles_BS.cpu(), strict=True)
        ]

    def _assign(self, name: str, style_S: Tensor) -> Assignment:
        self._clock += 1
        if not bool(torch.isfinite(style_S).all()):
            return Assignment(SOURCE, 0.0)
        if self.reference is None:
            self._warm_up.append(style_S)
            if len(self._warm_up) >= self.config.reference_frames:
                self.reference = StyleReference.of(torch.stack(self._warm_up))
                self._warm_up.clear()
            return Assignment(SOURCE, 0.0)
        if self._gaussians is None:
            self._gaussians = _Gaussians(self.config, self.reference.frames, len(style_S))
        camera = self._cameras.get(name)
        if camera is None:
            length = 2 * max(self.config.stretches)
            camera = self._cameras[name] = _Camera(self.config.max_domains, length, len(style_S))

        white_S = self.reference.whitened(style_S).double().numpy()
        self._gaussians.follow(*camera.take(white_S))
        self._filter(camera, self._gaussians, white_S)
        strangers_NS = self._strangers(camera, self._gaussians)
        if strangers_NS is not None and self.config.max_domains > 1:
            self._open(camera, self._gaussians, strangers_NS)
        normal = camera.belief[SOURCE] > self.config.caution
        likely = SOURCE if normal else int(camera.belief.argmax())
        # A frame that does not look like its domain is answered as if nothing were known of it.
        domain = likely if self._gaussians.resembles(likely, white_S) else SOURCE
        if domain != SOURCE:
            self._last_seen[domain] = self._clock
            # A young domain needs every frame. One that is known well waits until it is plain that
            # they are no stranger's, or it would follow the stranger and never tell.
            if self._gaussians.frames[domain] < len(camera.owners):
                self._gaussians.follow(domain, white_S)
            else:
                camera.owners[-1] = domain
        present = camera.recent[-min(camera.frames, _SHIFT_FRAMES) :].mean(axis=0)
        shift = float(np.sqrt(np.square(present).mean()))
        return Assignment(domain, shift, camera.switched(likely, self.config.patience))

    def _filter(self, camera: _Camera, gaussians: _Gaussians, white_S: Array) -> None:
        """One step of the forward algorithm."""
        known, hazard = gaussians.known.copy(), self.config.hazard
        known[list(camera.unfit)] = False
        prior = (1 - hazard) * camera.belief + hazard * known / known.sum()
        evidence = np.where(known, self.config.trust * gaussians.likelihood(white_S), -np.inf)
        belief = prior * np.exp(evidence - evidence.max())
        total = belief.sum()
        # Where the camera was sure of what is now impossible, nothing is left to go by.
        camera.belief = belief / total if total > 0 else known / known.sum()

    def _strangers(self, camera: _Camera, gaussians: _Gaussians) -> Array | None:
        """The last frames (N, S), where they and as many before belong to no known domain."""
        for length in self.config.stretches:
            if camera.frames < 2 * length or camera.frames % max(1, length // 4):
                continue
            later, earlier = camera.recent[-length:], camera.recent[-2 * length : -length]
            if not gaussians.fits(later) and not gaussians.fits(earlier):
                return later
        return None

    def _open(
        self, camera: _Camera, gaussians: _Gaussians, stretch_NS: Array, *, inherits: bool = True
    ) -> int:
        """A new domain; when all ids are taken, the one unseen for longest gives its id up."""
        free = set(range(SOURCE + 1, self.config.max_domains)) - self._last_seen.keys()
        if free:
            domain = min(free)
        else:
            domain = min(self._last_seen, key=self._last_seen.__getitem__)
            for name in list(self._cameras):
                # Past the LRU: nobody was seen.
                Cache.__getitem__(self._cameras, name).leave(domain)
        kin = gaussians.kin(stretch_NS, camera.unfit | {domain}) if inherits else None
        gaussians.open(domain, stretch_NS)
        camera.unfit.discard(domain)
        camera.belief[:] = 0
        camera.belief[domain] = 1
        camera.owners[-2 * len(stretch_NS) :] = SOURCE
        camera.frames = len(stretch_NS)
        self._last_seen[domain] = self._clock
        self._opened.append(Opening(domain, kin))
        return domain
