"""What normal frames look like, to the tower and to the eye: where alignment leads back to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agent.adapt.alignment import Moments
from agent.adapt.restore import Spectrum


@dataclass(frozen=True, slots=True)
class Reference:
    """Measured by `calibrate`: what the normalisation layers see, and the pictures' spectrum."""

    moments: Moments
    spectrum: Spectrum

    def to(self, device: torch.device) -> Reference:
        """The same on another device."""
        return Reference(self.moments.to(device), self.spectrum.to(device))

    def merged(self, other: Reference) -> Reference:
        """The reference of both sets of images together."""
        return Reference(self.moments.merged(other.moments), self.spectrum.merged(other.spectrum))
