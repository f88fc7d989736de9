"""What the normalisation layers of a tower see: means and variances, and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance per channel at every site, concatenated, and the images behind them.

    All are of shape (total channels,); `count` is in images. `mean_spread` is the variance between
    the images of an image's own mean, `variance_spread` that of its mean square about the common
    mean; divided by `count` they tell how far chance may have moved the moments, for which
    bfloat16 will do.
    """

    mean: Tensor
    variance: Tensor
    mean_spread: Tensor
    variance_spread: Tensor
    count: int

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of images together (parallel variance, Chan et al. 1979)."""
        count = self.count + other.count
        if not count:  # a tower in which nothing is measured
            return other
        share = other.count / count
        both = share * (1 - share)
        delta = other.mean - self.mean
        # What the two sets differ by is spread between images, too: one image alone shows none.
        mean_spread = torch.lerp(self.mean_spread.float(), other.mean_spread.float(), share)
        mean_spread = mean_spread + both * delta.square()
        widened = (other.variance - self.variance).square()
        variance_spread = torch.lerp(
            self.variance_spread.float(), other.variance_spread.float(), share
        )
        variance_spread = variance_spread + both * widened
        return Moments(
            mean=self.mean + delta * share,
            variance=self.variance
            + (other.variance - self.variance) * share
            + delta.square() * both,
            mean_spread=mean_spread.to(self.mean_spread.dtype),
            variance_spread=variance_spread.to(self.variance_spread.dtype),
            count=count,
        )

    def to(self, device: torch.device) -> Moments:
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Moments(**moved, count=self.count)

    def part(self, span: slice) -> Moments:
        """The moments of one site."""
        return Moments(
            self.mean[span],
            self.variance[span],
            self.mean_spread[span],
            self.variance_spread[span],
            self.count,
        )

    @classmethod
    def of_nothing(cls, channels: int, device: torch.device) -> Moments:
        """Before any image was seen: mean 0 and variance 1."""
        zeros = torch.zeros(channels, device=device)
        return cls(zeros, zeros + 1, zeros.clone(), zeros.clone(), count=0)

    @classmethod
    def named(cls, tensors: Mapping[str, Tensor], prefix: str, count: int) -> Moments:
        """What `tensors` gave, from under names that begin with `prefix`.

        Raises:
            KeyError: one is missing.
        """
        return cls(
            tensors[f"{prefix}mean"],
            tensors[f"{prefix}variance"],
            tensors[f"{prefix}mean_spread"],
            tensors[f"{prefix}variance_spread"],
            count,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name, without the count."""
        return {
            "mean": self.mean,
            "variance": self.variance,
            "mean_spread": self.mean_spread,
            "variance_spread": self.variance_spread,
        }


@dataclass(frozen=True, slots=True)
class Sample:
    """Mean and variance inside images of a batch, per channel at every site: (N, channels).

    They are of every n-th image, n being `every`.
    """

    mean_NC: Tensor
    variance_NC: Tensor
    every: int = 1

    def moments(self, rows_B: Tensor | None = None) -> Moments:
        """The moments of these images, or of those where `rows_B` is true for the batch."""
        rows = slice(None) if rows_B is None else rows_B[:: self.every]
        mean_BC, variance_BC = self.mean_NC[rows], self.variance_NC[rows]
        mean_C = mean_BC.mean(dim=0)
        square_BC = variance_BC + (mean_BC - mean_C).square()
        correction = 1 if len(mean_BC) > 1 else 0  # of one image nothing is known
        return Moments(
            mean_C,
            square_BC.mean(dim=0),
            mean_BC.var(dim=0, correction=correction).bfloat16(),
            square_BC.var(dim=0, correction=correction).bfloat16(),
            count=len(mean_BC),
        )
