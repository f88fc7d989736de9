"""The streams that strategies are compared on: seeded, and the same for all of them.

A suite is a list of shots. Each names a photograph, the condition it was taken under, the camera
and the phase whose accuracy it counts for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from agent.bench.corruptions import IMAGENET_C
from agent.bench.pool import CLEAR, Condition, Pool
from agent.errors import AgentError

BATCH = 32
#: The severest of ImageNet-C, where methods are usually compared.
WORST = 5


@dataclass(frozen=True, slots=True)
class Shot:
    """One frame of a stream: which photograph, how it looks, and where its answer counts."""

    photo: int
    condition: Condition
    phase: str
    camera: str = "camera-0"


@dataclass(frozen=True, slots=True)
class Suite:
    """A stream.

    Attributes:
        shots: the frames in order.
        batch: frames that are answered together.
        held_out: names that are left out of the label list, so that their photographs are unknown.
    """

    name: str
    shots: tuple[Shot, ...]
    batch: int = BATCH
    held_out: frozenset[str] = frozenset()

    @property
    def conditions(self) -> list[Condition]:
        """Everything that befalls a photograph, each once."""
        return list(dict.fromkeys(shot.condition for shot in self.shots))


class _Dealer:
    """Photographs dealt like cards: each as often as any other, in seeded order."""

    def __init__(self, pool: Pool, rng: np.random.Generator) -> None:
        self._photos = np.array(pool.stream)
        self._rng = rng
        self._cards = self._forever()

    def _forever(self) -> Iterator[int]:
        while True:
            yield from self._rng.permutation(self._photos).tolist()

    def deal(self, n: int) -> list[int]:
        return [next(self._cards) for _ in range(n)]


def continual(pool: Pool, frames: int, rng: np.random.Generator) -> Suite:
    """Clear, the 15 corruptions of ImageNet-C at their worst, clear again."""
    dealer = _Dealer(pool, rng)
    storm = [(str(c), c) for c in (Condition(name, WORST) for name in IMAGENET_C)]
    plan = [("clear", CLEAR), *storm, ("clear again", CLEAR)]
    return Suite("continual", _phases(plan, dealer, frames))


def gradual(pool: Pool, frames: int, rng: np.random.Generator) -> Suite:
    """Each corruption waxes from severity 1 to 5 and wanes again; `frames` a step, at most 192.

    CoTTA's gradual set-up (Wang et al. 2022), where each step is as long as any other phase.
    """
    dealer = _Dealer(pool, rng)
    steps = [1, 2, 3, 4, 5, 4, 3, 2, 1]
    each = min(frames, 192)
    plan = [(name, Condition(name, step)) for name in IMAGENET_C for step in steps]
    return Suite("gradual", _phases(plan, dealer, each))


def recurring(pool: Pool, frames: int, rng: np.random.Generator) -> Suite:
    """Clear, fog, night and noise come round 20 times; `frames` a visit, at most 100.

    The phases tell the first half of a visit from the second.
    """
    dealer = _Dealer(pool, rng)
    length = min(frames, 100)
    shots: list[Shot] = []
    for visit in range(20):
        for name in ("clear", "fog", "night", "gaussian_noise"):
            condition = CLEAR if name == "clear" else Condition(name, WORST)
            for place, photo in enumerate(dealer.deal(length)):
                part = "new" if visit == 0 else "arrival" if place < length // 2 else "stay"
                shots.append(Shot(photo, condition, f"{name}, {part}"))
    return Suite("recurring", tuple(shots))


def mixed(pool: Pool, frames: int, rng: np.random.Generator) -> Suite:
    """Eight cameras, each in a domain of its own, side by side in every batch."""
    dealer = _Dealer(pool, rng)
    names = ("fog", "night", "gaussian_noise", "defocus_blur", "contrast", "snow", "pixelate")
    conditions = [CLEAR, *(Condition(name, WORST) for name in names)]
    shots = [
        Shot(photo, condition, str(condition), f"camera-{number}")
        for _ in range(frames)
        for number, (condition, photo) in enumerate(zip(conditions, dealer.deal(8), strict=True))
    ]
    return Suite("mixed", tuple(shots))


_WEATHER = [
    CLEAR,
    *(Condition(name, WORST) for name in ("fog", "night", "gaussian_noise", "contrast")),
    CLEAR,
]


def correlated(pool: Pool, frames: int, rng: np.random.Generator) -> Suite:
    """What is seen comes sorted by label, as when a camera looks at one thing for long."""
    shots: list[Shot] = []
    order = {label: rank for rank, label in enumerate(rng.permutation(sorted(set(pool.labels))))}
    for place, condition in enumerate(_WEATHER):
        dealt = _Dealer(pool, rng).deal(frames)
        dealt.sort(key=lambda photo: order[pool.labels[photo]])
        shots += [Shot(photo, condition, _again(condition, place)) for photo in dealt]
    return Suite("correlated", tuple(shots))


def imbalanced(pool: Pool, frames: int, rng: np.random.Generator) -> Suite:
    """Few labels are common and most are rare: their frequencies follow Zipf's law."""
    labels = rng.permutation(sorted({pool.labels[i] for i in pool.stream}))
    shares = 1 / np.arange(1, len(labels) + 1)
    by_label: dict[str, list[int]] = {}
    for photo in pool.stream:
        by_label.setdefault(pool.labels[photo], []).append(photo)
    shots: list[Shot] = []
    for place, condition in enumerate(_WEATHER):
        for label in rng.choice(labels, size=frames, p=shares / shares.sum()):
            photo = int(rng.choice(by_label[label]))
            shots.append(Shot(photo, condition, _again(condition, place)))
    return Suite("imbalanced", tuple(shots))


def _open(share: float) -> Callable[[Pool, int, np.random.Generator], Suite]:
    def suite(pool: Pool, frames: int, rng: np.random.Generator) -> Suite:
        names = rng.permutation(sorted(set(pool.labels)))
        held_out = frozenset(names[: len(names) // 2].tolist())
        strange = np.array([i for i in pool.stream if pool.labels[i] in held_out])
        known = np.array([i for i in pool.stream if pool.labels[i] not in held_out])
        if not len(strange) or not len(known):
            raise AgentError("too few labels: some must be known and some unknown")
        shots = [
            Shot(
                int(rng.choice(strange if rng.random() < share else known)),
                condition,
                _again(condition, place),
            )
            for place, condition in enumerate(_WEATHER)
            for _ in range(frames)
        ]
        return Suite(f"open-{share:.0%}".rstrip("%"), tuple(shots), held_out=held_out)

    suite.__doc__ = f"{share:.0%} of the frames show what is not in the label list."
    return suite


def single(pool: Pool, frames: int, rng: np.random.Generator) -> Suite:
    """Weather that comes and goes, one frame at a time."""
    dealer = _Dealer(pool, rng)
    plan = [(_again(c, place), c) for place, c in enumerate(_WEATHER)]
    return Suite("single", _phases(plan, dealer, frames), batch=1)


def lowres(pool: Pool, frames: int, rng: np.random.Generator) -> Suite:
    """The resolution falls to an eighth and comes back."""
    dealer = _Dealer(pool, rng)
    steps = [0, 1, 2, 3, 2, 1, 0]
    plan = [
        (f"1/{2**step}" if step else "full", Condition("lowres", step) if step else CLEAR)
        for step in steps
    ]
    return Suite("lowres", _phases(plan, dealer, frames))


def long(pool: Pool, frames: int, rng: np.random.Generator) -> Suite:
    """Weather that goes round for 100,000 frames or more; phases are tenths of the stream."""
    dealer = _Dealer(pool, rng)
    names = ("fog", "night", "gaussian_noise", "contrast", "motion_blur", "snow", "pixelate")
    conditions = [CLEAR, *(Condition(name, WORST) for name in names)]
    frames = min(frames, 1250)
    rounds = 10 * math.ceil(10_000 / (frames * len(conditions)))
    shots = [
        Shot(photo, condition, f"tenth {1 + 10 * turn // rounds}")
        for turn in range(rounds)
        for condition in conditions
        for photo in dealer.deal(frames)
    ]
    return Suite("long", tuple(shots))


#: (pool, frames a phase, generator) → suite.
SUITES: dict[str, Callable[[Pool, int, np.random.Generator], Suite]] = {
    "continual": continual,
    "gradual": gradual,
    "recurring": recurring,
    "mixed": mixed,
    "correlated": correlated,
    "imbalanced": imbalanced,
    "open-25": _open(0.25),
    "open-50": _open(0.5),
    "single": single,
    "lowres": lowres,
    "long": long,
}


def _phases(
    plan: Sequence[tuple[str, Condition]], dealer: _Dealer, frames: int
) -> tuple[Shot, ...]:
    return tuple(
        Shot(photo, condition, phase) for phase, condition in plan for photo in dealer.deal(frames)
    )


def _again(condition: Condition, place: int) -> str:
    return f"{condition} again" if condition == CLEAR and place else str(condition)
