"""Scores of semantic novelty, as pure functions of the frozen prompt's answers; higher is stranger.

None of them sees the adapted prompt, so that adaptation cannot blind them. "Logits" are cosine
similarities times the checkpoint's logit scale, divided by the temperature calibration learned.
"""

from __future__ import annotations

import torch
from torch import Tensor


def energy(logits_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """Energy score of logits (B, K) that were divided by `temperature` already, shape (B,).

    −T · log Σ exp(logits), Liu et al. 2020, "Energy-based Out-of-distribution Detection", eq. 4.
    """
    return temperature * ablated_energy(logits_BK)


def ablated_energy(logits_BK: Tensor) -> Tensor:
    """Energy of logits (B, K) without the leading temperature, shape (B,): −log Σ exp(logits).

    LeVine et al. 2024, "Out-of-Distribution Detection & Applications With Ablated Learned
    Temperature Energy" (AbeT): the leading factor works against the one inside. Under one
    temperature for all frames both forms put frames in the same order.
    """
    return -torch.logsumexp(logits_BK, dim=-1)


def max_logit(logits_BK: Tensor) -> Tensor:
    """Minus the largest of the logits (B, K), shape (B,).

    Hendrycks et al. 2022, "Scaling Out-of-Distribution Detection for Real-World Settings".
    """
    return -logits_BK.amax(dim=-1)


def mcm(cosines_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """Minus the maximum concept matching score of cosine similarities (B, K), shape (B,).

    max softmax(cosines / τ) with τ = 1, Ming et al. 2022, "Delving into Out-of-Distribution
    Detection with Vision-Language Representations".
    """
    return -(cosines_BK / temperature).softmax(dim=-1).amax(dim=-1)


def neglabel(logits_BK: Tensor, negatives_BM: Tensor) -> Tensor:
    """Log odds that a negative label matches, and none of the operator's; shape (B,).

    log Σ exp(negatives) − log Σ exp(logits). Frames come in the order that Jiang et al. 2024,
    "Negative Label Guided OOD Detection with Pretrained Vision-Language Models", put them in when
    negatives form one group; but their share of the labels saturates, and a threshold could not
    follow it.
    """
    return torch.logsumexp(negatives_BM, dim=-1) - torch.logsumexp(logits_BK, dim=-1)
