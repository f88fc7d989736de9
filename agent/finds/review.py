"""Kept frames read back from a folder, and those that look alike put together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.errors import AgentError
from agent.finds.entry import Event, is_ours, read_event

_AGO = re.compile(r"([0-9]{1,5})([hd])")
_UNITS = {"h": "hours", "d": "days"}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Kept:
    """A kept frame; `picture` is its JPEG file."""

    event: Event
    picture: Path


@dataclass(frozen=True)
class Group:
    """Frames that look alike, the most novel first."""

    frames: Sequence[Kept]

    @cached_property
    def weight(self) -> float:
        """What the group is ranked by: many frames, novel ones, or both."""
        return sum(kept.event.data.margin for kept in self.frames)


def since(text: str, now: datetime) -> datetime:
    """The moment that `text` names: so many hours or days before `now`, or a date in ISO 8601.

    A moment without a zone is in UTC.

    Raises:
        ValueError: it names none.
    """
    ago = _AGO.fullmatch(text)
    if ago:
        return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def read(
    folder: Path, cameras: Sequence[str], start: datetime | None, progress: Progress
) -> tuple[list[Kept], int]:
    """Frames of `cameras` (all if empty) captured since `start`; and how many files were bad.

    Raises:
        AgentError: the folder cannot be listed, or holds nothing that can be read.
    """
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError as error:
        raise AgentError(f"{folder} cannot be listed: {error.strerror}") from error
    every: list[Kept] = []
    for done, path in enumerate(paths, start=1):
        picture = path.with_suffix(".jpg")
        try:
            if is_ours(picture):
                every.append(Kept(read_event(path), picture))
        except (OSError, ValueError):
            pass  # counted below
        progress(done, len(paths))
    if not every:
        raise AgentError(
            f"{folder} holds no kept frames ({len(paths)} JSON files, none of them readable as "
            "one): name the folder that novelty.directory has in the agent's configuration"
        )
    wanted = [
        kept
        for kept in every
        if (not cameras or kept.event.data.camera in cameras)
        and (start is None or kept.event.time >= start)
    ]
    if not wanted:
        raise AgentError(f"none of the {len(every)} frames in {folder} is of that camera and time")
    return wanted, len(paths) - len(every)


def grouped(frames: Sequence[Kept], similarity: float, progress: Progress) -> list[Group]:
    """Frames whose cosine with a group's most novel one is at least `similarity`, together.

    Greedy, from the most novel down: a frame joins the group it is most similar to, or opens one.
    The heaviest group comes first. Only embeddings of one model are compared.
    """
    leaders: dict[tuple[str, int], _Leaders] = {}
    members: list[list[Kept]] = []
    ranked = sorted(frames, key=lambda kept: -kept.event.data.margin)
    for done, kept in enumerate(ranked, start=1):
        data = kept.event.data
        comparable = leaders.setdefault((data.model, len(data.embedding)), _Leaders())
        group = comparable.nearest(data.embedding, similarity)
        if group is None:
            comparable.add(data.embedding, len(members))
            members.append([kept])
        else:
            members[group].append(kept)
        progress(done, len(ranked))
    return sorted(map(Group, members), key=lambda group: -group.weight)


class _Leaders:
    """The embeddings that groups were opened with, in an array that doubles as it fills."""

    def __init__(self) -> None:
        self._embeddings_ND: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._groups: list[int] = []

    def nearest(self, embedding_D: NDArray[np.float32], similarity: float) -> int | None:
        """The group of the most similar leader, if that is similar enough.

        Frames without a feature, whose embedding is zero, are alike.
        """
        count = len(self._groups)
        if not count:
            return None
        leaders_ND = self._embeddings_ND[:count]
        if not embedding_D.any():
            rows = np.flatnonzero(~leaders_ND.any(axis=1))
            return self._groups[int(rows[0])] if len(rows) else None
        cosines_N = leaders_ND @ embedding_D
        best = int(cosines_N.argmax())
        return self._groups[best] if cosines_N[best] >= similarity else None

    def add(self, embedding_D: NDArray[np.float32], group: int) -> None:
        """Let a group be found by this embedding."""
        count = len(self._groups)
        if count == len(self._embeddings_ND):
            grown_ND = np.zeros((max(64, 2 * count), len(embedding_D)), np.float32)
            grown_ND[:count] = self._embeddings_ND.reshape(count, len(embedding_D))
            self._embeddings_ND = grown_ND
        self._embeddings_ND[count] = embedding_D
        self._groups.append(group)
