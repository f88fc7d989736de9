"""Watches the adapted predictions beside the frozen ones, and calls for a reset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from agent.adapt.strategy import entropy


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """When a domain's adaptation has gone wrong.

    Attributes:
        frames: the horizon of the running averages; nothing is judged before as many were seen.
        min_marginal_entropy: of the adapted predictions, relative to the frozen ones'. Far below 1
            the adapted model answers the same whatever it sees.
        min_agreement: share of frames on which adapted and frozen name the same label.
        max_distance: of the adapter from its source, relative to the source's norm.
    """

    frames: int = 64
    min_marginal_entropy: float = 0.5
    min_agreement: float = 0.5
    max_distance: float = 1.0


class Reason(StrEnum):
    """Why a domain was reset."""

    COLLAPSE = "collapse"
    DISAGREEMENT = "disagreement"
    DISTANCE = "distance"
    EVICTED = "evicted"


@dataclass(slots=True)
class _Watch:
    adapted_K: Tensor
    frozen_K: Tensor
    agreement: float = 1.0
    frames: int = 0


class Guard:
    """Running averages per domain."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._watches: dict[int, _Watch] = {}

    def agreement(self, domain: int) -> float:
        """Share of the domain's recent frames with the same label from adapted and frozen."""
        return self._watches[domain].agreement if domain in self._watches else 1.0

    def observe(self, domains: Sequence[int], adapted_BK: Tensor, frozen_BK: Tensor) -> None:
        """Take in a batch's probabilities."""
        for domain in set(domains):
            rows = [i for i, d in enumerate(domains) if d == domain]
            adapted, frozen = adapted_BK[rows], frozen_BK[rows]
            watch = self._watches.get(domain)
            if watch is None:
                watch = self._watches[domain] = _Watch(adapted.mean(0), frozen.mean(0))
            share = 1 - (1 - 1 / self._config.frames) ** len(rows)
            watch.adapted_K = torch.lerp(watch.adapted_K, adapted.mean(0), share)
            watch.frozen_K = torch.lerp(watch.frozen_K, frozen.mean(0), share)
            same = float((adapted.argmax(-1) == frozen.argmax(-1)).float().mean())
            watch.agreement += share * (same - watch.agreement)
            watch.frames += len(rows)

    def verdict(self, domain: int, distance: float) -> Reason | None:
        """Why the domain must be reset, if it must."""
        watch = self._watches.get(domain)
        if watch is None or watch.frames < self._config.frames:
            return None
        if distance > self._config.max_distance:
            return Reason.DISTANCE
        if watch.agreement < self._config.min_agreement:
            return Reason.DISAGREEMENT
        least = self._config.min_marginal_entropy * float(entropy(watch.frozen_K))
        if float(entropy(watch.adapted_K)) < least:
            return Reason.COLLAPSE
        return None

    def forget(self, domain: int) -> None:
        """Start the domain's averages anew, after a reset."""
        self._watches.pop(domain, None)
