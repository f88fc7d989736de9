"""Scores of semantic novelty, all on the frozen prompt, so that adaptation cannot blind them."""

from __future__ import annotations

import torch
from torch import Tensor


def energy(logits_BK: Tensor) -> Tensor:
    """Energy score of logits (B, K): −logsumexp(logits), shape (B,). Higher is stranger.

    Liu et al. 2020, "Energy-based Out-of-distribution Detection", eq. 4, with the temperature
    already in the logits' scale.
    """
    return -torch.logsumexp(logits_BK, dim=-1)
