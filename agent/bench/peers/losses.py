"""Losses that several peers share, each for every image of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from agent.adapt.strategy import entropy


def softmax_entropy(logits_BK: Tensor) -> Tensor:
    """Entropy (B,) in nats of the predictions."""
    # Where a probability underflows to zero, the entropy's slope is infinite.
    return entropy(logits_BK.softmax(dim=-1).clamp_min(torch.finfo(logits_BK.dtype).tiny))


def symmetric_cross_entropy(logits_BK: Tensor, others_BK: Tensor) -> Tensor:
    """The mean (B,) of the two predictions' cross-entropies, each against the other."""
    forward_B = (others_BK.softmax(dim=-1) * logits_BK.log_softmax(dim=-1)).sum(dim=-1)
    backward_B = (logits_BK.softmax(dim=-1) * others_BK.log_softmax(dim=-1)).sum(dim=-1)
    return -(forward_B + backward_B) / 2
