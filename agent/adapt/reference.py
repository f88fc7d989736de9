"""What normal frames look like, to the tower and to the eye: where adaptation leads back to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agent.adapt.information import FalseAdvantage
from agent.adapt.moments import Moments
from agent.adapt.restore import Spectrum
from agent.adapt.style import StyleReference


@dataclass(frozen=True, slots=True)
class Centre:
    """The mean unit feature of so many normal frames."""

    mean_D: Tensor
    frames: int

    def to(self, device: torch.device) -> Centre:
        """The same on another device."""
        return Centre(self.mean_D.to(device), self.frames)


@dataclass(frozen=True, slots=True)
class Reference:
    """Measured by `calibrate`: what the normalisation layers see, the spectrum, style and features.

    `false_advantage` is what alignment seems to gain there, `variety` how many labels a window of
    answers shows, and `vagueness` the mean entropy of an answer in nats.
    """

    moments: Moments
    spectrum: Spectrum
    style: StyleReference
    false_advantage: FalseAdvantage
    centre: Centre
    variety: float
    vagueness: float

    def to(self, device: torch.device) -> Reference:
        """The same on another device."""
        return Reference(
            self.moments.to(device),
            self.spectrum.to(device),
            self.style.to(device),
            self.false_advantage,
            self.centre.to(device),
            self.variety,
            self.vagueness,
        )
