"""Which frames of a batch are unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.score.ood import ablated_energy
from agent.score.threshold import Thresholds


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of each frame of a batch, on the CPU.

    Attributes:
        energies_B: energy in logit units.
        novelty_B: the score that decides.
        thresholds_B: what it is compared with, of the frame's domain.
        unknown_B: whether none of the labels fits.
    """

    energies_B: Tensor
    novelty_B: Tensor
    thresholds_B: Tensor
    unknown_B: Tensor


@dataclass(frozen=True, slots=True)
class Judge:
    """`novelty` scores unit features (B, D) with the zero-shot prompt's logits (B, K)."""

    novelty: Callable[[Tensor, Tensor], Tensor]
    thresholds: Thresholds

    def judge(
        self, domains: Sequence[int], features_BD: Tensor, logits_BK: Tensor, finite_B: Tensor
    ) -> Judgement:
        """Judge a batch, and let its domains' thresholds follow it.

        A feature that was not finite says nothing of what is in the picture, nor of what is normal.
        """
        novelty_B, finite_B = self.novelty(features_BD, logits_BK).cpu(), finite_B.cpu()
        sound = finite_B.nonzero().flatten().tolist()
        self.thresholds.observe([domains[row] for row in sound], novelty_B[sound])
        threshold_of = {domain: self.thresholds.of(domain) for domain in set(domains)}
        thresholds_B = torch.tensor([threshold_of[domain] for domain in domains])
        unknown_B = (novelty_B > thresholds_B) | ~finite_B
        return Judgement(ablated_energy(logits_BK).cpu(), novelty_B, thresholds_B, unknown_B)
