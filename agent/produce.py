"""Plays images into the frames topic, as a camera gateway would."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kafka import KafkaProducer
from kafka.errors import KafkaError

from agent.config import KafkaConfig
from agent.connection import explain, settings
from agent.errors import AgentError
from agent.types import FrameId

#: Suffixes of the files that are played.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_FLUSH_S = 30.0
_MAX_REQUEST_BYTES = 100 * 1024 * 1024

_log = logging.getLogger(__name__)


def images_under(folder: Path) -> list[Path]:
    """Image files in a folder and below, by name.

    Raises:
        AgentError: there are none.
    """
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not found:
        raise AgentError(f"{folder} holds no image files ({', '.join(sorted(SUFFIXES))})")
    return found


class FrameProducer:
    """Sends frames, keyed by camera, and tells where each one landed."""

    def __init__(self, config: KafkaConfig) -> None:
        """Reach a broker.

        Raises:
            BrokerUnavailable: no broker answered in time.
            InvalidConfig: the broker refused the credentials.
        """
        self._config = config
        try:
            self._producer = KafkaProducer(
                **settings(config), acks="all", max_request_size=_MAX_REQUEST_BYTES
            )
        except KafkaError as error:
            raise explain(error, config) from error

    def send(self, image: bytes, camera: str, landed: Callable[[FrameId], None]) -> None:
        """Queue a frame; `landed` is called from another thread once the broker has it.

        Raises:
            BrokerUnavailable: it cannot be queued.
        """
        try:
            future = self._producer.send(
                self._config.frames_topic, key=camera.encode(), value=image
            )
        except KafkaError as error:
            raise explain(error, self._config) from error
        future.add_callback(lambda meta: landed(FrameId(meta.topic, meta.partition, meta.offset)))
        future.add_errback(lambda error: _log.error("a frame was not delivered: %s", error))

    def close(self) -> None:
        """Deliver what is queued, and leave."""
        try:
            self._producer.flush(_FLUSH_S)
            self._producer.close(timeout=_FLUSH_S)
        except KafkaError as error:
            _log.error("not all frames were delivered: %s", error)


def paced(
    paths: Iterable[Path],
    per_second: float | None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[bytes]:
    """File contents, no faster than `per_second`; None is as fast as they are taken.

    A file that cannot be read is told of and left out.
    """
    start = clock()
    for index, path in enumerate(paths):
        if per_second is not None:
            ahead_s = start + index / per_second - clock()
            if ahead_s > 0:
                sleep(ahead_s)
        try:
            content = path.read_bytes()
        except OSError as error:
            _log.warning("%s is left out: %s", path, error.strerror)
        else:
            yield content
