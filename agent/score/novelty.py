"""How strange a frame is, by the score that the configuration names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.score import ood


class Score(StrEnum):
    """The scores of `agent.score.ood`, and what they say together."""

    NEGLABEL = "neglabel"
    ENERGY = "energy"
    ABLATED_ENERGY = "ablated_energy"
    MAX_LOGIT = "max_logit"
    MCM = "mcm"
    ENSEMBLE = "ensemble"


#: What the ensemble is made of: what is nearer to other words, and what is near to no label.
MEMBERS = (Score.NEGLABEL, Score.ENERGY)


def conformal_quantile(ascending: Sequence[float] | Tensor, rate: float) -> float:
    """Split-conformal quantile: one more value like these lies above it with at most that rate.

    With fewer than 1 / rate − 1 values no quantile can promise it; the largest comes closest.
    Angelopoulos & Bates 2021, "A Gentle Introduction to Conformal Prediction", §1.
    """
    rank = math.ceil((len(ascending) + 1) * (1 - rate) - 1e-9)  # 0.95 is not exactly that
    return float(ascending[min(len(ascending), rank) - 1])


@dataclass(frozen=True)
class Normal:
    """A score on normal frames, sorted, shape (N,)."""

    sorted_N: Tensor

    @classmethod
    def of(cls, scores_N: Tensor) -> Normal:
        """Keep the scores of normal frames."""
        return cls(scores_N.detach().float().cpu().sort().values)

    @cached_property
    def median(self) -> float:
        """Of the normal frames."""
        return float(self.sorted_N.median())

    @cached_property
    def deviation(self) -> float:
        """Median absolute deviation of the normal frames."""
        return max(float((self.sorted_N - self.median).abs().median()), 1e-6)

    def threshold(self, false_alarm_rate: float) -> float:
        """A new normal frame lies above it with at most that probability."""
        return conformal_quantile(self.sorted_N, false_alarm_rate)


@dataclass(frozen=True, slots=True)
class Novelty:
    """Scores frames by the frozen prompt.

    Attributes:
        temperature: what `zero_shot.scale` was divided by.
        negatives_MD: unit text features of the negative labels.
        normal: the members' scores on normal frames, which the ensemble is standardised by.
    """

    zero_shot: ZeroShot
    temperature: float
    negatives_MD: Tensor
    normal: Mapping[Score, Normal]

    def score(self, which: Score, features_BD: Tensor, logits_BK: Tensor) -> Tensor:
        """Novelty (B,) of unit features (B, D) with the zero-shot prompt's logits (B, K)."""
        match which:
            case Score.NEGLABEL:
                negatives_BM = self.zero_shot.scale * features_BD @ self.negatives_MD.T
                return ood.neglabel(logits_BK, negatives_BM)
            case Score.ENERGY:
                return ood.energy(logits_BK, self.temperature)
            case Score.ABLATED_ENERGY:
                return ood.ablated_energy(logits_BK)
            case Score.MAX_LOGIT:
                return ood.max_logit(logits_BK)
            case Score.MCM:
                return ood.mcm(logits_BK / self.zero_shot.scale)
            case Score.ENSEMBLE:
                return self._ensemble(lambda member: self.score(member, features_BD, logits_BK))

    def _ensemble(self, score: Callable[[Score], Tensor]) -> Tensor:
        """Mean of the members, each as deviations from the median of normal frames."""
        standard_SB = torch.stack(
            [(score(m) - self.normal[m].median) / self.normal[m].deviation for m in MEMBERS]
        )
        return standard_SB.mean(dim=0)
