"""The command `bench-unknown`: scores, false alarms and confidence, in tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from agent import encode
from agent.adapt.strategy import ZeroShot
from agent.assemble import zero_shot
from agent.bench import report, unknown, unknown_picture
from agent.bench.competitors import AgentCompetitor, Arena
from agent.bench.corruptions import IMAGENET_C
from agent.bench.pool import CLEAR, Condition
from agent.bench.setting import (
    Options,
    Setting,
    calibrated,
    corrupted,
    make_folder,
    one_of,
    opened,
)
from agent.bench.suites import SUITES, Suite
from agent.bench.unknown import Separation, Told, together
from agent.calibration import Calibration, word_features
from agent.config import Config, ModelConfig
from agent.score.negatives import mine
from agent.score.novelty import Score

#: Cosine similarity to a held-out label above which a word may be another name for it.
SAME = 0.9
#: Share of unknown frames in the open storm.
SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownOptions(Options):
    """What to measure, on what. `frames` is of each phase; 0 shows every photograph once."""

    suites: Sequence[str]
    severity: int
    frames: int


def run_unknown(options: UnknownOptions, console: Console) -> None:
    """Measure, print and write `unknown.json`, `unknown.md` and the pictures.

    Raises:
        AgentError: the images, the model or a name will not do.
    """
    one_of(options.suites, "suite", SUITES)
    make_folder(options.out)
    bench = _Bench(options, opened(options), console)
    tables = [bench.scores(), bench.alarms(), bench.confidence()]
    (options.out / "unknown.md").write_text("\n".join(_markdown(table) for table in tables))


class _Bench:
    """The photographs, the model, and what was found so far."""

    def __init__(self, options: UnknownOptions, setting: Setting, console: Console) -> None:
        self._options = options
        self._console = console
        self._base = setting.base
        self._encoder = setting.encoder
        self._names = setting.names
        self._pool = setting.pool
        self._words_VD = word_features(self._encoder, self._base.templates[0])
        storm = [Condition(name, options.severity) for name in IMAGENET_C]
        self._conditions = [CLEAR, *storm]
        self._found: dict[str, Any] = {}

    def scores(self) -> Table:
        """Every score on the source model's features, near and far, clear and corrupted."""
        corrupted(self._pool, self._conditions, self._console)
        rows = list(self._pool.stream)
        truth = np.array([self._pool.labels[row] for row in rows])
        found: dict[tuple[str, str, str], list[Separation]] = {}
        all_splits = unknown.splits(
            self._names.labels, truth.tolist(), has_animals=self._names.is_imagenet
        )
        with Progress(console=self._console, transient=True) as progress:
            encoding = progress.add_task("encoding", total=len(self._conditions))
            shown: dict[Condition, Tensor] = {}
            for condition in self._conditions:
                shown[condition] = unknown.features(
                    self._encoder, self._pool.under(condition)[rows]
                )
                progress.advance(encoding)
            splitting = progress.add_task("holding labels out", total=len(all_splits))
            for split in all_splits:
                strange = ~np.isin(truth, split.known)
                normal, labels = self._calibration(split.known)
                for name, words_VD in self._vocabularies(split.known):
                    negatives_MD = mine(words_VD, labels.text_KD)
                    scorer = replace(unknown.novelty(normal, labels), negatives_MD=negatives_MD)
                    for condition, features_ND in shown.items():
                        for score, values in unknown.scored(scorer, features_ND).items():
                            if name and score is not Score.NEGLABEL:
                                continue
                            key = (split.kind, score + name, str(condition))
                            found.setdefault(key, []).append(Separation.of(strange, values))
                progress.advance(splitting)
            self._textures(shown, found)
        means = {key: _mean(each) for key, each in found.items()}
        self._note("scores", {"/".join(key): asdict(each) for key, each in means.items()})
        unknown_picture.draw_scores(means, self._options.out / "unknown-scores.png")
        return self._shown(_score_table(means, self._options.severity))

    def _textures(
        self,
        shown: Mapping[Condition, Tensor],
        found: dict[tuple[str, str, str], list[Separation]],
    ) -> None:
        """What has no name, against all the photographs."""
        preprocess, options = self._encoder.preprocess, self._options
        strange = unknown.textures(
            preprocess.size, preprocess.crop_ratio, options.cache, options.seed
        )
        scorer = unknown.novelty(*self._calibration(self._names.labels))
        for condition, known_ND in shown.items():
            strange_ND = unknown.features(self._encoder, strange.under(condition))
            is_strange = np.arange(len(known_ND) + len(strange_ND)) >= len(known_ND)
            scores = unknown.scored(scorer, torch.cat([known_ND, strange_ND]))
            for score, values in scores.items():
                key = ("textures", str(score), str(condition))
                found.setdefault(key, []).append(Separation.of(is_strange, values))

    def alarms(self) -> Table:
        """The agent among unknown objects in a storm, against thresholds that stay put."""
        rng = np.random.default_rng(self._options.seed)
        frames = self._options.frames or len(self._pool.stream)
        suite = unknown.open_storm(self._pool, self._conditions, frames, SHARE, rng)
        labels = [label for label in self._names.labels if label not in suite.held_out]
        arena, normal = self._arena(labels)
        told = self._play(suite, arena, "continual")
        scorer = unknown.novelty(normal, arena.zero_shot)
        fixed: dict[str, dict[Score, tuple[float, Separation]]] = {}
        rate, chosen = Config().ood.false_alarm_rate, Score(Config().ood.score)
        for condition in suite.conditions:
            shots = [shot for shot in suite.shots if shot.condition == condition]
            photos = [shot.photo for shot in shots]
            strange = np.array([self._pool.labels[photo] in suite.held_out for photo in photos])
            features_ND = unknown.features(self._encoder, self._pool.under(condition)[photos])
            fixed[str(condition)] = {
                score: (
                    float((values[~strange] > normal.normal[score].threshold(rate)).mean()),
                    Separation.of(strange, values),
                )
                for score, values in unknown.scored(scorer, features_ND).items()
            }
        table = Table(title=f"false alarms at {rate:.0%}, {SHARE:.0%} of the frames unknown")
        for head in ("", "fixed", "followed", "recall", "AUROC fixed", "AUROC followed"):
            table.add_column(head, justify="right" if head else "left")
        for phase, each in told.items():
            best = max(fixed[phase], key=lambda score: fixed[phase][score][1].auroc)
            table.add_row(
                phase,
                f"{100 * fixed[phase][chosen][0]:.1f}",
                f"{100 * each.false_alarms:.1f}",
                f"{100 * each.recall:.1f}",
                f"{100 * fixed[phase][best][1].auroc:.1f} ({best})",
                f"{100 * each.separation.auroc:.1f}",
            )
        self._note(
            "alarms",
            {
                phase: {
                    "followed": [each.false_alarms, each.recall, asdict(each.separation)],
                    "fixed": {s: [r, asdict(sep)] for s, (r, sep) in fixed[phase].items()},
                }
                for phase, each in told.items()
            },
        )
        unknown_picture.draw_alarms(
            {phase: fixed[phase][chosen][0] for phase in told},
            {phase: each.false_alarms for phase, each in told.items()},
            rate,
            self._options.out / "unknown-alarms.png",
        )
        return self._shown(table)

    def confidence(self) -> Table:
        """False alarms and the worth of confidence on streams of known objects."""
        table = Table(title="streams of known objects")
        heads = ("", "frames", "false alarms, %", "top-1, %", "softmax ECE", "confidence ECE")
        for head in heads:
            table.add_column(head, justify="right" if head else "left")
        whole: dict[str, Told] = {}
        for name in self._options.suites:
            frames = self._options.frames or len(self._pool.stream)
            suite = SUITES[name](self._pool, frames, np.random.default_rng(self._options.seed))
            corrupted(self._pool, suite.conditions, self._console)
            labels = [label for label in self._names.labels if label not in suite.held_out]
            arena, _ = self._arena(labels)
            told = whole[name] = together(self._play(suite, arena, "continual"))
            table.add_row(
                name,
                str(sum(told.known)),
                f"{100 * told.false_alarms:.1f}",
                f"{100 * float(np.mean(np.array(told.right)[told.known])):.1f}",
                f"{100 * told.calibration_error(told.softmax):.1f}",
                f"{100 * told.calibration_error(told.confidence):.1f}",
            )
            self._note(
                f"suite/{name}",
                {
                    "false_alarms": told.false_alarms,
                    "recall": told.recall,
                    "softmax_ece": told.calibration_error(told.softmax),
                    "confidence_ece": told.calibration_error(told.confidence),
                },
            )
        unknown_picture.draw_reliability(whole, self._options.out / "unknown-confidence.png")
        return self._shown(table)

    def _vocabularies(self, known: Sequence[str]) -> list[tuple[str, Tensor]]:
        """The word list, and what is left of it without other names of what is held out."""
        held_out = [label for label in self._names.labels if label not in set(known)]
        held_out_HD = self._encoder.encode_labels(held_out, [self._base.templates[0]])[0]
        nearest_V = (self._words_VD @ held_out_HD.T).amax(dim=-1)
        return [("", self._words_VD), (", unnamed", self._words_VD[nearest_V < SAME])]

    def _calibration(self, known: Sequence[str]) -> tuple[Calibration, ZeroShot]:
        model = self._model(known)
        held_out = frozenset(self._names.labels) - set(known)
        normal = calibrated(self._encoder, model, self._pool, self._words_VD, held_out)
        return normal, zero_shot(self._encoder, model)

    def _model(self, labels: Sequence[str]) -> ModelConfig:
        return self._base.model_copy(update={"labels": list(labels)})

    def _arena(self, labels: Sequence[str]) -> tuple[Arena, Calibration]:
        normal, prompt = self._calibration(labels)
        load = partial(encode.load, self._base)
        seed = self._options.seed
        return Arena(load, self._model(labels), prompt, normal, seed), normal

    def _play(self, suite: Suite, arena: Arena, strategy: str) -> dict[str, Told]:
        torch.manual_seed(self._options.seed)
        agent = AgentCompetitor(arena, strategy, suite.batch)
        with Progress(console=self._console, transient=True) as progress:
            task = progress.add_task(suite.name, total=len(suite.shots))
            return unknown.play(suite, self._pool, agent, lambda n: progress.advance(task, n))

    def _note(self, what: str, found: Any) -> None:
        """Kept at once: what comes next may take hours, or fail."""
        self._found[what] = found
        path = self._options.out / "unknown.json"
        path.write_text(json.dumps(self._found, indent=1) + "\n")

    def _shown(self, table: Table) -> Table:
        self._console.print(table)
        return table


def _mean(each: Sequence[Separation]) -> Separation:
    return Separation(
        float(np.mean([one.auroc for one in each])),
        float(np.mean([one.aupr for one in each])),
        float(np.mean([one.fpr95 for one in each])),
    )


def _score_table(means: dict[tuple[str, str, str], Separation], severity: int) -> Table:
    table = Table(title="AUROC / AUPR / FPR95, %")
    kinds = dict.fromkeys(kind for kind, _, _ in means)
    table.add_column("")
    for kind in kinds:
        table.add_column(f"{kind}, clear", justify="right")
        table.add_column(f"{kind}, severity {severity}", justify="right")
    for score in dict.fromkeys(score for _, score, _ in means):
        cells = []
        for kind in kinds:
            mine = {c: each for (k, s, c), each in means.items() if (k, s) == (kind, score)}
            if not mine:
                cells += ["", ""]
                continue
            clear = mine.pop(str(CLEAR))
            cells += [_triple(clear), _triple(_mean(list(mine.values())))]
        table.add_row(score, *cells)
    return table


def _triple(one: Separation) -> str:
    return f"{100 * one.auroc:.1f} / {100 * one.aupr:.1f} / {100 * one.fpr95:.1f}"


def _markdown(table: Table) -> str:
    heads = [str(column.header) for column in table.columns]
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    cells = [[str(cell) for cell in row] for row in rows]
    return f"## {table.title}\n\n{report.grid(heads, cells)}"
