"""What a domain does to the features of all frames alike, taken away again.

What is left of a domain behind the tower moves all features one way, and favours the labels that
lie there. The domain's mean feature tells it, less the mean of normal frames, which share the
operator's scenes, and shrunk by what chance explains (James and Stein 1961, positive part).

A mean tells what is seen as well. Of a camera that looks at few kinds of things it is those
things, and taking it away would leave wrong answers that differ: with two of twenty labels it cost
18 points. So the domain must show nearly as many labels as normal frames do, and the centred
answers must say more and not be less sure, or features stay as they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.adapt.information import advantage
from agent.adapt.strategy import ZeroShot, entropy

#: Labels are counted in so many frames at a time.
WINDOW = 16


@dataclass(frozen=True, slots=True)
class Centre:
    """Where the features of normal frames lie.

    Attributes:
        mean_D: of unit features.
        frames: behind the mean.
        labels: effective number of labels that `WINDOW` frames are given.
    """

    mean_D: Tensor
    frames: int
    labels: float

    @classmethod
    def of(cls, features_ND: Tensor, logits_NK: Tensor) -> Centre:
        """Measured on normal frames, `WINDOW` of them or more, in an order of no meaning."""
        labels = logits_NK.argmax(dim=-1).tolist()
        spreads = [
            _spread(labels[start : start + WINDOW])
            for start in range(0, len(labels) - WINDOW + 1, WINDOW)
        ]
        return cls(features_ND.mean(dim=0), len(features_ND), math.exp(sum(spreads) / len(spreads)))

    def to(self, device: torch.device) -> Centre:
        """The same on another device."""
        return Centre(self.mean_D.to(device), self.frames, self.labels)


@dataclass(frozen=True, slots=True)
class CentreConfig:
    """When features are centred.

    Attributes:
        least: frames before which nothing is done.
        labels: of those that normal frames show, the share that the domain must show.
        margin: the advantage that centred answers must have.
        settled: frames after which older ones fade as new ones come.
    """

    least: int = 32
    labels: float = 0.6
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
        self.spread = 0.0  # mean entropy of a window's labels, nats
        self.windows = 0
        self.pays = False

    def state(self) -> dict[str, Tensor]:
        """As tensors by name."""
        return {
            "mean": self.mean_D.clone(),
            "answers": self.answers_2K.clone(),
            "vagueness": self.vagueness_2.clone(),
            "window": torch.tensor(self.window, dtype=torch.int64),
            "spread": torch.tensor(self.spread, dtype=torch.float64),
            "counters": torch.tensor([self.frames, self.windows, self.pays]),
        }

    def load(self, own: dict[str, Tensor]) -> None:
        """Take over what `state` returned.

        Raises:
            KeyError, RuntimeError: a part is missing, or of another shape.
        """
        self.mean_D.copy_(own["mean"])
        self.answers_2K.copy_(own["answers"])
        self.vagueness_2.copy_(own["vagueness"])
        self.window = own["window"].tolist()
        self.spread = float(own["spread"])
        self.frames, self.windows, pays = own["counters"].tolist()
        self.pays = bool(pays)


class Centring:
    """Centres the features of domains, and learns whether that pays."""

    def __init__(self, zero_shot: ZeroShot, centre: Centre | None, config: CentreConfig) -> None:
        """Without a `centre` of normal frames there is nothing to compare with."""
        self._zero_shot = zero_shot
        self._centre = centre
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
        before, state.pays = state.pays, self._pays(state, self._centre)
        return before or state.pays

    def _count(self, state: DomainCentre, label: int) -> None:
        state.window.append(label)
        if len(state.window) < WINDOW:
            return
        state.windows += 1
        share = 1 / min(state.windows, self._config.settled // WINDOW)
        state.spread += share * (_spread(state.window) - state.spread)
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

    def _pays(self, state: DomainCentre, centre: Centre) -> bool:
        if state.frames < self._config.least or not state.windows:
            return False
        if math.exp(state.spread) < self._config.labels * centre.labels:
            return False
        said_2 = entropy(state.answers_2K) - state.vagueness_2
        (plain, centred), (plain_nats, centred_nats) = said_2.tolist(), state.vagueness_2.tolist()
        return centred_nats <= plain_nats and advantage(centred, plain) > self._config.margin


def _spread(labels: Sequence[int]) -> float:
    """Entropy of the frequencies of labels, in nats."""
    shares = [count / len(labels) for count in Counter(labels).values()]
    return -sum(share * math.log(share) for share in shares)
