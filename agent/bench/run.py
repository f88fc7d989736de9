"""The command `bench`: every competitor on every suite, and the tables."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from agent import __version__, encode
from agent.assemble import zero_shot
from agent.bench import pool as pools
from agent.bench import report
from agent.bench.ablations import ABLATIONS
from agent.bench.arena import Score, play
from agent.bench.competitors import COMPETITORS, Arena, competitor
from agent.bench.label_sets import LabelSet, labelling
from agent.bench.picture import write_picture
from agent.bench.suites import SUITES, Suite
from agent.calibration import Calibration, calibrate, subject_of
from agent.config import ModelConfig
from agent.errors import AgentError

#: Competitors that keep nothing from one batch to the next and take long: shown every n-th frame.
#: Odd, so that in turn it meets every camera of a mixed batch.
EPISODIC = {"tpt": 31}


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to compare, and on what.

    `frames` is of each phase; 0 shows every photograph once. No competitors are all of them.
    """

    images: Path
    model: str
    pretrained: str | None
    suites: Sequence[str]
    competitors: Sequence[str]
    label_set: str
    frames: int
    precision: str
    seed: int
    out: Path
    cache: Path


def run_bench(options: BenchOptions, console: Console) -> None:
    """Measure, print and write `bench.json`, `bench.md` and a picture of each suite.

    Raises:
        AgentError: the images, the model or a name will not do.
    """
    _one_of(options.suites, "suite", SUITES)
    _one_of(options.competitors, "competitor", [*COMPETITORS, *ABLATIONS])
    _one_of([options.label_set], "label set", list(LabelSet))
    base = model_of(options.model, options.pretrained, options.precision)
    encoder = encode.load(base)
    names = labelling(LabelSet(options.label_set), options.images)
    preprocess = encoder.preprocess
    pool = pools.load(
        options.images,
        preprocess.size,
        preprocess.crop_ratio,
        options.cache,
        truth=names.truth,
        seed=options.seed,
    )
    frames = options.frames or len(pool.stream)
    suites = [
        SUITES[name](pool, frames, np.random.default_rng(options.seed)) for name in options.suites
    ]
    _prepare(pool, suites, console)

    competitors = options.competitors or COMPETITORS
    scores: list[Score] = []
    written: list[str] = []
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AgentError(f"cannot write to {options.out}: {error.strerror}") from error
    for suite in suites:
        labels = [label for label in names.labels if label not in suite.held_out]
        if len(labels) < 2:
            raise AgentError(f"the suite {suite.name} leaves fewer than two labels")
        model = base.model_copy(update={"labels": labels})
        arena = Arena(
            encoder=partial(encode.load, base),
            model=model,
            zero_shot=zero_shot(encoder, model),
            normal=_calibrated(encoder, model, pool),
            seed=options.seed,
        )
        with Progress(console=console, transient=True) as progress:
            own = []
            for name in competitors:
                own.append(_score(name, suite, pool, arena, progress))
                # After each, since what comes next may take hours, or fail.
                report.save(options.out / "bench.json", [*scores, *own], _about(options, pool))
        scores += own
        console.print(report.table(own))
        if len(own) > 1 and any(score.competitor == report.BASELINE for score in own):
            write_picture(own, report.BASELINE, options.out / f"{suite.name}.png")
        written.append(f"## {suite.name}\n\n{report.markdown(own)}")
        (options.out / "bench.md").write_text("\n".join(written))


def model_of(name: str, pretrained: str | None, precision: str) -> ModelConfig:
    """The model that the command line names.

    Raises:
        AgentError: there is none such.
    """
    _one_of([precision], "precision", ["fp32", "bf16", "fp16"])
    try:
        return ModelConfig(
            name=name,
            pretrained=pretrained,
            precision=precision,  # type: ignore[arg-type]  # it was looked up
        )
    except ValidationError as error:
        raise AgentError(str(error.errors()[0]["msg"])) from error


def _one_of(names: Sequence[str], what: str, known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise AgentError(f"there is no {what} {name!r}; there are: {', '.join(known)}")


def _prepare(pool: pools.Pool, suites: Sequence[Suite], console: Console) -> None:
    conditions = list(dict.fromkeys(c for suite in suites for c in suite.conditions))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("corrupting", total=len(conditions))
        pools.prepare(pool, conditions, lambda: progress.advance(task))


def _calibrated(encoder: encode.Encoder, model: ModelConfig, pool: pools.Pool) -> Calibration:
    images = [pool.pixels[i] for i in pool.calibration]
    return calibrate(encoder, zero_shot(encoder, model), images, subject_of(encoder, model))


def _score(name: str, suite: Suite, pool: pools.Pool, arena: Arena, progress: Progress) -> Score:
    every = EPISODIC.get(name, 1)
    task = progress.add_task(f"{suite.name}: {name}", total=len(suite.shots) // every)
    # Random draws of one competitor must not depend on who came before it.
    torch.manual_seed(arena.seed)
    score = play(
        suite,
        pool,
        name,
        competitor(name, arena, suite.batch),
        every=every,
        progress=lambda done: progress.advance(task, done),
    )
    progress.remove_task(task)
    return score


def _about(options: BenchOptions, pool: pools.Pool) -> dict[str, object]:
    return {
        "version": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "model": options.model,
        "pretrained": options.pretrained,
        "precision": options.precision,
        "labels": options.label_set,
        "photographs": len(pool.stream),
        "calibration": len(pool.calibration),
        "seed": options.seed,
    }
