"""What a strategy is. `frozen`, which does nothing, is one like any other.

    pixels ─ encode ─→ features ─ zero-shot prompt ─→ logits ─ step ─→ adapted logits
                                                               ⋮
                              off the hot path, when the budget allows: learn

To add one, write one file with a class that has these members and name it in `agent.adapt.build`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ZeroShot:
    """The operator's labels as text features, which no strategy may change.

    Attributes:
        labels: K names.
        templates_TKD: unit text features of every template.
        scale: factor from cosine similarity to logits, the calibrated temperature included.
    """

    labels: tuple[str, ...]
    templates_TKD: Tensor
    scale: float

    @cached_property
    def text_KD(self) -> Tensor:
        """The zero-shot template ensemble: the normalised mean over the templates."""
        return F.normalize(self.templates_TKD.mean(dim=0), dim=-1)

    def tempered(self, temperature: float) -> ZeroShot:
        """The same labels with logits that are divided by `temperature`."""
        return replace(self, scale=self.scale / temperature)

    def logits(self, features_BD: Tensor) -> Tensor:
        """Logits (B, K) of the zero-shot prompt."""
        return self.scale * features_BD @ self.text_KD.T


@dataclass(frozen=True)
class Observation:
    """What a strategy sees of a batch; never a label of a frame.

    Attributes:
        pixels_BCHW: images in [0, 1] at the model's size, for strategies that make views.
        features_BD: unit features that the strategy's own `encode` returned.
        logits_BK: logits of the zero-shot prompt on these features.
        domains: each frame's domain.
        admitted_B: False where the frame was flagged as unknown; such frames teach nothing.
    """

    pixels_BCHW: Tensor
    features_BD: Tensor
    logits_BK: Tensor
    domains: Sequence[int]
    admitted_B: Tensor

    @cached_property
    def teaching(self) -> list[bool]:
        """Which frames something may be learned from: they were admitted, and have features."""
        teaching: list[bool] = (
            self.admitted_B & torch.isfinite(self.features_BD).all(dim=-1)
        ).tolist()  # at once: a GPU would wait at each frame
        return teaching

    @cached_property
    def vagueness(self) -> list[float]:
        """Entropy of the zero-shot prompt's answer to each frame, in nats."""
        nats: list[float] = entropy(self.logits_BK.softmax(dim=-1)).tolist()
        return nats


class Outcome(StrEnum):
    """What became of one unit of learning."""

    STEPPED = "stepped"
    ALIGNED = "aligned"
    DECLINED = "declined"
    NON_FINITE = "nonfinite"


class Strategy(Protocol):
    """Adapts predictions to a stream without labels. One thread calls it."""

    name: ClassVar[str]

    def encode(self, pixels_BCHW: Tensor, domains: Sequence[int]) -> Tensor:
        """Unit features (B, D) of images in [0, 1], each in its domain."""

    def step(self, seen: Observation) -> Tensor:
        """Adapted logits (B, K). Must not change its inputs."""

    def learn(self, thrifty: bool = False) -> Outcome | None:
        """One bounded unit of adaptation; None when there is nothing to do.

        If `thrifty`, only what cannot wait: a domain whose own frames were not judged yet.
        """

    def encoding(self, domain: int) -> int:
        """Which way the domain's frames are encoded; 0 is the source model's."""

    def version(self, domain: int) -> int:
        """How many times the domain's answers changed."""

    def distance(self, domain: int) -> float:
        """How far the domain's parameters are from their source, relative to the source's norm."""

    def begin(self, domain: int, kin: int | None) -> None:
        """Know nothing yet of a domain but that it looks like a change of `kin`, if that is given.

        Its id may have been another's before.
        """

    def reset(self, domain: int | None = None) -> None:
        """Return one domain, or all, exactly to the source."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on in another process, as tensors by name."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` of the same strategy, labels and checkpoint returned.

        Raises:
            KeyError, RuntimeError: the state is not of this strategy or these labels.
        """


def normalised_entropy(probabilities_BK: Tensor) -> Tensor:
    """Entropy along the last axis, as a share of the highest there can be."""
    return entropy(probabilities_BK) / math.log(probabilities_BK.shape[-1])


def entropy(probabilities_BK: Tensor) -> Tensor:
    """Shannon entropy in nats along the last axis."""
    terms: Tensor = torch.special.entr(probabilities_BK)
    return terms.sum(dim=-1)
