"""Distances between two sets of frames, from the means of what their frames contribute.

Each is zero for equal means and quadratic in a small difference, so that between two sets of normal
frames it is chance, and shrinks as the sets grow. Leading axes (…) are carried through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def squared(a_P: Tensor, b_P: Tensor) -> Tensor:
    """|a − b|² along the last axis: of mean features, or of mean random features (MMD²)."""
    distance: Tensor = (a_P - b_P).square().sum(dim=-1)
    return distance


def frechet(a_2D: Tensor, b_2D: Tensor) -> Tensor:
    """Fréchet distance between Gaussians with diagonal covariance.

    |μ₁ − μ₂|² + Σ (σ₁ − σ₂)² (Dowson & Landau 1982, squared); the diagonal keeps it meaningful for
    windows with fewer frames than dimensions. The arguments are the means of features and of their
    squares, one after the other, (…, 2·D).
    """
    mean_a_D, mean_b_D = a_2D.chunk(2, dim=-1)[0], b_2D.chunk(2, dim=-1)[0]
    return squared(mean_a_D, mean_b_D) + squared(_deviation(a_2D), _deviation(b_2D))


def jensen_shannon(p_K: Tensor, q_K: Tensor) -> Tensor:
    """Jensen–Shannon divergence of two distributions (…, K), in bits, 0 to 1. Lin 1991."""
    middle_K = (p_K + q_K) / 2

    def divergence(of_K: Tensor) -> Tensor:
        terms_K: Tensor = torch.special.xlogy(of_K, of_K / middle_K.clamp_min(1e-12))
        return terms_K.sum(dim=-1)

    bits: Tensor = (divergence(p_K) + divergence(q_K)) / (2 * math.log(2))
    return bits.clamp(0, 1)


def squared_log_ratio(a_1: Tensor, b_1: Tensor) -> Tensor:
    """log(a / b)² of two positive numbers (…, 1): as far from 0 at twice as at half."""
    ratio: Tensor = (a_1.clamp_min(1e-12) / b_1.clamp_min(1e-12)).log()
    return ratio.square().squeeze(dim=-1)


def _deviation(moments_2D: Tensor) -> Tensor:
    mean_D, square_D = moments_2D.chunk(2, dim=-1)
    variance_D: Tensor = (square_D - mean_D.square()).clamp_min(0)
    return variance_D.sqrt()
