"""The command `bench-drift`: how soon drift is told, how often falsely, and at what cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from agent import encode
from agent.adapt.strategy import ZeroShot
from agent.assemble import zero_shot
from agent.bench import drift_report as report
from agent.bench import pool as pools
from agent.bench.corruptions import IMAGENET_C
from agent.bench.drift_lab import TRIALS, Lab
from agent.bench.drift_picture import write_severity, write_timeline
from agent.bench.drift_streams import BATCH, STEPS
from agent.bench.drift_watch import AgentWatch, Encoded
from agent.bench.label_sets import LabelSet, labelling
from agent.bench.pool import CLEAR, Condition
from agent.bench.run import calibrated, chosen_model
from agent.calibration import word_features
from agent.errors import AgentError

#: Onsets timed of each condition where frames are encoded once, each on other photographs.
REPEATS = 5


@dataclass(frozen=True, slots=True)
class DriftBenchOptions:
    """What to measure on; `frames` are the stationary ones in which false alarms are counted."""

    images: Path
    model: str
    pretrained: str | None
    precision: str
    frames: int
    seed: int
    out: Path
    cache: Path


def run_bench_drift(options: DriftBenchOptions, console: Console) -> None:
    """Measure, print, and write `drift.md` and pictures of scores over time and severity.

    The strategy `frozen` is measured on frames that are encoded once; `continual`, whose embedding
    shows what its correction has left of a domain, on the agent as it runs.

    Raises:
        AgentError: the images, the model or the folder will not do.
    """
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AgentError(f"cannot write to {options.out}: {error.strerror}") from error
    written: list[str] = []

    def write(text: str) -> None:
        # At once, since what comes next may take an hour.
        written.append(text)
        (options.out / "drift.md").write_text("\n".join(written))
        console.print(text, markup=False, soft_wrap=True)

    with Progress(console=console, transient=True) as progress:
        lab = _lab(options, progress)
        advance = _advance(progress, "stationary", -(-options.frames // BATCH))
        write(report.alarms(lab.stationary(options.frames, advance), options.frames))
        write_timeline(lab.timelines(), options.out / "drift-time.png")

        advance = _advance(progress, "frozen", TRIALS)
        frozen = lab.outcome("frozen", lab.frozen, REPEATS, advance)
        write(report.outcome(frozen))
        write_severity(frozen.severity, options.out / "drift-severity.png")

        agents: list[AgentWatch] = []

        def agent() -> AgentWatch:
            agents.append(lab.agent("continual"))
            return agents[-1]

        continual = lab.outcome("continual", agent, 1, _advance(progress, "continual", TRIALS))
        write(report.outcome(continual))
        write_severity(continual.severity, options.out / "drift-severity-continual.png")
        write(report.cost([each.seconds() for each in agents]))


def _lab(options: DriftBenchOptions, progress: Progress) -> Lab:
    model = chosen_model(options.model, options.pretrained, options.precision)
    encoder = encode.load(model)
    names = labelling(LabelSet.ALL, options.images)
    pool = pools.load(
        options.images,
        encoder.preprocess.size,
        encoder.preprocess.crop_ratio,
        options.cache,
        truth=names.truth,
        seed=options.seed,
    )
    model = model.model_copy(update={"labels": list(names.labels)})
    plain = zero_shot(encoder, model)
    words_VD = word_features(encoder, model.templates[0])
    normal = calibrated(encoder, model, pool, words_VD, frozenset())
    labels = ZeroShot(plain.labels, plain.templates_TKD, plain.scale / normal.temperature)
    conditions = [
        CLEAR,
        *(Condition(name, step) for name in IMAGENET_C for step in sorted(set(STEPS))),
    ]
    advance = _advance(progress, "encoding", len(conditions))
    encoded = Encoded.of(pool, encoder, labels, conditions, advance)
    return Lab(pool, model, labels, normal, encoded, options.seed)


def _advance(progress: Progress, what: str, total: int) -> Callable[[], None]:
    task = progress.add_task(what, total=total)
    return lambda: progress.advance(task)
