"""How much a model's answers say of the frames: a judge of adaptation that needs no labels."""

from __future__ import annotations

import torch
from torch import Tensor

from agent.adapt.strategy import entropy


class Answers:
    """Fading averages of a model's answers to a stream of galleries."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.marginal_K: Tensor | None = None
        self.entropy = 0.0

    def add(self, probabilities_BK: Tensor, fade: float = 0.85) -> None:
        """Take in a gallery's probabilities; older galleries count `fade` times what they did."""
        self.weight = fade * self.weight + 1
        share = 1 / self.weight
        marginal_K = probabilities_BK.mean(dim=0)
        if self.marginal_K is None:
            self.marginal_K = marginal_K
        self.marginal_K = torch.lerp(self.marginal_K, marginal_K, share)
        self.entropy += share * (float(entropy(probabilities_BK).mean()) - self.entropy)

    @property
    def information(self) -> float:
        """Mutual information of frame and answer, in nats: marginal less conditional entropy.

        High when answers are sure and differ from frame to frame (Bridle et al. 1991, "Unsupervised
        classifiers, mutual information and phantom targets").
        """
        if self.marginal_K is None:
            return 0.0
        return float(entropy(self.marginal_K)) - self.entropy

    def state(self, name: str) -> dict[str, Tensor]:
        """As tensors whose names begin with `name`."""
        if self.marginal_K is None:
            return {}
        return {
            f"{name}.marginal": self.marginal_K.clone(),
            f"{name}.averages": torch.tensor([self.weight, self.entropy], dtype=torch.float64),
        }

    def load_state(self, state: dict[str, Tensor], name: str) -> None:
        """Take over what `state` gave."""
        if f"{name}.marginal" in state:
            self.marginal_K = state[f"{name}.marginal"].clone()
            self.weight, self.entropy = state[f"{name}.averages"].tolist()
