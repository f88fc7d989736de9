"""The strategies by the name they have in the configuration."""

from __future__ import annotations

from collections.abc import Callable

from agent.adapt.continual import Continual, ContinualConfig
from agent.adapt.frozen import Frozen
from agent.adapt.reference import Reference
from agent.adapt.strategy import Strategy, ZeroShot
from agent.encode import Encoder

Factory = Callable[[Encoder, ZeroShot, Reference | None, int, ContinualConfig], Strategy]

#: (encoder, labels, calibrated reference if any, seed, hyperparameters) → strategy.
STRATEGIES: dict[str, Factory] = {
    "continual": lambda encoder, zero_shot, reference, seed, config: Continual(
        encoder, zero_shot, reference=reference, seed=seed, config=config
    ),
    "frozen": lambda encoder, _zero_shot, _reference, _seed, _config: Frozen(encoder),
}
