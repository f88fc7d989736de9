"""Follows every camera and every site, and tells their scores and when they begin to drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from cachetools import LRUCache
from torch import Tensor

from agent.adapt.strategy import entropy
from agent.drift.change import Adwin, ChangePolicy, PageHinkleyTest, Ranks, watch
from agent.drift.news import News
from agent.drift.reading import DETECTORS, Reading, Scope
from agent.drift.seen import Seen
from agent.drift.sites import site_of
from agent.drift.statistics import DriftReference, Statistics
from agent.drift.threshold import STRIDE, Limit, limits
from agent.drift.window import Window

#: Frames that define normal when nothing was calibrated.
WARM_UP = 256
#: Cameras, and sites, followed at a time; the one silent for longest makes room. Each costs tens of
#: kilobytes. A batch has no more frames than this, so that none of its own is crowded out.
MAX_FOLLOWED = 4096
#: A site's window is so many times a camera's: what all its cameras share shows when their own
#: chance is averaged out, and what is too small for a camera's window shows in time.
SITE_WINDOWS = 4


@dataclass(frozen=True, slots=True)
class DriftPolicy:
    """How drift is measured.

    Attributes:
        window: effective frames of a camera's window.
        false_alarm_every: frames between two false alarms of a detector, on average.
        site: of cameras whose id names none.
    """

    window: int = 64
    false_alarm_every: int = 1_000_000
    site: str = "default"


@dataclass(slots=True)
class _Stream:
    """A camera's or a site's window, what it was read at, and what stands above its threshold."""

    window: Window
    changes: dict[str, Adwin | PageHinkleyTest]
    read_at: int = 0
    above: set[str] = field(default_factory=set)


class _Normal:
    """What frames are compared with, and from where on they differ."""

    def __init__(
        self,
        reference: DriftReference,
        text_KD: Tensor,
        policy: DriftPolicy,
        windows: dict[Scope, int],
        generator: torch.Generator,
    ) -> None:
        self.statistics = Statistics(reference, text_KD, generator)
        vectors_NP = self.statistics.of(
            reference.features_ND, reference.probabilities_NK, reference.styles_NS
        )
        self.mean_P = vectors_NP.mean(dim=0)
        self.limits: dict[Scope, dict[str, Limit]] = {
            scope: limits(
                vectors_NP, self.statistics.scores, window, policy.false_alarm_every, generator
            )
            for scope, window in windows.items()
        }
        self.entropies = Ranks(entropy(reference.probabilities_NK))
        self.energies = Ranks(reference.energies_N)


class DriftMonitor:
    """Windows of recent frames compared with the reference; change points of the answers."""

    def __init__(
        self,
        policy: DriftPolicy,
        reference: DriftReference | None,
        text_KD: Tensor,
        generator: torch.Generator,
    ) -> None:
        """`text_KD` are the labels' unit text features.

        Without a reference the first `WARM_UP` frames are normal.
        """
        self._policy = policy
        self._text_KD = text_KD.detach().float().cpu()
        self._generator = generator
        self._windows = {Scope.CAMERA: policy.window, Scope.SITE: SITE_WINDOWS * policy.window}
        self._changes = ChangePolicy(policy.false_alarm_every, policy.window)
        self._change_thresholds = self._changes.thresholds()
        self._warm_up: list[Seen] = []
        self._news = News(MAX_FOLLOWED)
        self._streams: dict[Scope, LRUCache[str, _Stream]] = {
            scope: LRUCache(MAX_FOLLOWED) for scope in Scope
        }
        self._normal = self._adopted(reference) if reference is not None else None

    def site_of(self, camera: str) -> str:
        """The site that a camera's frames count for."""
        return site_of(camera, self._policy.site)

    def observe(self, cameras: Sequence[str], seen: Seen) -> list[Reading]:
        """Take in a batch; the readings that fell due.

        Frames with numbers that are not finite are left out, and so are most that show what the
        camera's last one did.
        """
        rows, seen = seen.finite()
        names = [cameras[row] for row in rows]
        news = self._news.rows(names, seen.features_BD)
        if not news:
            return []
        names, seen = [names[row] for row in news], seen.of(news)
        rows_of = {Scope.CAMERA: _grouped(names, str), Scope.SITE: _grouped(names, self.site_of)}
        readings = [reading for scope in Scope for reading in self._begun(scope, rows_of[scope])]
        if self._normal is None:
            self._normal = self._warmed_up(seen)
            return readings
        vectors_BP = self._normal.statistics.of(seen.features_BD, seen.zero_shot_BK, seen.styles_BS)
        readings += self._changed(rows_of[Scope.CAMERA], seen, self._normal)
        for scope in Scope:
            due = []
            for name, own in rows_of[scope].items():
                stream = self._streams[scope][name]
                stream.window.take(vectors_BP[own])
                if stream.window.is_full and stream.window.seen - stream.read_at >= STRIDE:
                    stream.read_at = stream.window.seen
                    due.append((name, stream))
            readings += self._read(scope, due, self._normal)
        return readings

    def _begun(self, scope: Scope, names: Iterable[str]) -> list[Reading]:
        """Begin to follow those that are new; their scores are not a number yet."""
        # Looking each up keeps it: a newcomer takes the place of a camera that is not in the batch.
        new = [name for name in names if self._streams[scope].get(name) is None]
        for name in new:
            changes = self._changes.detectors() if scope is Scope.CAMERA else {}
            self._streams[scope][name] = _Stream(Window(self._windows[scope]), changes)
        return [
            Reading(scope, name, detector, math.nan, self._threshold(scope, detector), began=False)
            for name in new
            for detector in DETECTORS[scope]
        ]

    def _threshold(self, scope: Scope, detector: str) -> float:
        """Not a number while it is not known what is normal."""
        if detector in self._change_thresholds:
            return self._change_thresholds[detector]
        return self._normal.limits[scope][detector].threshold if self._normal else math.nan

    def _changed(self, rows_of: dict[str, list[int]], seen: Seen, normal: _Normal) -> list[Reading]:
        """Change points of each camera's entropy, energy and agreement."""
        entropies = normal.entropies.of(entropy(seen.adapted_BK))
        energies = normal.energies.of(seen.energies_B)
        agree = (seen.adapted_BK.argmax(-1) == seen.zero_shot_BK.argmax(-1)).tolist()
        signals = [
            {"entropy": spread, "energy": strangeness, "agreement": float(same)}
            for spread, strangeness, same in zip(entropies, energies, agree, strict=True)
        ]
        readings = []
        for name, rows in rows_of.items():
            detectors = self._streams[Scope.CAMERA][name].changes
            found = watch(detectors, [signals[row] for row in rows])
            readings += [
                Reading(
                    Scope.CAMERA,
                    name,
                    detector,
                    each.score,
                    self._threshold(Scope.CAMERA, detector),
                    detector in found,
                )
                for detector, each in detectors.items()
            ]
        return readings

    def _read(
        self, scope: Scope, due: Sequence[tuple[str, _Stream]], normal: _Normal
    ) -> list[Reading]:
        """Compare the windows that are due with the reference, all at once."""
        means = [s.window.mean_P for _, s in due if s.window.mean_P is not None]
        if not means:
            return []
        scores = normal.statistics.scores(torch.stack(means), normal.mean_P)
        readings = []
        for detector, values in scores.items():
            limit = normal.limits[scope][detector]
            for (name, stream), score in zip(due, values.tolist(), strict=True):
                if not math.isfinite(score):
                    continue
                began = score > limit.threshold and detector not in stream.above
                if began:
                    stream.above.add(detector)
                elif score < limit.rearm:
                    stream.above.discard(detector)
                readings.append(Reading(scope, name, detector, score, limit.threshold, began))
        return readings

    def _warmed_up(self, seen: Seen) -> _Normal | None:
        self._warm_up.append(seen)
        if sum(len(each.features_BD) for each in self._warm_up) < WARM_UP:
            return None
        reference = DriftReference(
            torch.cat([each.features_BD for each in self._warm_up])[:WARM_UP],
            torch.cat([each.zero_shot_BK for each in self._warm_up])[:WARM_UP],
            torch.cat([each.styles_BS for each in self._warm_up])[:WARM_UP],
            torch.cat([each.energies_B for each in self._warm_up])[:WARM_UP],
        )
        self._warm_up.clear()
        return self._adopted(reference)

    def _adopted(self, reference: DriftReference) -> _Normal:
        return _Normal(reference, self._text_KD, self._policy, self._windows, self._generator)


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[int]]:
    """The rows of each name's key, in order."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(key(name), []).append(row)
    return rows
