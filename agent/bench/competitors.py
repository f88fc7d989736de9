"""Who competes: the agent under each of its strategies, and the published peers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from agent.adapt.build import STRATEGIES
from agent.adapt.strategy import ZeroShot
from agent.assemble import recognizer
from agent.bench.ablations import ABLATIONS, NOTHING, Ablation
from agent.bench.peers import Peer
from agent.bench.peers.build import PEERS
from agent.calibration import Calibration
from agent.config import Config, ModelConfig
from agent.encode import Encoder
from agent.metrics import Metrics
from agent.types import Frame, FrameId, Record, Verdict

Answers = list[str]


class Competitor(Protocol):
    """Answers batches in order, and is never told a label."""

    def answer(self, cameras: Sequence[str], pixels: NDArray[np.uint8]) -> Answers:
        """The label of each frame, uint8 (B, S, S, 3)."""


@dataclass(frozen=True, slots=True)
class Arena:
    """What competitors are made of.

    Peers get the checkpoint and the labels, as where they were published; the calibration, which is
    part of running the agent, is the agent's alone.
    """

    encoder: Callable[[], Encoder]
    model: ModelConfig
    zero_shot: ZeroShot
    normal: Calibration
    seed: int


class AgentCompetitor:
    """The agent as it runs, from decoded frames to verdicts.

    Its budget is in seconds, so what it learns in time depends on the machine.
    """

    def __init__(
        self, arena: Arena, strategy: str, batch: int, ablation: Ablation = NOTHING
    ) -> None:
        labels = arena.zero_shot.tempered(arena.normal.temperature)
        adapt = {"strategy": strategy, "seed": arena.seed}
        config = Config.model_validate(
            {
                **ablation.changes,
                "adapt": adapt | ablation.changes.get("adapt", {}),
                "model": arena.model,
                "batch": {"max_size": batch},
            }
        )
        self.recognizer = recognizer(
            config,
            arena.encoder(),
            labels,
            arena.normal,
            Metrics(config.http.max_cameras),
            ablation.parameters,
        )
        self._frames = 0

    def answer(self, cameras: Sequence[str], pixels: NDArray[np.uint8]) -> Answers:
        """The agent's first label of each frame."""
        return [verdict.top[0].label for verdict in self.verdicts(cameras, pixels)]

    def verdicts(self, cameras: Sequence[str], pixels: NDArray[np.uint8]) -> list[Verdict]:
        """Recognise a batch, then learn as the pipeline does between two batches."""
        now = time.time()
        frames = [
            Frame(
                Record(FrameId("bench", 0, self._frames + row), None, None, (), now),
                camera,
                now,
                pixels[row],
            )
            for row, camera in enumerate(cameras)
        ]
        self._frames += len(frames)
        verdicts = self.recognizer.recognize(frames)
        self.recognizer.learn()
        return verdicts


class PeerCompetitor:
    """A published method in a bare loop, without the agent around it."""

    def __init__(self, arena: Arena, peer: Callable[..., Peer]) -> None:
        self._encoder = arena.encoder()
        self._labels = arena.zero_shot.labels
        self._peer = peer(self._encoder, arena.zero_shot, seed=arena.seed)

    @torch.no_grad()
    def answer(self, cameras: Sequence[str], pixels: NDArray[np.uint8]) -> Answers:
        """The peer's prediction of a batch."""
        logits_BK = self._peer.predict(self._encoder.to_device(list(pixels)))
        return [self._labels[k] for k in logits_BK.argmax(dim=-1).tolist()]


def competitor(name: str, arena: Arena, batch: int) -> Competitor:
    """The competitor called `name`: a strategy of the agent, an ablation of it, or a peer."""
    if name in STRATEGIES:
        return AgentCompetitor(arena, name, batch)
    if name in ABLATIONS:
        return AgentCompetitor(arena, "continual", batch, ABLATIONS[name])
    return PeerCompetitor(arena, PEERS[name])


#: Everyone, the baseline first.
COMPETITORS = ("frozen", "continual", *PEERS)
