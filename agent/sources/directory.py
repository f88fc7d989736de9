"""A source over the files of a folder, each a frame."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from agent.errors import InvalidConfig
from agent.sources import EndOfStream
from agent.types import FrameId, Partition, Record

_log = logging.getLogger(__name__)


class DirectorySource:
    """Delivers the files of a folder in the order of their paths, then ends.

    The folder's name is the topic, a file's place in the order its offset, its path the subject
    and its modification time the record's timestamp. Offsets are not kept: a restart begins with
    the first file.
    """

    def __init__(
        self, folder: Path, files: Sequence[Path], camera: str, max_bytes: int, max_records: int
    ) -> None:
        self._log = Partition(folder.resolve().name, 0)
        self._folder = folder
        self._files = files
        self._camera = camera
        self._max_bytes = max_bytes
        self._max_records = max_records
        self._next = 0
        self._paused = False

    @classmethod
    def open(cls, folder: Path, camera: str, max_bytes: int, max_records: int = 32) -> Self:
        """List a folder and its subfolders, without hidden files.

        Args:
            folder: where the images are.
            camera: the camera that they count as.
            max_bytes: bytes read of a file; one more is read of a larger one, which is enough to
                reject it.
            max_records: files delivered by one poll at most.

        Raises:
            InvalidConfig: there is no such folder, or no file in it.
        """
        files = sorted(path for path in folder.rglob("*") if _is_frame(path, folder))
        if not files:
            raise InvalidConfig([f"source.path: expected a folder of images: {folder}"])
        return cls(folder, files, camera, max_bytes, max_records)

    def poll(self, timeout_s: float) -> list[Record]:
        """The next files; never waits."""
        if self._paused:
            return []
        if self._next == len(self._files):
            raise EndOfStream
        end = min(self._next + self._max_records, len(self._files))
        polled = [self._record(offset) for offset in range(self._next, end)]
        self._next = end
        return polled

    def lost(self) -> frozenset[Partition]:
        """Nothing: the folder is shared with nobody."""
        return frozenset()

    def pause(self) -> None:
        """Deliver nothing until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Deliver again."""
        self._paused = False

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Nothing is kept."""

    def lag(self) -> dict[Partition, int]:
        """Files not yet delivered."""
        return {self._log: len(self._files) - self._next}

    @property
    def ready(self) -> bool:
        """Always: nothing has to be assigned."""
        return True

    def close(self) -> None:
        """Nothing to release."""

    def _record(self, offset: int) -> Record:
        path = self._files[offset]
        value: bytes | None = None
        timestamp = 0.0
        try:
            timestamp = path.stat().st_mtime
            with path.open("rb") as file:
                value = file.read(self._max_bytes + 1)
        except OSError as error:  # without a value it is rejected, and the stream goes on
            _log.warning("cannot read %s: %s", path, error)
        return Record(
            id=FrameId(*self._log, offset),
            key=self._camera.encode(),
            value=value,
            headers=(("ce_subject", str(path.relative_to(self._folder)).encode(errors="replace")),),
            timestamp=timestamp,
        )


def _is_frame(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.is_file() and not hidden
