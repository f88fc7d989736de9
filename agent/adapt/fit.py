"""Notices a camera whose frames are not of the domain they were taken for.

Styles tell domains apart at nearly no cost, but not always; and pictures that get the correction of
another domain are answered worse than with none. The answers show it: they say much less of the
frames than the domain's answers usually do. But so do those of a camera that looks at one thing for
a while. Suspicious frames are therefore encoded by the source model as well, where what they show
cancels: if the uncorrected answers say much more, the correction is another domain's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachetools import LRUCache
from torch import Tensor

from agent.adapt.strategy import entropy

#: Cameras watched at a time; each costs a few vectors as long as the label list.
MAX_CAMERAS = 1024


@dataclass(frozen=True, slots=True)
class FitConfig:
    """When a camera's frames do not fit its domain.

    Attributes:
        frames: answers that are weighed at a time.
        drop: share of the usual information that must be missing.
        memory: windows of which the usual information is a running mean.
    """

    frames: int = 16
    drop: float = 0.2
    memory: int = 16


class _Window:
    """Mutual information of frames and answers in nats, taken in frame by frame."""

    def __init__(self) -> None:
        self.sum_K: Tensor | None = None
        self.entropy = 0.0
        self.frames = 0

    def add(self, probabilities_K: Tensor) -> None:
        self.sum_K = probabilities_K.clone() if self.sum_K is None else self.sum_K + probabilities_K
        self.entropy += float(entropy(probabilities_K))
        self.frames += 1

    @property
    def information(self) -> float:
        if self.sum_K is None:
            return 0.0
        return float(entropy(self.sum_K / self.frames)) - self.entropy / self.frames


class _Camera:
    def __init__(self, domain: int) -> None:
        self.domain = domain
        self.answers = _Window()
        self.corrected, self.plain = _Window(), _Window()  # of the same frames
        self.is_suspect = False
        self.pause = 0  # windows that are let pass
        self.unfounded = 0  # suspicions so far


class Fit:
    """What each domain's answers usually say, and which cameras' say less."""

    def __init__(self, config: FitConfig) -> None:
        self._config = config
        self._usual: dict[int, float] = {}
        self._cameras: LRUCache[str, _Camera] = LRUCache(MAX_CAMERAS)

    def is_suspect(self, camera: str) -> bool:
        """Whether this camera's frames should be encoded by the source model as well."""
        watched = self._cameras.get(camera)
        return watched is not None and watched.is_suspect

    def observe(self, cameras: Sequence[str], domains: Sequence[int], answers_BK: Tensor) -> None:
        """Take in the probabilities of corrected frames."""
        for camera, domain, answer_K in zip(cameras, domains, answers_BK, strict=True):
            watched = self._watched(camera, domain)
            watched.answers.add(answer_K)
            if watched.answers.frames >= self._config.frames:
                self._weigh(watched)

    def compare(
        self,
        cameras: Sequence[str],
        domains: Sequence[int],
        corrected_BK: Tensor,
        plain_BK: Tensor,
    ) -> dict[str, int]:
        """Take in frames answered both ways; the cameras that are in a domain not theirs, and it.

        Those are watched anew.
        """
        strangers: dict[str, int] = {}
        for camera, domain, corrected_K, plain_K in zip(
            cameras, domains, corrected_BK, plain_BK, strict=True
        ):
            watched = self._watched(camera, domain)
            watched.corrected.add(corrected_K)
            watched.plain.add(plain_K)
            if watched.plain.frames < self._config.frames:
                continue
            if watched.corrected.information < (1 - self._config.drop) * watched.plain.information:
                strangers[camera] = domain
                self._cameras.pop(camera)
            elif watched.is_suspect:
                watched.is_suspect = False
                watched.pause = 2**watched.unfounded
                watched.unfounded += 1
            watched.corrected, watched.plain = _Window(), _Window()
        return strangers

    def forget(self, domain: int) -> None:
        """The domain is corrected otherwise from now on, or is another."""
        self._usual.pop(domain, None)
        for camera in [name for name, seen in self._cameras.items() if seen.domain == domain]:
            self._cameras.pop(camera)

    def _watched(self, camera: str, domain: int) -> _Camera:
        watched = self._cameras.get(camera)
        if watched is None or watched.domain != domain:
            watched = self._cameras[camera] = _Camera(domain)
        return watched

    def _weigh(self, watched: _Camera) -> None:
        said, watched.answers = watched.answers.information, _Window()
        usual = self._usual.setdefault(watched.domain, said)
        if said >= (1 - self._config.drop) * usual:
            self._usual[watched.domain] = usual + (said - usual) / self._config.memory
        elif watched.pause > 0:
            watched.pause -= 1
        elif not watched.is_suspect:
            watched.is_suspect = True
            watched.corrected, watched.plain = _Window(), _Window()
