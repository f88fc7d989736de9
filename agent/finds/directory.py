"""Unknown frames in a folder: for each a thumbnail (.jpg) and a CloudEvent (.json)."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

from agent.finds.entry import NAME, event, name_of, read_event, thumbnail
from agent.finds.find import Find, Outcome, Remembered, Trouble
from agent.finds.seen import MEMORY

DAY_S = 86_400.0
#: Frames in a folder at most, whatever their size.
MAX_FRAMES = 100_000
#: When room is needed, the least novel among so many of the oldest goes.
OLDEST = 16

#: The event comes last: where there is one, there is a thumbnail. Deleted in reverse.
_ENDINGS = (".jpg", ".json")
_PART = ".part"
_OURS = re.compile(rf"(?P<name>{NAME})\.(?:jpg|json)(?P<part>\.part)?")


@dataclass(slots=True)
class _Held:
    kept_at: float = 0.0
    size: int = 0
    margin: float = 0.0


class DirectoryStore:
    """Keeps the folder below `max_bytes` and its frames younger than `max_age_s`.

    What is there is listed once, at start, and followed from then on. Files with names that this
    store does not give are never touched.
    """

    def __init__(
        self, folder: Path, max_bytes: int, max_age_s: float, model: str, now: Callable[[], float]
    ) -> None:
        """`model` is the one whose embeddings can be compared; `now` is in epoch seconds."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._model = model
        self._now = now
        self._trouble = Trouble(str(folder))
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the oldest first
        self._bytes = 0
        self._outcomes: list[tuple[Find, Outcome]] = []

    @classmethod
    def open(
        cls,
        folder: Path,
        max_bytes: int,
        max_age_s: float,
        model: str,
        now: Callable[[], float],
    ) -> Self:
        """A store with what earlier runs left in `folder`, which is made when it is missing."""
        store = cls(folder, max_bytes, max_age_s, model, now)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            store._list()
        except OSError as error:
            store._trouble.failed(error)
        store.tend()
        return store

    def put(self, find: Find) -> None:
        """Write a find, unless this frame was written before."""
        name = name_of(find.verdict)
        if name in self._held:
            self._outcomes.append((find, Outcome.DUPLICATE))
            return
        contents = dict(zip(_ENDINGS, (thumbnail(find), event(find)), strict=True))
        size = sum(map(len, contents.values()))
        try:
            self._make_room(size)
            self._write(name, contents)
        except OSError as error:
            self._trouble.failed(error)
            self._outcomes.append((find, Outcome.FAILED))
            return
        self._trouble.worked()
        self._held[name] = _Held(self._now(), size, find.margin)
        self._bytes += size
        self._outcomes.append((find, Outcome.KEPT))

    def outcomes(self) -> Iterator[tuple[Find, Outcome]]:
        """What became of the finds that were put since this was last asked."""
        outcomes, self._outcomes = self._outcomes, []
        return iter(outcomes)

    def tend(self) -> None:
        """Delete what is too old or too much."""
        now = self._now()
        try:
            for name, held in list(self._held.items()):
                held.kept_at = min(held.kept_at, now)  # the clock may have been set back
                if now - held.kept_at > self._max_age_s:
                    self._delete(name)
            self._make_room(0)
        except OSError as error:
            self._trouble.failed(error)

    def remembered(self) -> Iterator[Remembered]:
        """The newest frames whose embeddings this model made, the oldest first.

        Of all the others only the size is known, and so they are the first to go.
        """
        for name, held in list(self._held.items())[-MEMORY:]:
            try:
                data = read_event(self._folder / f"{name}.json").data
            except (OSError, ValueError):
                continue  # it is deleted when its time comes
            held.margin = data.margin
            if data.model == self._model:
                yield Remembered(data.embedding, held.kept_at)

    @property
    def held_bytes(self) -> int:
        """Bytes of the files in the folder that are this store's."""
        return self._bytes

    def close(self) -> None:
        """Nothing is under way."""

    def _list(self) -> None:
        found: dict[str, _Held] = {}
        with os.scandir(self._folder) as files:
            for file in files:
                ours = _OURS.fullmatch(file.name)
                if ours is None or not file.is_file(follow_symlinks=False):
                    continue
                if ours["part"]:  # a write that was cut short
                    with suppress(OSError):
                        Path(file.path).unlink()
                    continue
                status = file.stat(follow_symlinks=False)
                held = found.setdefault(ours["name"], _Held())
                held.size += status.st_size
                held.kept_at = max(held.kept_at, status.st_mtime)
        self._held.update(sorted(found.items(), key=lambda item: item[1].kept_at))
        self._bytes = sum(held.size for held in found.values())

    def _write(self, name: str, contents: dict[str, bytes]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            for ending, content in contents.items():
                part = self._folder / f"{name}{ending}{_PART}"
                part.write_bytes(content)
                part.replace(self._folder / f"{name}{ending}")
        except OSError:
            with suppress(OSError):
                for ending in contents:
                    (self._folder / f"{name}{ending}{_PART}").unlink(missing_ok=True)
                    (self._folder / f"{name}{ending}").unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> None:
        """Delete until `size` bytes more fit."""
        while self._held:
            if self._bytes + size > self._max_bytes or len(self._held) >= MAX_FRAMES:
                self._delete(
                    min(islice(self._held, OLDEST), key=lambda name: self._held[name].margin)
                )
            else:
                return

    def _delete(self, name: str) -> None:
        for ending in reversed(_ENDINGS):
            (self._folder / f"{name}{ending}").unlink(missing_ok=True)
        self._bytes -= self._held.pop(name).size
