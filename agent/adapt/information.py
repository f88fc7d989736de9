"""How much a model's answers say of the frames: a judge of adaptation that needs no labels."""

from __future__ import annotations

import torch
from torch import Tensor

from agent.adapt.strategy import entropy


def information(probabilities_BK: Tensor) -> float:
    """Mutual information of frame and answer, in nats: marginal less conditional entropy.

    High when answers are sure and differ from frame to frame (Bridle et al. 1991, "Unsupervised
    classifiers, mutual information and phantom targets").
    """
    return float(entropy(probabilities_BK.mean(dim=0)) - entropy(probabilities_BK).mean())


class Advantage:
    """A fading average of how much more the answers say with a correction than without.

    Both are measured on the same frames, so that easy ones do not pass for good corrections. In
    nats, and relatively where the answers say more than one nat without.
    """

    def __init__(self, mean: float = 0.0, weight: float = 0.0) -> None:
        self.mean = mean
        self.weight = weight

    def add(self, corrected: float, plain: float, fade: float = 0.85) -> None:
        """Take in a gallery's information, in nats; older galleries fade by the factor `fade`."""
        self.weight = fade * self.weight + 1
        gain = (corrected - plain) / max(1.0, plain)
        self.mean += (gain - self.mean) / self.weight

    def state(self) -> Tensor:
        """As a tensor."""
        return torch.tensor([self.mean, self.weight], dtype=torch.float64)
