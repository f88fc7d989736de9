"""The probability that a verdict's first label is right, calibrated without labels.

A softmax is too sure of itself where the world has shifted. How much, the calibration learns from
its own frames: it spoils them more and more and sees how often the answer stays what it was. Tomani
et al. 2021, "Post-hoc Uncertainty Calibration for Domain Drift Scenarios", with the answer to the
sound frame in the label's place.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.adapt.strategy import normalised_entropy

#: Patches a side that frames are cut into and put together again in another order; no corruption
#: that a benchmark shows. The sound frame is the mildest.
GRIDS = (1, 2, 4, 7)
#: Frames of a domain that its vagueness is the mean over.
WINDOW = 64
#: Weight of the belief that the softmax is right, in frames.
_PRIOR = 8.0
_FURTHEST = 1e-4


def shuffled(pixels_BCHW: Tensor, grid: int, generator: torch.Generator) -> Tensor:
    """Images cut into `grid` × `grid` patches that changed places, at their old size."""
    frames, channels, size, _ = pixels_BCHW.shape
    side = size // grid
    fitting = F.interpolate(pixels_BCHW, (side * grid, side * grid), mode="bilinear")
    cut = fitting.reshape(frames, channels, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
    patches_BPCHW = cut.reshape(frames, grid * grid, channels, side, side)
    order_BP = torch.stack(
        [torch.randperm(grid * grid, generator=generator) for _ in range(frames)]
    )
    moved = patches_BPCHW[torch.arange(frames)[:, None], order_BP]
    moved = moved.reshape(frames, grid, grid, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    whole_BCHW = moved.reshape(frames, channels, side * grid, side * grid)
    return F.interpolate(whole_BCHW, (size, size), mode="bilinear")


@dataclass(frozen=True, slots=True)
class ConfidenceModel:
    """σ(bias + slope · logit(p) + doubt · vagueness): p is the first label's softmax.

    Vagueness is the mean entropy of the domain's recent answers, as a share of the highest there
    can be.
    """

    bias: float = 0.0
    slope: float = 1.0
    doubt: float = 0.0

    def __call__(self, probability_B: Tensor, vagueness_B: Tensor) -> Tensor:
        """Probability (B,) of being right."""
        weights = torch.tensor([self.bias, self.slope, self.doubt], device=probability_B.device)
        return torch.sigmoid(_terms(probability_B, vagueness_B) @ weights)

    @classmethod
    def fit(cls, sound_NK: Tensor, spoilt: Sequence[Tensor]) -> ConfidenceModel:
        """Fit to the probabilities of frames as they are and spoilt ever more, (N, K) each.

        Logistic regression of the probability that the sound frame's answer gives to the label that
        the spoilt one's puts first.
        """
        tops, vague, targets = [], [], []
        for probability_NK in spoilt:
            top = probability_NK.max(dim=-1)
            tops.append(top.values)
            vague.append(normalised_entropy(probability_NK).mean().expand(len(probability_NK)))
            targets.append(sound_NK.gather(1, top.indices[:, None])[:, 0])
        terms_N3 = _terms(torch.cat(tops), torch.cat(vague)).double().cpu()
        target_N = torch.cat(targets).double().cpu()
        believed = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        weights = believed.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> float:
            optimizer.zero_grad()
            misfit = F.binary_cross_entropy_with_logits(
                terms_N3 @ weights, target_N, reduction="sum"
            )
            total = misfit + _PRIOR / 2 * (weights - believed).square().sum()
            total.backward()  # type: ignore[no-untyped-call]
            return float(total.detach())

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        bias, slope, doubt = weights.detach().tolist()
        # Frames that say nothing, such as one frame many times, must not turn sure into unsure.
        if not all(map(math.isfinite, (bias, slope, doubt))) or slope <= 0:
            return cls()
        return cls(bias, slope, doubt)


@dataclass(slots=True)
class Confidence:
    """The model applied to a stream: it follows how vague the answers of each domain are."""

    model: ConfidenceModel
    _vagueness: dict[int, deque[float]] = field(default_factory=dict)
    _recent: dict[int, deque[float]] = field(default_factory=dict)

    def observe(
        self, domains: Sequence[int], probabilities_BK: Tensor, admitted: Sequence[bool]
    ) -> list[float]:
        """How probable it is that the first label is right, if any label is.

        Frames that were not admitted are unknown; they say nothing of their domain.
        """
        own = normalised_entropy(probabilities_BK).tolist()
        for domain, each, is_admitted in zip(domains, own, admitted, strict=True):
            if is_admitted:
                self._vagueness.setdefault(domain, deque(maxlen=WINDOW)).append(each)
        usual_B = torch.tensor(
            [
                fmean(self._vagueness.get(domain, [each]))
                for domain, each in zip(domains, own, strict=True)
            ]
        )
        confidences: list[float] = self.model(probabilities_BK.amax(dim=-1).cpu(), usual_B).tolist()
        for domain, confidence, is_admitted in zip(domains, confidences, admitted, strict=True):
            if is_admitted:
                self._recent.setdefault(domain, deque(maxlen=WINDOW)).append(confidence)
        return confidences

    def usual(self, domain: int) -> float:
        """Mean confidence of the domain's recent known frames: its accuracy, as far as one knows.

        NaN while there were none.
        """
        recent = self._recent.get(domain)
        return fmean(recent) if recent else float("nan")

    def forget(self, domain: int) -> None:
        """Drop what is known of a domain whose id is used anew, or that is encoded otherwise."""
        self._vagueness.pop(domain, None)
        self._recent.pop(domain, None)


def _terms(probability_B: Tensor, vagueness_B: Tensor) -> Tensor:
    certain_B = torch.logit(probability_B.clamp(_FURTHEST, 1 - _FURTHEST))
    return torch.stack([torch.ones_like(certain_B), certain_B, vagueness_B], dim=-1)
