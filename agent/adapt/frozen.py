"""Do nothing: the zero-shot model as it was loaded. The baseline, and the rollback target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from agent.adapt.strategy import Observation, Outcome
from agent.encode import Encoder


class Frozen:
    """Encodes with the source model and answers with the zero-shot prompt."""

    name: ClassVar[str] = "frozen"

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def encode(self, pixels_BCHW: Tensor, domains: Sequence[int]) -> Tensor:
        """The source features."""
        return self._encoder.encode_image(pixels_BCHW)

    def step(self, seen: Observation) -> Tensor:
        """The zero-shot logits."""
        return seen.logits_BK

    def learn(self, thrifty: bool = False) -> Outcome | None:
        """Nothing to do, ever."""
        return None

    def encoding(self, domain: int) -> int:
        """Always the source model's."""
        return 0

    def version(self, domain: int) -> int:
        """Always zero."""
        return 0

    def distance(self, domain: int) -> float:
        """Always zero."""
        return 0.0

    def begin(self, domain: int, kin: int | None) -> None:
        """All domains are alike."""

    def reset(self, domain: int | None = None) -> None:
        """Nothing to undo."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""
