"""Thresholds that their authors set anew for every data set, because they depend on the labels."""

from __future__ import annotations

import math
from collections.abc import Mapping


def for_labels(published: Mapping[int, float], n_labels: int) -> float:
    """The value published for the number of labels that is nearest to `n_labels`, in ratio."""
    return published[min(published, key=lambda n: abs(math.log(n / n_labels)))]
