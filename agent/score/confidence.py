"""The probability that a verdict's first label is right, calibrated without labels.

A softmax is too sure of itself where the world has shifted. How much, the calibration learns from
its own frames: it spoils them more and more and sees how often the answer stays what it was. Tomani
et al. 2021, "Post-hoc Uncertainty Calibration for Domain Drift Scenarios", with the answer to the
sound frame in the label's place.
"""

from __future__ import annotations

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
#: The most that is believed of answers: then the vaguest domain's are worth nothing.
MAX_DOUBT = 100.0
#: Precision of the belief that the softmax is right: it decides where frames are few or all alike.
_PRIOR = 0.3
_FURTHEST = 1e-4
_EXACT = 1e-6


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
    """σ(logit(p) − doubt · max(0, vagueness − usual)): p is the first label's softmax.

    Vagueness is the mean entropy of the domain's recent answers, as a share of the highest there
    can be; `usual` is what it is on normal frames, whose softmax temperature scaling already made
    honest.
    """

    doubt: float = 0.0
    usual: float = 0.0

    def __call__(self, probability_B: Tensor, vagueness_B: Tensor) -> Tensor:
        """Probability (B,) of being right."""
        excess_B = (vagueness_B - self.usual).clamp_min(0)
        return torch.sigmoid(_logit(probability_B) - self.doubt * excess_B)

    @classmethod
    def fit(cls, sound_NK: Tensor, spoilt: Sequence[Tensor]) -> ConfidenceModel:
        """Fit to the probabilities of frames as they are and spoilt ever more, (N, K) each.

        Logistic regression of the probability that the sound frame's answer gives to the label that
        the spoilt one's puts first. Doubt is never negative: vaguer answers are not worth more.
        """
        usual = float(normalised_entropy(sound_NK).mean())
        certain, excess, targets = [], [], []
        for probability_NK in spoilt:
            top = probability_NK.max(dim=-1)
            certain.append(_logit(top.values))
            vagueness = normalised_entropy(probability_NK).mean() - usual
            excess.append(vagueness.clamp_min(0).expand(len(probability_NK)))
            targets.append(sound_NK.gather(1, top.indices[:, None])[:, 0])
        certain_N, excess_N = torch.cat(certain).double(), torch.cat(excess).double()
        target_N = torch.cat(targets).double()

        def slope(doubt: float) -> float:
            """Of the penalised loss, which is convex in doubt."""
            believed_N = torch.sigmoid(certain_N - doubt * excess_N)
            return float(((target_N - believed_N) * excess_N).sum()) + _PRIOR * doubt

        low, high = 0.0, MAX_DOUBT
        while high - low > _EXACT:
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        return cls(low, usual)


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


def _logit(probability_B: Tensor) -> Tensor:
    return torch.logit(probability_B.clamp(_FURTHEST, 1 - _FURTHEST))
