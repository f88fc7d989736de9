"""What was kept before, so that one strange thing makes few pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Embeddings that are remembered.
MEMORY = 2048


def alike(
    embeddings_ND: NDArray[np.float32], embedding_D: NDArray[np.float32], similarity: float
) -> NDArray[np.bool_]:
    """Which of N embeddings show what another shows, bool (N,).

    Each is a unit vector, or zero for a frame without a feature; those are alike to each other.
    """
    if not embedding_D.any():
        return np.asarray(~embeddings_ND.any(axis=1))
    return np.asarray(embeddings_ND @ embedding_D >= similarity)


class Seen:
    """The last embeddings that were kept; none counts for longer than `max_age_s`."""

    def __init__(self, dimension: int, similarity: float, max_age_s: float) -> None:
        self._similarity = similarity
        self._max_age_s = max_age_s
        self._embeddings_ND = np.zeros((MEMORY, dimension), np.float32)
        self._kept_at_N = np.full(MEMORY, -np.inf)
        self._next = 0

    def add(self, embedding_D: NDArray[np.float32], kept_at: float) -> None:
        """Remember, in place of the one that was added first; `kept_at` in seconds."""
        self._embeddings_ND[self._next] = embedding_D
        self._kept_at_N[self._next] = kept_at
        self._next = (self._next + 1) % MEMORY

    def forget(self, embedding_D: NDArray[np.float32]) -> None:
        """Take back an addition: nothing was kept after all."""
        self._kept_at_N[(self._embeddings_ND == embedding_D).all(axis=1)] = -np.inf

    def has(self, embedding_D: NDArray[np.float32], now: float) -> bool:
        """Whether something alike was kept and is not forgotten."""
        fresh_N = self._kept_at_N > now - self._max_age_s
        alike_N = alike(self._embeddings_ND, embedding_D, self._similarity)
        return bool((alike_N & fresh_N).any())
