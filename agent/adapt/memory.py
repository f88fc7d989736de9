"""A small, class-balanced, aged memory of features, one for each domain."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

#: Features kept of one pseudo-label; older ones fall out.
PER_LABEL = 4
#: Labels kept; the one refreshed longest ago makes room.
MAX_LABELS = 32
#: A feature closer than this (cosine) to the newest of its label adds nothing.
DUPLICATE = 0.98


class FeatureMemory:
    """Unit features by pseudo-label, in half precision: a domain's state is to stay small."""

    def __init__(self) -> None:
        self._by_label: dict[int, deque[Tensor]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_label.values()))

    def add(self, feature_D: Tensor, label: int) -> bool:
        """Keep the feature unless it repeats the newest of its label; whether it was kept."""
        kept = self._by_label.pop(label, None) or deque(maxlen=PER_LABEL)
        self._by_label[label] = kept  # last in the dict: refreshed last
        if kept and float(kept[-1].float() @ feature_D.float()) > DUPLICATE:
            return False
        kept.append(feature_D.bfloat16())
        if len(self._by_label) > MAX_LABELS:
            del self._by_label[next(iter(self._by_label))]
        return True

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Features (n, D), every label equally likely."""
        labels = list(self._by_label)
        picks = torch.randint(len(labels), (n,), generator=generator).tolist()
        rows = []
        for pick in picks:
            kept = self._by_label[labels[pick]]
            rows.append(kept[int(torch.randint(len(kept), (), generator=generator))])
        return torch.stack(rows).float()

    def clear(self) -> None:
        """Forget everything."""
        self._by_label.clear()

    def state(self) -> tuple[list[int], Tensor | None]:
        """Labels and features in order of age, to be put back with `add`."""
        pairs = [(label, f) for label, kept in self._by_label.items() for f in kept]
        if not pairs:
            return [], None
        return [label for label, _ in pairs], torch.stack([f for _, f in pairs])
