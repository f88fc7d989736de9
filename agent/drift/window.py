"""A fading window over a stream of vectors, in memory that does not grow with it."""

from __future__ import annotations

import torch
from torch import Tensor


class Window:
    """Exponential mean of vectors (P,), a plain mean while there are few.

    A share of 2 / (frames + 1) for the newest vector gives the mean the variance of a plain mean
    over as many (Roberts 1959).
    """

    def __init__(self, frames: int) -> None:
        """`frames` are effective ones."""
        self.length = frames
        self.seen = 0
        self.mean_P: Tensor | None = None

    @property
    def is_full(self) -> bool:
        """Whether as many frames were seen as it averages over."""
        return self.seen >= self.length

    def take(self, vectors_BP: Tensor) -> None:
        """Go on by these vectors, the newest last."""
        kept, weights = 1.0, []
        # From the newest back: each is worth its share of what the later ones leave.
        for number in range(self.seen + len(vectors_BP), self.seen, -1):
            share = max(1 / number, 2 / (self.length + 1))
            weights.append(kept * share)
            kept *= 1 - share
        step_P = torch.tensor(weights[::-1], dtype=vectors_BP.dtype) @ vectors_BP
        self.mean_P = step_P if self.mean_P is None else step_P + kept * self.mean_P
        self.seen += len(vectors_BP)
