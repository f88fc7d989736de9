"""What normal frames look like, to the tower and to the eye: where adaptation leads back to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agent.adapt.centre import Centre
from agent.adapt.information import FalseAdvantage
from agent.adapt.moments import Moments
from agent.adapt.restore import Spectrum
from agent.adapt.style import StyleReference


@dataclass(frozen=True, slots=True)
class Reference:
    """Measured by `calibrate`: what the normalisation layers see, the spectrum, style and features.

    `false_advantage` is what alignment seems to gain there.
    """

    moments: Moments
    spectrum: Spectrum
    style: StyleReference
    false_advantage: FalseAdvantage
    centre: Centre

    def to(self, device: torch.device) -> Reference:
        """The same on another device."""
        return Reference(
            self.moments.to(device),
            self.spectrum.to(device),
            self.style.to(device),
            self.false_advantage,
            self.centre.to(device),
        )
