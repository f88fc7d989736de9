"""Puts the parts together as the configuration says. Only commands call this."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from agent import encode
from agent.adapt.budget import Budget
from agent.adapt.build import STRATEGIES
from agent.adapt.continual import ContinualConfig
from agent.adapt.domains import DomainConfig, DomainMemory
from agent.adapt.fit import Fit, FitConfig
from agent.adapt.guard import Guard, GuardConfig
from agent.adapt.strategy import ZeroShot
from agent.batch import Batcher
from agent.calibration import Calibration, subject_of
from agent.config import Config, ModelConfig, fingerprint
from agent.decode import Decoder
from agent.drift.monitor import DriftMonitor, DriftPolicy
from agent.encode import Encoder
from agent.finds.allowance import Allowance
from agent.finds.directory import DAY_S, DirectoryStore
from agent.finds.find import Store
from agent.finds.keeper import Keeper
from agent.finds.seen import Seen
from agent.finds.topic import TopicStore
from agent.health import Health, StatusApp, serve
from agent.metrics import Metrics
from agent.pipeline import QUEUE_BATCHES, Pipeline
from agent.recognize import Clocks, Recognizer
from agent.score.confidence import Confidence, ConfidenceModel
from agent.score.judge import Judge
from agent.score.novelty import Novelty, Score
from agent.score.threshold import Thresholds
from agent.sinks import Sink
from agent.sinks.jsonl import JsonlSink
from agent.sinks.kafka import KafkaSink
from agent.sources import Source
from agent.sources.directory import DirectorySource
from agent.sources.kafka import KafkaSource
from agent.sources.video import VideoSource

_CLOCKS = Clocks(monotonic=time.monotonic, wall=time.time)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Agent:
    """A running agent's parts that its caller may touch."""

    pipeline: Pipeline
    metrics: Metrics
    health: Health
    port: int


@contextmanager
def agent(config: Config) -> Iterator[Agent]:
    """Build everything, release it on exit. Probes answer while the model still loads.

    Raises:
        AgentError: a part cannot be had; the message says what to do.
    """
    with ExitStack() as stack:
        metrics = Metrics(config.http.max_cameras)
        health = Health(time.monotonic, config.http.stalled_after_s)
        server = serve(StatusApp(health, metrics.registry), config.http)
        stack.callback(server.close)
        encoder = encode.load(config.model)
        normal = _calibration(config, encoder)
        labels = zero_shot(encoder, config.model, normal.temperature if normal else 1.0)
        keeper = novelty_keeper(config, encoder.name, labels, metrics)
        if keeper is not None:
            stack.callback(keeper.close)
        judge = recognizer(config, encoder, labels, normal, metrics, keeper=keeper)
        health.model_loaded = True

        size = encoder.preprocess.size
        decoder = Decoder(config.decode, size, encoder.preprocess.crop_ratio)
        stack.callback(decoder.close)
        sink = _sink(config)
        stack.callback(sink.close)
        source = _source(config)
        stack.callback(source.close)
        pipeline = Pipeline(
            source,
            decoder,
            Batcher(config.batch, decoder, time.monotonic),
            judge,
            sink,
            queue_limit=QUEUE_BATCHES * config.batch.max_size,
            health=health,
            metrics=metrics,
            clock=time.monotonic,
        )
        metrics.config_info.info(
            {
                "fingerprint": fingerprint(config),
                "strategy": config.adapt.strategy,
                "model": encoder.name,
            }
        )
        metrics.config_last_success.set_to_current_time()
        yield Agent(pipeline, metrics, health, server.port)


def zero_shot(
    encoder: Encoder,
    model: ModelConfig,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ZeroShot:
    """Encode the operator's labels; warns of words that the checkpoint was never taught."""
    unknown = encoder.unknown_labels(model.labels)
    if unknown:
        _log.warning(
            "the offline checkpoint was never taught some words of these labels and will "
            "recognise them poorly: %s",
            ", ".join(unknown),
        )
    return ZeroShot(
        labels=tuple(model.labels),
        templates_TKD=encoder.encode_labels(model.labels, model.templates, progress),
        scale=encoder.logit_scale / temperature,
    )


def _calibration(config: Config, encoder: Encoder) -> Calibration | None:
    if config.calibration is not None:
        return Calibration.load(
            Path(config.calibration),
            subject_of(encoder, config.model),
            len(config.model.labels),
        )
    if config.adapt.strategy != "frozen":
        _log.warning(
            "no calibration is configured: statistics alignment is off, unknown frames are told by "
            "their energy, probabilities are not calibrated, and the first frames are taken for "
            "normal; see tta-agent calibrate --help"
        )
    return None


@dataclass(frozen=True, slots=True)
class Parameters:
    """What no operator sets: one set of hyperparameters for every stream and label set."""

    continual: ContinualConfig = field(default_factory=ContinualConfig)
    domains: DomainConfig = field(default_factory=DomainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    fit: FitConfig = field(default_factory=FitConfig)


def recognizer(
    config: Config,
    encoder: Encoder,
    labels: ZeroShot,
    normal: Calibration | None,
    metrics: Metrics,
    parameters: Parameters = Parameters(),
    keeper: Keeper | None = None,
) -> Recognizer:
    """The model with what adapts and watches it, as `config` says."""
    reference = normal.reference if normal else None
    score, novelty = _novelty(Score(config.ood.score), encoder, labels, normal)
    strategy = STRATEGIES[config.adapt.strategy](
        encoder, labels, reference, config.adapt.seed, parameters.continual
    )
    return Recognizer(
        encoder,
        labels,
        strategy,
        domains=DomainMemory(
            replace(parameters.domains, max_domains=config.adapt.max_domains),
            reference.style if reference else None,
        ),
        judge=Judge(
            partial(novelty.score, score),
            Thresholds(config.ood.false_alarm_rate, normal.normal[score] if normal else None),
        ),
        confidence=Confidence(normal.confidence if normal else ConfidenceModel()),
        drift=DriftMonitor(
            DriftPolicy(
                config.drift.window,
                config.drift.false_alarm_every,
                config.drift.site,
            ),
            normal.drift if normal else None,
            labels.text_KD,
            torch.Generator().manual_seed(config.adapt.seed),
        ),
        guard=Guard(parameters.guard),
        fit=Fit(parameters.fit),
        budget=Budget(config.adapt.budget, time.monotonic),
        audit=config.adapt.audit,
        metrics=metrics,
        clocks=_CLOCKS,
        keeper=keeper,
    )


def _novelty(
    score: Score, encoder: Encoder, labels: ZeroShot, normal: Calibration | None
) -> tuple[Score, Novelty]:
    """What scores novelty; without a calibration, a score that needs none."""
    if normal is not None:
        negatives_MD = normal.negatives_MD.to(encoder.device)
        return score, Novelty(labels, normal.temperature, negatives_MD, normal.normal)
    if score in (Score.NEGLABEL, Score.ENSEMBLE):
        score = Score.ABLATED_ENERGY
    return score, Novelty(labels, 1.0, labels.text_KD[:0], {})


def novelty_keeper(config: Config, model: str, labels: ZeroShot, metrics: Metrics) -> Keeper | None:
    """What keeps unknown frames, if the configuration names a place for them.

    Raises:
        AgentError: the topic's broker cannot be reached. A folder that cannot be written is told
            in the log, and tried again with each frame.
    """
    policy = config.novelty
    store: Store
    if policy.directory is not None:
        store = DirectoryStore.open(
            Path(policy.directory), policy.max_bytes, policy.max_age_days * DAY_S, model, time.time
        )
    elif policy.topic is not None:
        store = TopicStore.connect(config.kafka, policy.topic)
    else:
        return None
    keeper = Keeper(
        store,
        Seen(labels.text_KD.shape[-1], policy.similarity, policy.max_age_days * DAY_S),
        Allowance(policy.frames_per_hour, time.monotonic),
        similarity=policy.similarity,
        metrics=metrics,
        monotonic=time.monotonic,
        wall=time.time,
    )
    keeper.recall()
    return keeper


def _source(config: Config) -> Source:
    records = config.batch.max_size
    path = Path(config.source.path or "")
    if config.source.kind == "directory":
        return DirectorySource.open(path, config.source.camera, config.decode.max_bytes, records)
    if config.source.kind == "video":
        return VideoSource.open(path, config.source.camera, records)
    return KafkaSource.connect(config.kafka, config.decode.max_bytes, records)


def _sink(config: Config) -> Sink:
    if config.sink.kind == "jsonl":
        return JsonlSink(sys.stdout)
    return KafkaSink.connect(config.kafka)
