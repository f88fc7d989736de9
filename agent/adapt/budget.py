"""How long adaptation may take, enforced by measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Seconds of adaptation that may be saved up. A new domain needs a burst, and then rarely more.
BURST_S = 20.0


class Budget:
    """Adaptation earns `fraction` of a second for each second of inference, and spends it.

    It starts with a full purse, so that the first domain is not met with empty hands; over a long
    run the share is kept.
    """

    def __init__(self, fraction: float, clock: Callable[[], float]) -> None:
        self._fraction = fraction
        self._clock = clock
        self._purse_s = BURST_S if fraction > 0 else 0.0
        self._inference_s = 0.0
        self._spent_s = 0.0

    @property
    def allows(self) -> bool:
        """Whether another unit of learning may start."""
        return self._purse_s > 0

    @property
    def is_ample(self) -> bool:
        """Whether so much is saved up that what can wait need not."""
        return self._purse_s > BURST_S / 2

    @property
    def used(self) -> float:
        """Adaptation time as a share of inference time since the start."""
        return self._spent_s / self._inference_s if self._inference_s else 0.0

    def earn(self, inference_s: float) -> None:
        """Tell it how long an inference took, in seconds."""
        self._inference_s += inference_s
        self._purse_s = min(BURST_S, self._purse_s + self._fraction * inference_s)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Measure what happens within."""
        start = self._clock()
        try:
            yield
        finally:
            elapsed = self._clock() - start
            self._spent_s += elapsed
            self._purse_s -= elapsed
