"""The command `bench-drift`: how soon drift is told, how often falsely, and at what cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress

from agent.assemble import zero_shot
from agent.bench import drift_report as report
from agent.bench.corruptions import IMAGENET_C
from agent.bench.drift_lab import TRIALS, Lab
from agent.bench.drift_picture import write_severity, write_timeline
from agent.bench.drift_streams import BATCH, STEPS
from agent.bench.drift_watch import AgentWatch, Encoded
from agent.bench.pool import CLEAR, Condition
from agent.bench.setting import Options, calibrated, make_folder, opened
from agent.calibration import word_features

#: Onsets timed of each condition where frames are encoded once, each on other photographs.
REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftBenchOptions(Options):
    """What to measure on; `frames` are the stationary ones in which false alarms are counted."""

    frames: int


def run_bench_drift(options: DriftBenchOptions, console: Console) -> None:
    """Measure, print, and write `drift.md` and pictures of scores over time and severity.

    The strategy `frozen` is measured on frames that are encoded once; `continual`, whose embedding
    shows what its correction has left of a domain, on the agent as it runs.

    Raises:
        AgentError: the images, the model or the folder will not do.
    """
    make_folder(options.out)
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
    setting = opened(options)
    encoder, pool = setting.encoder, setting.pool
    model = setting.base.model_copy(update={"labels": list(setting.names.labels)})
    plain = zero_shot(encoder, model)
    words_VD = word_features(encoder, model.templates[0])
    normal = calibrated(encoder, model, pool, words_VD, frozenset())
    labels = plain.tempered(normal.temperature)
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
