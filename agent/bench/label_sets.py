"""What the model is told there is: the names behind the photographs, or a fleet's few labels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from pathlib import Path

import open_clip

from agent.bench.photos import IMAGE_SUFFIXES, label_of
from agent.errors import AgentError
from agent.models.names import synsets

_SYNSET = re.compile(r"n\d{8}")


class LabelSet(StrEnum):
    """Which labels compete for an image."""

    ALL = "all"
    FLEET = "fleet"


@dataclass(frozen=True, slots=True)
class Labelling:
    """The label list, and what each file shows; None for what no label of the list names.

    `is_imagenet` says that the labels are those of ImageNet, in its order.
    """

    labels: tuple[str, ...]
    truth: Callable[[Path, Path], str | None]
    is_imagenet: bool = False


def labelling(kind: LabelSet, folder: Path) -> Labelling:
    """The labels for the images of `folder`.

    `all` is the 1000 ImageNet names where the names of files or folders begin with WordNet ids, as
    ImageNet's do, and else every name in the folder. `fleet` is 20 mid-level WordNet groups.

    Raises:
        AgentError: `fleet` is asked for and the names carry no WordNet ids.
    """
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    if all(_synset(path, folder) for path in paths) and paths:
        by_synset = _fleet() if kind is LabelSet.FLEET else _imagenet()
        labels = tuple(dict.fromkeys(by_synset.values()))
        return Labelling(
            labels,
            lambda path, top: by_synset.get(_synset(path, top) or ""),
            is_imagenet=kind is LabelSet.ALL,
        )
    if kind is LabelSet.FLEET:
        raise AgentError(
            f"the fleet labels need WordNet ids (n01443537_…) in the names of {folder}"
        )
    names = {label_of(path, folder) for path in paths}
    return Labelling(tuple(sorted(names)), label_of)


def _imagenet() -> dict[str, str]:
    return dict(zip(synsets(), open_clip.IMAGENET_CLASSNAMES, strict=True))


def _fleet() -> dict[str, str]:
    groups = json.loads((files("agent.bench") / "fleet.json").read_text())
    return {synset: label for label, members in groups.items() for synset in members.split()}


def _synset(path: Path, folder: Path) -> str | None:
    parts = path.relative_to(folder).parts
    found = _SYNSET.match(parts[0])
    return found.group() if found else None
