"""How much a model's answers say of the frames: a judge of adaptation that needs no labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from agent.adapt.strategy import entropy

#: Frames in which labels are counted at a time.
WINDOW = 16
#: Answers that name fewer labels than this share of what normal frames show come from a camera that
#: looks at few things, or from a broken picture. Information can't tell: wrong answers that differ
#: say more than right ones that don't.
NARROW = 0.5


def information(probabilities_BK: Tensor) -> float:
    """Mutual information of frame and answer, in nats: marginal less conditional entropy.

    High when answers are sure and differ from frame to frame (Bridle et al. 1991, "Unsupervised
    classifiers, mutual information and phantom targets").
    """
    return float(entropy(probabilities_BK.mean(dim=0)) - entropy(probabilities_BK).mean())


def variety(labels: Sequence[int]) -> float:
    """The effective number of labels: the exponential of the entropy of their frequencies."""
    shares = [count / len(labels) for count in Counter(labels).values()]
    return math.exp(-sum(share * math.log(share) for share in shares))


def usual_variety(labels: Sequence[int]) -> float:
    """The geometric mean of `variety` over windows of `WINDOW`; there must be one or more."""
    starts = range(0, len(labels) - WINDOW + 1, WINDOW)
    return math.exp(fmean(math.log(variety(labels[s : s + WINDOW])) for s in starts))


def advantage(corrected: float, plain: float) -> float:
    """How much more answers say with a correction than without, both in nats.

    In nats, and relatively where the answers say more than one nat without.
    """
    return (corrected - plain) / max(1.0, plain)


@dataclass(frozen=True, slots=True)
class FalseAdvantage:
    """The advantage of a correction on galleries of normal frames, where nothing is to be gained.

    With few labels it is seldom zero: answers get surer and no better.
    """

    mean: float
    deviation: float

    @classmethod
    def of(cls, advantages: Sequence[float]) -> FalseAdvantage:
        """Measured on galleries; of a single one, the deviation is taken for the mean's size."""
        mean = fmean(advantages)
        return cls(mean, stdev(advantages) if len(advantages) > 1 else abs(mean))

    def bound(self, galleries: float) -> float:
        """What chance will hardly exceed on so many galleries: two standard errors above."""
        return self.mean + 2 * self.deviation / math.sqrt(max(1.0, galleries))


class Advantage:
    """A fading average of `advantage` over galleries.

    Both answers are of the same frames, so that easy ones do not pass for good corrections.
    """

    def __init__(self, mean: float = 0.0, weight: float = 0.0) -> None:
        self.mean = mean
        self.weight = weight

    def add(self, corrected: float, plain: float, fade: float = 0.85) -> None:
        """Take in a gallery's information, in nats; older galleries fade by the factor `fade`."""
        self.weight = fade * self.weight + 1
        self.mean += (advantage(corrected, plain) - self.mean) / self.weight

    def state(self) -> Tensor:
        """As a tensor."""
        return torch.tensor([self.mean, self.weight], dtype=torch.float64)
