"""Notices a camera whose frames are not of the domain they were taken for.

Styles tell domains apart at nearly no cost, but not always; and pictures that get the correction of
another domain are answered worse than with none. The answers show it: they say much less of the
frames than the domain's answers usually do. But so do those of a camera that looks at one thing for
a while. Suspicious frames are therefore encoded by the source model as well. The correction is
another domain's if the plain answers say much more and are also surer one by one: right answers on
one thing say less than wrong ones that differ, but are surer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachetools import LRUCache
from torch import Tensor

from agent.adapt.strategy import entropy

#: Cameras in domains watched at a time; each costs a few vectors as long as the label list.
MAX_WATCHED = 1024


@dataclass(frozen=True, slots=True)
class FitConfig:
    """When a camera's frames do not fit its domain.

    Attributes:
        frames: answers that are weighed at a time.
        drop: share of the information that must be missing.
        least: nats that must be missing, since of nothing a share is chance.
        memory: windows of which the usual information is a running mean.
    """

    frames: int = 16
    drop: float = 0.2
    least: float = 0.05
    memory: int = 16


class _Window:
    """Mutual information of frames and answers in nats, taken in frame by frame."""

    def __init__(self) -> None:
        self.sum_K: Tensor | None = None
        self.entropy = 0.0
        self.frames = 0

    def add(self, probabilities_K: Tensor, entropy: float) -> None:
        self.sum_K = probabilities_K.clone() if self.sum_K is None else self.sum_K + probabilities_K
        self.entropy += entropy
        self.frames += 1

    @property
    def vagueness(self) -> float:
        return self.entropy / max(1, self.frames)

    @property
    def information(self) -> float:
        if self.sum_K is None:
            return 0.0
        return float(entropy(self.sum_K / self.frames)) - self.vagueness


class _Watched:
    """A camera in a domain."""

    def __init__(self) -> None:
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
        self._watched: LRUCache[tuple[str, int], _Watched] = LRUCache(MAX_WATCHED)

    def is_suspect(self, camera: str, domain: int) -> bool:
        """Whether this camera's frames should be encoded by the source model as well."""
        watched = self._watched.get((camera, domain))
        return watched is not None and watched.is_suspect

    def observe(self, cameras: Sequence[str], domains: Sequence[int], answers_BK: Tensor) -> None:
        """Take in the probabilities of corrected frames."""
        vagueness = entropy(answers_BK).tolist()  # at once: a GPU would wait at each frame
        for camera, domain, answer_K, nats in zip(
            cameras, domains, answers_BK, vagueness, strict=True
        ):
            watched = self._watched.setdefault((camera, domain), _Watched())
            watched.answers.add(answer_K, nats)
            if watched.answers.frames >= self._config.frames:
                self._weigh(watched, domain)

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
        vagueness = zip(entropy(corrected_BK).tolist(), entropy(plain_BK).tolist(), strict=True)
        for camera, domain, corrected_K, plain_K, (corrected, plain) in zip(
            cameras, domains, corrected_BK, plain_BK, vagueness, strict=True
        ):
            watched = self._watched.setdefault((camera, domain), _Watched())
            watched.corrected.add(corrected_K, corrected)
            watched.plain.add(plain_K, plain)
            if watched.plain.frames < self._config.frames:
                continue
            if (
                self._says_less(watched.corrected.information, watched.plain.information)
                and watched.corrected.vagueness > watched.plain.vagueness
            ):
                strangers[camera] = domain
                self._watched.pop((camera, domain))
            elif watched.is_suspect:
                watched.is_suspect = False
                watched.pause = 2**watched.unfounded
                watched.unfounded += 1
            watched.corrected, watched.plain = _Window(), _Window()
        return strangers

    def forget(self, domain: int) -> None:
        """The domain is corrected otherwise from now on, or is another."""
        self._usual.pop(domain, None)
        for key in list(self._watched):
            if key[1] == domain:
                self._watched.pop(key)

    def _weigh(self, watched: _Watched, domain: int) -> None:
        said, watched.answers = watched.answers.information, _Window()
        usual = self._usual.setdefault(domain, said)
        if not self._says_less(said, usual):
            self._usual[domain] = usual + (said - usual) / self._config.memory
        elif watched.pause > 0:
            watched.pause -= 1
        elif not watched.is_suspect:
            watched.is_suspect = True
            watched.corrected, watched.plain = _Window(), _Window()

    def _says_less(self, said: float, expected: float) -> bool:
        return expected - said > max(self._config.least, self._config.drop * expected)
