"""A source over the frames of a video file."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Self

import av
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from agent.errors import InvalidConfig
from agent.sources import EndOfStream
from agent.types import FrameId, Partition, Record

_log = logging.getLogger(__name__)

#: High enough that encoding each frame again costs no accuracy.
_JPEG_QUALITY = 95


class VideoSource:
    """Delivers the frames of a video as JPEG images in the order of display, then ends.

    The file's name is the topic and a frame's number its offset. A frame was captured at its
    presentation time, counted from the start of the recording, and a recording started its own
    duration before the file was last written. Packets that cannot be decoded are delivered as
    they are, to be rejected. Offsets are not kept: a restart begins with the first frame.
    """

    def __init__(
        self,
        container: InputContainer,
        topic: str,
        camera: str,
        started_at: float,
        max_records: int,
    ) -> None:
        self._container = container
        self._log = Partition(topic, 0)
        self._camera = camera
        self._started_at = started_at
        self._max_records = max_records
        self._images = _images(container)
        self._next = 0
        self._paused = False

    @classmethod
    def open(cls, path: Path, camera: str, max_records: int = 8) -> Self:
        """Open a file in any format that FFmpeg reads.

        Args:
            path: the video file.
            camera: the camera that it counts as.
            max_records: frames delivered by one poll at most.

        Raises:
            InvalidConfig: there is no such file, or no video in it.
        """
        try:
            container = av.open(str(path))
        except (OSError, ValueError) as error:  # av.FFmpegError is one or the other
            raise InvalidConfig([f"source.path: expected a video file: {path}: {error}"]) from error
        if not container.streams.video:
            container.close()
            raise InvalidConfig([f"source.path: there is no video in {path}"])
        duration_s = (container.duration or 0) / av.time_base
        return cls(container, path.name, camera, path.stat().st_mtime - duration_s, max_records)

    def poll(self, timeout_s: float) -> list[Record]:
        """The next frames; waits only for the codec."""
        if self._paused:
            return []
        polled = [
            Record(
                id=FrameId(*self._log, offset),
                key=self._camera.encode(),
                value=image,
                headers=(),
                timestamp=self._started_at + shown_at_s,
            )
            for offset, (shown_at_s, image) in enumerate(
                islice(self._images, self._max_records), self._next
            )
        ]
        if not polled:
            raise EndOfStream
        self._next += len(polled)
        return polled

    def lost(self) -> frozenset[Partition]:
        """Nothing: the file is shared with nobody."""
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
        """Frames not yet delivered, where the file says how many it has."""
        frames = self._container.streams.video[0].frames
        return {self._log: max(0, frames - self._next)} if frames else {}

    @property
    def ready(self) -> bool:
        """Always: nothing has to be assigned."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._container.close()


def _images(container: InputContainer) -> Iterator[tuple[float, bytes]]:
    """Each frame's presentation time in seconds and its JPEG bytes."""
    shown_at_s = 0.0
    for packet in _packets(container):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            yield shown_at_s, bytes(packet)
            continue
        for frame in frames:
            shown_at_s = frame.time if frame.time is not None else shown_at_s
            buffer = io.BytesIO()
            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
            image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
            yield shown_at_s, buffer.getvalue()


def _packets(container: InputContainer) -> Iterator[av.Packet[VideoStream]]:
    """The packets up to the end of the file, or to where it is too damaged to go on."""
    try:
        yield from container.demux(container.streams.video[0])
    except av.FFmpegError as error:
        _log.error("%s cannot be read to its end: %s", container.name, error)
