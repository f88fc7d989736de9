"""Per-domain statistics alignment inside a frozen image tower.

A corrupted domain shifts and scales what each normalisation layer sees. Measuring the domain's
mean and variance per channel there, layer after layer, and mapping them back to the checkpoint's
own, undoes much of it (Li et al. 2017, "Revisiting Batch Normalization For Practical Domain
Adaptation"; Schneider et al. 2020). Here each domain keeps its own table, and each sample of a
batch is given its own domain's.

The reference is best measured on the operator's own normal frames (`calibrate`): what the same few
scenes have in common then cancels. Without that BatchNorm has its running statistics to go by, and
sites of LayerNorm, which keeps none, are only ever measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from agent.errors import ModelError

#: Keeps the division safe where a domain makes a channel constant.
EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance per channel at every site, concatenated, and the images behind them.

    `mean` and `variance` are float32 of shape (total channels,); `count` is in images.
    """

    mean: Tensor
    variance: Tensor
    count: int

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of images together (parallel variance, Chan et al. 1979)."""
        count = self.count + other.count
        share = other.count / count
        delta = other.mean - self.mean
        return Moments(
            mean=self.mean + delta * share,
            variance=self.variance
            + (other.variance - self.variance) * share
            + delta.square() * (share * (1 - share)),
            count=count,
        )


class _Site:
    """One normalisation layer: where its channels are, and its slice of the concatenation."""

    def __init__(
        self, module: _BatchNorm | nn.LayerNorm, span: slice, *, has_reference: bool
    ) -> None:
        self.module = module
        self.span = span
        self.has_reference = has_reference
        self.is_batch_norm = isinstance(module, _BatchNorm)
        # timm's LayerNorm2d is a LayerNorm, but takes and returns (B, C, H, W).
        self.channels_second = self.is_batch_norm or "2d" in type(module).__name__

    def view(self, per_channel: Tensor, like: Tensor) -> Tensor:
        """Shape (C,) or (B, C) so that it broadcasts over `like`, (B, C, H, W) or (B, ..., C)."""
        rows = per_channel if per_channel.dim() == 2 else per_channel[None]
        if self.channels_second:
            return rows.view(*rows.shape, *(1,) * (like.dim() - 2))
        return rows.view(len(rows), *(1,) * (like.dim() - 2), rows.shape[1])

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channel = 1 if self.channels_second else x.dim() - 1
        others = [axis for axis in range(x.dim()) if axis != channel]
        variance, mean = torch.var_mean(x.float(), dim=others, correction=0)
        return mean, variance


class Alignment:
    """Hooks on the normalisation layers of an image tower; does nothing until it is told to.

    Hooked layers pass their input through untouched outside of `applied` and `measured`, so the
    source model is always there.
    """

    def __init__(self, visual: nn.Module, reference: Moments | None = None) -> None:
        """`reference` is what the sites see of normal frames; see the module for what if not."""
        self._sites: list[_Site] = []
        start = 0
        for module in visual.modules():
            if isinstance(module, _BatchNorm | nn.LayerNorm):
                span = slice(start, start + _channels(module))
                known = reference is not None or isinstance(module, _BatchNorm)
                self._sites.append(_Site(module, span, has_reference=known))
                start = span.stop
        device = next(visual.parameters()).device
        mean = torch.zeros(start, device=device)
        variance = torch.ones(start, device=device)
        for site in self._sites:
            if reference is not None:
                mean[site.span] = reference.mean[site.span].to(device)
                variance[site.span] = reference.variance[site.span].to(device)
            elif isinstance(site.module, _BatchNorm):
                mean[site.span] = _statistic(site.module.running_mean)
                variance[site.span] = _statistic(site.module.running_var)
        self._reference = Moments(mean, variance, count=0)
        self._act: Callable[[_Site, Tensor], Tensor] | None = None
        for site in self._sites:
            if site.is_batch_norm:
                site.module.register_forward_pre_hook(self._before(site))
            else:
                site.module.register_forward_hook(self._after(site))

    @property
    def available(self) -> bool:
        """Whether the tower has a layer that can be aligned."""
        return any(site.has_reference for site in self._sites)

    @contextmanager
    def applied(self, tables: Sequence[Moments | None]) -> Iterator[None]:
        """Within, image b of the batch is aligned by `tables[b]`; None leaves it alone."""
        distinct = list({id(table): table for table in tables}.values())
        if all(table is None for table in distinct):
            yield
            return
        affine = [self._affine(table) for table in distinct]
        if len(distinct) == 1:
            scale, shift = affine[0]
        else:
            row_of = {id(table): row for row, table in enumerate(distinct)}
            rows = torch.tensor([row_of[id(table)] for table in tables], device=affine[0][0].device)
            scale = torch.stack([a for a, _ in affine])[rows]
            shift = torch.stack([b for _, b in affine])[rows]

        def act(site: _Site, x: Tensor) -> Tensor:
            # A layer that does not see one row for each image, such as the queries of an
            # attention pooler, has nothing of the domain in it.
            if not site.has_reference or len(x) != len(tables):
                return x
            scale_BC = site.view(scale[..., site.span], x).to(x.dtype)
            shift_BC = site.view(shift[..., site.span], x).to(x.dtype)
            return torch.addcmul(shift_BC, x, scale_BC)

        with self._acting(act):
            yield

    @contextmanager
    def measured(
        self, prior: Moments | None = None, *, align: bool = True
    ) -> Iterator[list[Moments]]:
        """Within, one forward pass measures its batch; the result is appended to the list.

        Each layer is aligned by what was measured before it goes on (together with `prior`), so
        that deeper layers are measured as they will be seen. With `align=False` it only looks.
        """
        means = torch.zeros_like(self._reference.mean)
        variances = torch.ones_like(self._reference.variance)
        count = 0

        def act(site: _Site, x: Tensor) -> Tensor:
            nonlocal count
            count = count or len(x)
            if len(x) != count:
                return x
            mean, variance = site.moments(x)
            means[site.span], variances[site.span] = mean, variance
            if not align or not site.has_reference:
                return x
            here = Moments(mean, variance, count)
            if prior is not None:
                span = site.span
                here = Moments(prior.mean[span], prior.variance[span], prior.count).merged(here)
            scale, shift = self._affine(here, site.span)
            return torch.addcmul(
                site.view(shift, x).to(x.dtype), x, site.view(scale, x).to(x.dtype)
            )

        result: list[Moments] = []
        with self._acting(act):
            yield result
        fresh = Moments(means, variances, count)
        result.append(fresh if prior is None else prior.merged(fresh))

    def _affine(self, table: Moments | None, span: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Scale and shift that map `table`'s moments onto the reference's."""
        mean, variance = self._reference.mean[span], self._reference.variance[span]
        if table is None:
            return torch.ones_like(mean), torch.zeros_like(mean)
        scale = torch.sqrt((variance + EPSILON) / (table.variance + EPSILON))
        return scale, mean - table.mean * scale

    @contextmanager
    def _acting(self, act: Callable[[_Site, Tensor], Tensor]) -> Iterator[None]:
        self._act = act
        try:
            yield
        finally:
            self._act = None

    def _before(self, site: _Site) -> Callable[[nn.Module, Any], Any]:
        def hook(_module: nn.Module, inputs: Any) -> Any:
            return None if self._act is None else (self._act(site, inputs[0]), *inputs[1:])

        return hook

    def _after(self, site: _Site) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Any:
            return None if self._act is None else self._act(site, output)

        return hook


def _channels(module: _BatchNorm | nn.LayerNorm) -> int:
    return (
        module.num_features if isinstance(module, _BatchNorm) else int(module.normalized_shape[-1])
    )


def _statistic(running: Tensor | None) -> Tensor:
    if running is None:
        raise ModelError("a BatchNorm layer of this checkpoint has no running statistics")
    return running.float()
