"""The command `bench`: every competitor on every suite, and the tables."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from agent import __version__, encode
from agent.assemble import zero_shot
from agent.bench import pool as pools
from agent.bench import report
from agent.bench.ablations import ABLATIONS
from agent.bench.arena import Score, play
from agent.bench.competitors import COMPETITORS, Arena, competitor
from agent.bench.label_sets import LabelSet
from agent.bench.picture import write_picture
from agent.bench.setting import Options, calibrated, corrupted, make_folder, one_of, opened
from agent.bench.suites import SUITES, Suite
from agent.calibration import word_features
from agent.errors import AgentError

#: Competitors that keep nothing from one batch to the next and take long: shown every n-th frame.
#: Odd, so that in turn it meets every camera of a mixed batch.
EPISODIC = {"tpt": 31}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions(Options):
    """What to compare, and on what.

    `frames` is of each phase; 0 shows every photograph once. No competitors are all of them.
    """

    suites: Sequence[str]
    competitors: Sequence[str]
    label_set: str
    frames: int


def run_bench(options: BenchOptions, console: Console) -> None:
    """Measure, print and write `bench.json`, `bench.md` and a picture of each suite.

    Raises:
        AgentError: the images, the model or a name will not do.
    """
    one_of(options.suites, "suite", SUITES)
    one_of(options.competitors, "competitor", [*COMPETITORS, *ABLATIONS])
    one_of([options.label_set], "label set", list(LabelSet))
    setting = opened(options, LabelSet(options.label_set))
    base, encoder, names, pool = setting.base, setting.encoder, setting.names, setting.pool
    frames = options.frames or len(pool.stream)
    suites = [
        SUITES[name](pool, frames, np.random.default_rng(options.seed)) for name in options.suites
    ]
    corrupted(pool, (c for suite in suites for c in suite.conditions), console)

    words_VD = word_features(encoder, base.templates[0])
    competitors = options.competitors or COMPETITORS
    scores: list[Score] = []
    written: list[str] = []
    make_folder(options.out)
    for suite in suites:
        labels = [label for label in names.labels if label not in suite.held_out]
        if len(labels) < 2:
            raise AgentError(f"the suite {suite.name} leaves fewer than two labels")
        model = base.model_copy(update={"labels": labels})
        arena = Arena(
            encoder=partial(encode.load, base),
            model=model,
            zero_shot=zero_shot(encoder, model),
            normal=calibrated(encoder, model, pool, words_VD, suite.held_out),
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
