"""What the monitor needs of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Seen:
    """A batch as the recogniser saw and answered it.

    Attributes:
        features_BD: unit features, as the strategy encoded them.
        zero_shot_BK: probabilities of the zero-shot prompt on them.
        adapted_BK: probabilities of the verdicts.
        styles_BS: styles of the pictures, before any correction.
        energies_B: energies under the zero-shot prompt.
    """

    features_BD: Tensor
    zero_shot_BK: Tensor
    adapted_BK: Tensor
    styles_BS: Tensor
    energies_B: Tensor

    def of(self, rows: Sequence[int]) -> Seen:
        """These rows of the batch."""
        return Seen(
            self.features_BD[rows],
            self.zero_shot_BK[rows],
            self.adapted_BK[rows],
            self.styles_BS[rows],
            self.energies_B[rows],
        )

    def finite(self) -> tuple[list[int], Seen]:
        """The rows without a number that is not finite, on the CPU in full precision."""
        parts = (
            self.features_BD,
            self.zero_shot_BK,
            self.adapted_BK,
            self.styles_BS,
            self.energies_B,
        )
        here = Seen(*(each.detach().float().cpu() for each in parts))
        sound_B = here.energies_B.isfinite()
        for each in (here.features_BD, here.zero_shot_BK, here.adapted_BK, here.styles_BS):
            sound_B = sound_B & each.isfinite().all(dim=-1)
        rows: list[int] = sound_B.nonzero().flatten().tolist()
        return rows, here.of(rows)
