"""What every benchmark opens: the model, the labels, the photographs, the folder it writes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from agent import encode
from agent.assemble import zero_shot
from agent.bench import pool as pools
from agent.bench.label_sets import Labelling, LabelSet, labelling
from agent.calibration import Calibration, calibrate, subject_of
from agent.config import ModelConfig
from agent.errors import AgentError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What every benchmark is told."""

    images: Path
    model: str
    pretrained: str | None
    precision: str
    seed: int
    out: Path
    cache: Path


@dataclass(frozen=True, slots=True)
class Setting:
    """The model with its default labels, the labels of the photographs, and these."""

    base: ModelConfig
    encoder: encode.Encoder
    names: Labelling
    pool: pools.Pool


def opened(options: Options, label_set: LabelSet = LabelSet.ALL) -> Setting:
    """Load the model and the photographs.

    Raises:
        AgentError: the images, the model or the precision will not do.
    """
    base = _model(options.model, options.pretrained, options.precision)
    encoder = encode.load(base)
    names = labelling(label_set, options.images)
    pool = pools.load(
        options.images,
        encoder.preprocess.size,
        encoder.preprocess.crop_ratio,
        options.cache,
        truth=names.truth,
        seed=options.seed,
    )
    return Setting(base, encoder, names, pool)


def make_folder(folder: Path) -> None:
    """Make the folder that findings go to.

    Raises:
        AgentError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AgentError(f"cannot write to {folder}: {error.strerror}") from error


def _model(name: str, pretrained: str | None, precision: str) -> ModelConfig:
    """The model that the command line names, with the default labels.

    Raises:
        AgentError: there is no such model or precision.
    """
    one_of([precision], "precision", ["fp32", "bf16", "fp16"])
    try:
        return ModelConfig(
            name=name,
            pretrained=pretrained,
            precision=precision,  # type: ignore[arg-type]  # it was looked up
        )
    except ValidationError as error:
        raise AgentError(str(error.errors()[0]["msg"])) from error


def one_of(names: Sequence[str], what: str, known: Iterable[str]) -> None:
    """Raise `AgentError` for a name that is not known."""
    for name in names:
        if name not in known:
            raise AgentError(f"there is no {what} {name!r}; there are: {', '.join(known)}")


def corrupted(pool: pools.Pool, conditions: Iterable[pools.Condition], console: Console) -> None:
    """Make the pictures of every condition, with a progress bar."""
    conditions = list(dict.fromkeys(conditions))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("corrupting", total=len(conditions))
        pools.prepare(pool, conditions, lambda: progress.advance(task))


def calibrated(
    encoder: encode.Encoder,
    model: ModelConfig,
    pool: pools.Pool,
    words_VD: Tensor,
    held_out: frozenset[str],
) -> Calibration:
    """On photographs of what the labels name: an ordinary day."""
    images = [pool.pixels[i] for i in pool.calibration if pool.labels[i] not in held_out]
    subject = subject_of(encoder, model)
    return calibrate(encoder, zero_shot(encoder, model), images, words_VD, subject)
