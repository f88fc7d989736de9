"""The normalisation layers of an image tower, which most of the peers train and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from agent.adapt.strategy import ZeroShot
from agent.encode import Encoder
from agent.errors import ModelError


@contextmanager
def gradients() -> Iterator[None]:
    """Within, gradients are recorded, whatever the caller has turned off."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


def use_batch_statistics(visual: nn.Module, prior: float = 0.0) -> None:
    """Make every BatchNorm normalise by the mean and variance of the batch in front of it.

    `prior` is how many images the checkpoint's own statistics count for beside the batch's; without
    one, gradients flow through the statistics. A layer that sees one value per channel (a batch of
    one at a 1 x 1 map) has no variance to measure and keeps the checkpoint's statistics.
    """
    for module in visual.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_batch_statistics_of(module, prior))


def _batch_statistics_of(layer: Any, prior: float) -> Callable[[nn.Module, Any], None]:
    source_mean_C, source_variance_C = layer.running_mean, layer.running_var

    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        # A BatchNorm that has no statistics takes those of its batch, in evaluation mode too.
        mean_C, variance_C = None, None
        if x.numel() == x.shape[1]:
            mean_C, variance_C = source_mean_C, source_variance_C
        elif prior:
            share = len(x) / (len(x) + prior)
            batch_mean_C, batch_variance_C = _moments(x)
            mean_C = torch.lerp(source_mean_C, batch_mean_C, share)
            variance_C = torch.lerp(source_variance_C, batch_variance_C, share)
        module.running_mean, module.running_var = mean_C, variance_C

    return hook


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel; torch.var_mean takes several times as long over an image."""
    others = [axis for axis in range(x.dim()) if axis != 1]
    mean = x.float().mean(dim=others, keepdim=True)
    variance_C = (x - mean).square().mean(dim=others)
    return mean.flatten(), variance_C


class TrainedNorms:
    """A copy of an encoder on batch statistics, whose affine normalisation weights SGD trains.

    Attributes:
        parameters: scales and shifts of BatchNorm, LayerNorm and GroupNorm, in the tower's order.
        source: their values in the checkpoint.
        optimizer: momentum SGD over them.
    """

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        learning_rate: float,
        momentum: float,
        nesterov: bool = False,
        frozen: Callable[[Sequence[str]], Sequence[str]] = lambda names: (),
    ) -> None:
        """`frozen` is told the normalisation layers' names, and says which are not trained."""
        self._encoder = encoder.with_own_visual()
        self._zero_shot = zero_shot
        layers = dict(_norms(self._encoder.visual))
        use_batch_statistics(self._encoder.visual)
        skipped = set(frozen(list(layers)))
        self.parameters = [
            parameter
            for name, layer in layers.items()
            if name not in skipped
            for parameter in layer.parameters(recurse=False)
        ]
        if not self.parameters:
            raise ModelError(f"{encoder.name} has no normalisation layer to train")
        self.source = [parameter.detach().clone() for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=learning_rate, momentum=momentum, nesterov=nesterov
        )

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """Zero-shot logits (B, K) by the tower as it is now."""
        return self._zero_shot.logits(self._encoder.encode_image(pixels_BCHW))

    def backward(self, loss: Tensor) -> None:
        """Leave the loss's gradients, and no others, at the parameters."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]

    def descend(self, loss: Tensor) -> None:
        """One step of SGD."""
        self.backward(loss)
        self.optimizer.step()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the checkpoint, with no memory of earlier gradients."""
        for parameter, source in zip(self.parameters, self.source, strict=True):
            parameter.copy_(source)
        self.optimizer.state.clear()


def _norms(visual: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in visual.named_modules():
        if isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm):
            yield name, module
