"""Published methods, to be beaten at their best.

Each is written from its paper and repository, both named in its file, at the defaults published
there, and checked in the tests against a computation that does not share its code. They see what
they saw where they were published: batches of images, no cameras, no domains and no gate.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor


class Peer(Protocol):
    """A test-time method with its state. One thread calls it."""

    name: ClassVar[str]

    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Adapt to a batch of images in [0, 1] as published, and return its logits (B, K)."""
