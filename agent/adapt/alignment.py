"""Per-domain statistics alignment inside a frozen image tower.

A corrupted domain shifts and scales what each normalisation layer sees. Measuring the domain's
mean and variance per channel there, layer after layer, and mapping them back to the checkpoint's
own, undoes much of it (Li et al. 2017, "Revisiting Batch Normalization For Practical Domain
Adaptation"; Schneider et al. 2020). Here each domain keeps its own moments.

Sixteen frames do not know a domain's moments: much of what they differ by is what happens to be in
them. How much is told by how the images differ among each other, so each layer's departure from the
reference is shrunk by the share of it that chance explains (James and Stein 1961, "Estimation with
quadratic loss", positive part, one factor a layer for the means and one for the log variances).

The reference is best measured on the operator's own normal frames (`calibrate`): what the same few
scenes have in common then cancels. Without that BatchNorm has its running statistics to go by, and
sites of LayerNorm, which keeps none, are only ever measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    All are float32 of shape (total channels,); `count` is in images. `mean_spread` is the variance
    between the images of an image's own mean, `variance_spread` that of its mean square about the
    common mean; divided by `count` they tell how far chance may have moved the moments.
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
        delta = other.mean - self.mean
        return Moments(
            mean=self.mean + delta * share,
            variance=self.variance
            + (other.variance - self.variance) * share
            + delta.square() * (share * (1 - share)),
            mean_spread=torch.lerp(self.mean_spread, other.mean_spread, share),
            variance_spread=torch.lerp(self.variance_spread, other.variance_spread, share),
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

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name, without the count."""
        return {
            "mean": self.mean,
            "variance": self.variance,
            "mean_spread": self.mean_spread,
            "variance_spread": self.variance_spread,
        }


@dataclass(frozen=True, slots=True)
class Affine:
    """A scale and a shift per channel at every site, concatenated."""

    scale: Tensor
    shift: Tensor


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

    def fold(self, affine: Affine) -> tuple[Tensor | None, Tensor | None]:
        """Make scale and shift part of the layer; the numbers that they replace.

        BatchNorm gets them in front, as statistics: it then standardises `scale * x + shift`.
        LayerNorm gets them behind, in its own scale and shift.
        """
        scale, shift = affine.scale[self.span], affine.shift[self.span]
        module = self.module
        if isinstance(module, _BatchNorm):
            mean, variance = _statistic(module.running_mean), _statistic(module.running_var)
            numbers = (module.running_mean, module.running_var)
            module.running_mean = (mean - shift) / scale
            folded = (variance + module.eps) / scale.square() - module.eps
            module.running_var = folded.clamp_min(0)  # it is tiny where the difference cancels
            return numbers
        before = (module.weight, module.bias)
        own_scale = torch.ones_like(scale) if module.weight is None else module.weight
        own_shift = torch.zeros_like(shift) if module.bias is None else module.bias
        module.weight = _constant(own_scale * scale)
        module.bias = _constant(own_shift * scale + shift)
        return before

    def unfold(self, numbers: tuple[Tensor | None, Tensor | None]) -> None:
        """Put back what `fold` replaced."""
        if isinstance(self.module, _BatchNorm):
            self.module.running_mean, self.module.running_var = numbers
        else:
            self.module.weight, self.module.bias = numbers  # type: ignore[assignment]

    def moments(self, x: Tensor) -> Moments:
        channel = 1 if self.channels_second else x.dim() - 1
        inside = [axis for axis in range(1, x.dim()) if axis != channel]
        x = x.float()
        mean_BC = x.mean(dim=inside) if inside else x
        mean_C = mean_BC.mean(dim=0)
        square_BC = (x - self.view(mean_C, x)).square()
        square_BC = square_BC.mean(dim=inside) if inside else square_BC
        spread = 1 if len(x) > 1 else 0  # of one image nothing is known
        return Moments(
            mean_C,
            square_BC.mean(dim=0),
            mean_BC.var(dim=0, correction=spread),
            square_BC.var(dim=0, correction=spread),
            count=len(x),
        )


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
            # Some LayerNorms of timm hold their activation, behind which nothing can be folded.
            if isinstance(module, _BatchNorm | nn.LayerNorm) and not (
                isinstance(module, nn.LayerNorm) and hasattr(module, "act")
            ):
                span = slice(start, start + _channels(module))
                known = reference is not None or isinstance(module, _BatchNorm)
                self._sites.append(_Site(module, span, has_reference=known))
                start = span.stop
        device = next(visual.parameters()).device
        if reference is None:
            self._reference = _empty(start, device)
            for site in self._sites:
                if isinstance(site.module, _BatchNorm):
                    self._reference.mean[site.span] = _statistic(site.module.running_mean)
                    self._reference.variance[site.span] = _statistic(site.module.running_var)
        else:
            self._reference = reference.to(device)
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

    def affine(self, moments: Moments) -> Affine:
        """What maps a domain's moments onto the reference's, departures shrunk."""
        pairs = [
            _site_affine(moments.part(site.span), self._reference.part(site.span))
            if site.has_reference
            else (torch.ones_like(site_mean), torch.zeros_like(site_mean))
            for site in self._sites
            for site_mean in (moments.mean[site.span],)
        ]
        return Affine(
            torch.cat([scale for scale, _ in pairs]), torch.cat([shift for _, shift in pairs])
        )

    @contextmanager
    def applied(self, affine: Affine | None) -> Iterator[None]:
        """Within, every image is aligned by `affine`; None leaves all alone.

        It is folded into the layers' own numbers, so that it costs nothing.
        """
        if affine is None:
            yield
            return
        before = []
        try:
            for site in self._sites:
                before.append(site.fold(affine))
            yield
        finally:
            for site, numbers in zip(self._sites, before, strict=False):
                site.unfold(numbers)

    @contextmanager
    def measured(
        self, prior: Moments | None = None, *, align: bool = True
    ) -> Iterator[list[Moments]]:
        """Within, one forward pass measures its batch; the result is appended to the list.

        Each layer is aligned by what was measured before it goes on (together with `prior`), so
        that deeper layers are measured as they will be seen. With `align=False` it only looks.
        """
        found = _empty(len(self._reference.mean), self._reference.mean.device)
        count = 0

        def act(site: _Site, x: Tensor) -> Tensor:
            nonlocal count
            count = count or len(x)
            if len(x) != count:
                return x
            here = site.moments(x)
            for name, whole in found.tensors().items():
                whole[site.span] = here.tensors()[name].detach()
            if not align or not site.has_reference:
                return x
            if prior is not None:
                here = prior.part(site.span).merged(here)
            scale, shift = _site_affine(here, self._reference.part(site.span))
            return torch.addcmul(
                site.view(shift, x).to(x.dtype), x, site.view(scale, x).to(x.dtype)
            )

        result: list[Moments] = []
        with self._acting(act):
            yield result
        fresh = Moments(**found.tensors(), count=count)
        result.append(fresh if prior is None else prior.merged(fresh))

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


def _site_affine(table: Moments, reference: Moments) -> tuple[Tensor, Tensor]:
    """Scale and shift of one site, with the departures shrunk."""
    unit = reference.variance + EPSILON
    departure = (table.mean - reference.mean) / unit.sqrt()
    noise = _error(table.mean_spread / unit, table.count)
    noise = noise + _error(reference.mean_spread / unit, reference.count)
    departure = _shrunk(departure, noise)
    width = table.variance + EPSILON
    log_ratio = torch.log(width / unit)
    noise = _error(table.variance_spread / width.square(), table.count)
    noise = noise + _error(reference.variance_spread / unit.square(), reference.count)
    log_ratio = _shrunk(log_ratio, noise)
    scale = torch.exp(-0.5 * log_ratio)
    return scale, reference.mean - (reference.mean + departure * unit.sqrt()) * scale


def _error(spread: Tensor, count: int) -> Tensor:
    """Squared standard error of a mean over `count` images; of a given truth, none."""
    return spread / count if count else torch.zeros_like(spread)


def _shrunk(departure: Tensor, noise: Tensor) -> Tensor:
    """Departures less the share of their energy that noise explains."""
    share = noise.sum() / departure.square().sum().clamp_min(1e-12)
    return departure * (1 - share).clamp(0, 1)


def _empty(channels: int, device: torch.device) -> Moments:
    def zeros() -> Tensor:
        return torch.zeros(channels, device=device)

    return Moments(zeros(), zeros() + 1, zeros(), zeros(), count=0)


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _channels(module: _BatchNorm | nn.LayerNorm) -> int:
    return (
        module.num_features if isinstance(module, _BatchNorm) else int(module.normalized_shape[-1])
    )


def _statistic(running: Tensor | None) -> Tensor:
    if running is None:
        raise ModelError("a BatchNorm layer of this checkpoint has no running statistics")
    return running.float()
