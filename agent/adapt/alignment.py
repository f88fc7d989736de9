"""Per-domain statistics alignment inside a frozen image tower.

A corrupted domain shifts and scales what each normalisation layer sees. Measuring the domain's
mean and variance per channel there, layer after layer, and mapping them back to the checkpoint's
own, undoes much of it (Li et al. 2017, "Revisiting Batch Normalization For Practical Domain
Adaptation"; Schneider et al. 2020). Here each domain keeps its own moments.

Sixteen frames do not know a domain's moments: much of what they differ by is what happens to be in
them. How much is told by how the images differ among each other, so each layer's departure from the
reference is shrunk by the share of it that chance explains (James and Stein 1961, "Estimation with
quadratic loss", positive part, one factor a layer for the means and one for the log variances).
What is left is not undone wholly but by two thirds, by which a layer's errors do not add up through
the tower: what Schneider et al. get from a prior of 16 images beside a batch of 32.

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

from agent.adapt.moments import Moments, Sample
from agent.errors import ModelError

#: Keeps the division safe where a domain makes a channel constant.
EPSILON = 1e-5
#: How much of a departure is undone.
STRENGTH = 2 / 3
#: So many images of a batch are measured, and so many places of a row of a large map: all of them
#: would take longer than the forward pass itself and tell no more.
MEASURED_IMAGES, _PLACES = 16, 14


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

    def view(self, per_channel_C: Tensor, like: Tensor) -> Tensor:
        """Shaped so that it broadcasts over `like`, (B, C, H, W) or (B, ..., C)."""
        if self.channels_second:
            return per_channel_C.view(-1, *(1,) * (like.dim() - 2))
        return per_channel_C

    def fold(self, scale_C: Tensor, shift_C: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Make scale and shift part of the layer; the numbers that they replace.

        BatchNorm gets them in front, as statistics: it then standardises `scale * x + shift`.
        LayerNorm gets them behind, in its own scale and shift.
        """
        module = self.module
        if isinstance(module, _BatchNorm):
            mean, variance = _statistic(module.running_mean), _statistic(module.running_var)
            numbers = (module.running_mean, module.running_var)
            module.running_mean = (mean - shift_C) / scale_C
            folded = (variance + module.eps) / scale_C.square() - module.eps
            module.running_var = folded.clamp_min(0)  # it is tiny where the difference cancels
            return numbers
        before = (module.weight, module.bias)
        own_scale = torch.ones_like(scale_C) if module.weight is None else module.weight
        own_shift = torch.zeros_like(shift_C) if module.bias is None else module.bias
        module.weight = _constant(own_scale * scale_C)
        module.bias = _constant(own_shift * scale_C + shift_C)
        return before

    def unfold(self, numbers: tuple[Tensor | None, Tensor | None]) -> None:
        """Put back what `fold` replaced."""
        if isinstance(self.module, _BatchNorm):
            self.module.running_mean, self.module.running_var = numbers
        else:
            self.module.weight, self.module.bias = numbers  # type: ignore[assignment]

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance inside each image, (B, C)."""
        if self.channels_second:
            if x.dim() == 4:
                # An odd step, so as not to keep pace with the blocks of JPEG.
                step = -(-min(x.shape[2:]) // _PLACES) // 2 * 2 + 1
                x = x[:, :, ::step, ::step]
            x = x.movedim(1, -1)
        x_BPC = x.reshape(len(x), -1, x.shape[-1]).float()
        mean_BC = x_BPC.mean(dim=1)
        # The difference of large numbers may be a little below zero.
        variance_BC = (x_BPC.square().mean(dim=1) - mean_BC.square()).clamp_min(0)
        return mean_BC, variance_BC


class Alignment:
    """Hooks on the normalisation layers of an image tower; does nothing until it is told to.

    Hooked layers pass their input through untouched outside of `applied` and `measured`, so the
    source model is always there.
    """

    def __init__(
        self, visual: nn.Module, reference: Moments | None = None, *, strength: float = STRENGTH
    ) -> None:
        """`reference` is what the sites see of normal frames; see the module for what if not.

        `strength` is the share of a departure that is undone, 0 to 1.
        """
        self._strength = strength
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
            self._reference = Moments.of_nothing(start, device)
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

    def affine(self, moments: Moments) -> Affine:
        """What maps a domain's moments onto the reference's, departures shrunk."""
        pairs = [
            self._site_affine(site, moments.part(site.span))
            if site.has_reference
            else (torch.ones_like(site_mean), torch.zeros_like(site_mean))
            for site in self._sites
            for site_mean in (moments.mean[site.span],)
        ]
        return Affine(
            torch.cat([scale for scale, _ in pairs]), torch.cat([shift for _, shift in pairs])
        )

    @contextmanager
    def applied(self, affine: Affine) -> Iterator[None]:
        """Within, every image is aligned by `affine`.

        It is folded into the layers' own numbers, so that it costs nothing.
        """
        before = []
        try:
            for site in self._sites:
                before.append(site.fold(affine.scale[site.span], affine.shift[site.span]))
            yield
        finally:
            for site, numbers in zip(self._sites, before, strict=False):
                site.unfold(numbers)

    @contextmanager
    def measured(
        self, prior: Moments | None = None, *, align: bool = True
    ) -> Iterator[list[Sample]]:
        """Within, one forward pass measures its batch; the result is appended to the list.

        Each layer is aligned by what was measured before it goes on (together with `prior`), so
        that deeper layers are measured as they will be seen. With `align=False` it only looks.
        """
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        folded: list[tuple[_Site, tuple[Tensor | None, Tensor | None]]] = []
        count = 0

        def act(site: _Site, x: Tensor) -> Tensor:
            nonlocal count
            count = count or len(x)
            if len(x) != count:  # not images, as the queries of a pooling layer
                return x
            here = site.look(x[:: _every(count)])
            seen[site.span.start] = here
            if not align or not site.has_reference:
                return x
            moments = Sample(*here).moments()
            if prior is not None:
                moments = prior.part(site.span).merged(moments)
            scale_C, shift_C = self._site_affine(site, moments)
            if site.is_batch_norm:
                folded.append((site, site.fold(scale_C, shift_C)))
                return x
            return torch.addcmul(
                site.view(shift_C, x).to(x.dtype), x, site.view(scale_C, x).to(x.dtype)
            )

        result: list[Sample] = []
        try:
            with self._acting(act):
                yield result
        finally:
            for site, numbers in reversed(folded):
                site.unfold(numbers)
        every = _every(count)
        shape = (-(-count // every), len(self._reference.mean))
        mean_NC = torch.zeros(shape, device=self._reference.mean.device)
        variance_NC = torch.ones_like(mean_NC)
        for site in self._sites:
            if site.span.start in seen:
                mean_NC[:, site.span], variance_NC[:, site.span] = seen[site.span.start]
        result.append(Sample(mean_NC, variance_NC, every))

    def _site_affine(self, site: _Site, moments: Moments) -> tuple[Tensor, Tensor]:
        return _site_affine(moments, self._reference.part(site.span), self._strength)

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


def _site_affine(table: Moments, reference: Moments, strength: float) -> tuple[Tensor, Tensor]:
    """Scale and shift of one site, with the departures shrunk and undone in part."""
    unit = reference.variance + EPSILON
    departure = (table.mean - reference.mean) / unit.sqrt()
    noise = _error(table.mean_spread / unit, table.count)
    noise = noise + _error(reference.mean_spread / unit, reference.count)
    departure = strength * _shrunk(departure, noise)
    width = table.variance + EPSILON
    log_ratio = torch.log(width / unit)
    noise = _error(table.variance_spread / width.square(), table.count)
    noise = noise + _error(reference.variance_spread / unit.square(), reference.count)
    ratio = torch.lerp(torch.ones_like(unit), _shrunk(log_ratio, noise).exp(), strength)
    scale = ratio.rsqrt()
    return scale, reference.mean - (reference.mean + departure * unit.sqrt()) * scale


def _every(images: int) -> int:
    """Which images of so many are measured: every n-th."""
    return max(1, -(-images // MEASURED_IMAGES))


def _error(spread: Tensor, count: int) -> Tensor:
    """Squared standard error of a mean over `count` images; of a given truth, none."""
    return spread / count if count else torch.zeros_like(spread)


def _shrunk(departure: Tensor, noise: Tensor) -> Tensor:
    """Departures less the share of their energy that noise explains."""
    share = noise.sum() / departure.square().sum().clamp_min(1e-12)
    return departure * (1 - share).clamp(0, 1)


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
