"""What a domain does to the features of all frames alike, taken away again.

What is left of a domain behind the tower moves all features one way, and favours the labels that
lie there. The domain's mean feature tells it, less the mean of normal frames, which share the
operator's scenes, and shrunk by what chance explains (James and Stein 1961, positive part).

A mean tells what is seen as well. Of a camera that looks at few kinds of things it is those
things, and taking it away would leave wrong answers that differ: with two of twenty labels it cost
18 points. So the domain must show at least half as many labels as normal frames do, and the centred
answers must say more and not be less sure, or features stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.adapt.information import NARROW, WINDOW, advantage, variety
from agent.adapt.reference import Reference
from agent.adapt.strategy import ZeroShot, entropy


@dataclass(frozen=True, slots=True)
class CentreConfig:
    """When features are centred.

    Attributes:
        least: frames before which nothing is done.
        narrow: share of the variety of normal answers that the domain's must have.
        margin: the advantage that centred answers must have.
        settled: frames after which older ones fade as new ones come.
    """

    least: int = 32
    narrow: float = NARROW
    margin: float = 0.02
    settled: int = 512


class DomainCentre:
    """What is known of one domain's features; answers are the plain ones' and the centred ones'."""

    def __init__(self, features: int, labels: int, device: torch.device) -> None:
        self.mean_D = torch.zeros(features, device=device)
        self.answers_2K = torch.zeros(2, labels, device=device)  # mean probabilities
        self.vagueness_2 = torch.zeros(2, device=device)  # mean entropy, nats
        self.frames = 0
        self.window: list[int] = []  # the last labels, fewer than WINDOW
        self.variety = 0.0  # running geometric mean over windows, as a logarithm
        self.windows = 0
        self.pays = False

    def state(self) -> dict[str, Tensor]:
        """As tensors by name."""
        return {
            "mean": self.mean_D.clone(),
            "answers": self.answers_2K.clone(),
            "vagueness": self.vagueness_2.clone(),
            "window": torch.tensor(self.window, dtype=torch.int64),
            "variety": torch.tensor(self.variety, dtype=torch.float64),
            "counters": torch.tensor([self.frames, self.windows, self.pays]),
        }

    def load(self, own: dict[str, Tensor]) -> None:
        """Take over what `state` returned.

        Raises:
            KeyError, ValueError: a part is missing, or cannot be.
        """
        for name, mine in (
            ("mean", self.mean_D),
            ("answers", self.answers_2K),
            ("vagueness", self.vagueness_2),
        ):
            if own[name].shape != mine.shape or not bool(torch.isfinite(own[name]).all()):
                raise ValueError(f"the domain's centre: {name}")
            mine.copy_(own[name])
        if own["window"].dim() != 1 or len(own["window"]) >= WINDOW:
            raise ValueError("the domain's centre: window")
        self.window = own["window"].tolist()
        self.variety = float(own["variety"])
        self.frames, self.windows, pays = own["counters"].tolist()
        if min(self.frames, self.windows) < 0 or not 0 <= self.variety <= math.log(WINDOW) + 1e-6:
            raise ValueError("the domain's centre: counters")
        self.pays = bool(pays)


class Centring:
    """Centres the features of domains, and learns whether that pays."""

    def __init__(
        self, zero_shot: ZeroShot, reference: Reference | None, config: CentreConfig
    ) -> None:
        """Without a `reference` there is nothing to compare with, and nothing is centred."""
        self._zero_shot = zero_shot
        device = zero_shot.text_KD.device
        self._centre = reference.centre.to(device) if reference else None
        self._variety = reference.variety if reference else math.inf
        self._config = config

    def domain(self) -> DomainCentre:
        """Of a domain that nothing is known of yet."""
        text_KD = self._zero_shot.text_KD
        return DomainCentre(text_KD.shape[1], text_KD.shape[0], text_KD.device)

    def centred(self, state: DomainCentre, features_BD: Tensor) -> Tensor:
        """The features to answer with: unit features (B, D), centred where that pays."""
        return self._moved(state, features_BD) if state.pays else features_BD

    def learn(
        self,
        state: DomainCentre,
        features_BD: Tensor,
        logits_BK: Tensor,
        teaching: Sequence[bool],
        novel: Sequence[bool],
    ) -> bool:
        """Take in a batch's features and their zero-shot logits; whether answers now differ.

        `teaching` frames say which labels are seen; those that are `novel` as well, the rest.
        """
        if self._centre is None:
            return False
        for label, teaches in zip(logits_BK.argmax(dim=-1).tolist(), teaching, strict=True):
            if teaches:
                self._count(state, label)
        rows = [row for row, new in enumerate(novel) if new]
        if not rows:
            return False
        share = len(rows) / (min(state.frames, self._config.settled) + len(rows))
        state.frames += len(rows)
        new_RD = features_BD[rows]
        state.mean_D.lerp_(new_RD.mean(dim=0), share)
        centred_RK = self._zero_shot.logits(self._moved(state, new_RD))
        answers_2RK = torch.stack([logits_BK[rows], centred_RK]).softmax(dim=-1)
        state.answers_2K.lerp_(answers_2RK.mean(dim=1), share)
        state.vagueness_2.lerp_(entropy(answers_2RK).mean(dim=1), share)
        before, state.pays = state.pays, self._pays(state)
        return before or state.pays

    def _count(self, state: DomainCentre, label: int) -> None:
        state.window.append(label)
        if len(state.window) < WINDOW:
            return
        state.windows += 1
        share = 1 / min(state.windows, self._config.settled // WINDOW)
        state.variety += share * (math.log(variety(state.window)) - state.variety)
        state.window.clear()

    def _moved(self, state: DomainCentre, features_BD: Tensor) -> Tensor:
        if self._centre is None or not state.frames:
            return features_BD
        departure_D = state.mean_D - self._centre.mean_D
        # Unit features vary about their mean by what its length lacks of one.
        noise = (1 - state.mean_D.square().sum()) / min(state.frames, self._config.settled)
        noise = noise + (1 - self._centre.mean_D.square().sum()) / self._centre.frames
        share = (1 - noise / departure_D.square().sum().clamp_min(1e-12)).clamp(0, 1)
        return F.normalize(features_BD - share * departure_D, dim=-1)

    def _pays(self, state: DomainCentre) -> bool:
        if state.frames < self._config.least or not state.windows:
            return False
        if math.exp(state.variety) < self._config.narrow * self._variety:
            return False
        said_2 = entropy(state.answers_2K) - state.vagueness_2
        (plain, centred), (plain_nats, centred_nats) = said_2.tolist(), state.vagueness_2.tolist()
        return centred_nats <= plain_nats and advantage(centred, plain) > self._config.margin
