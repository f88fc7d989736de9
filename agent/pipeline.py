"""The hot path: the one loop that moves frames from the source to the sink.

    poll → decode → batch → recognize → send → flush → commit → learn

One thread owns all of it; only decoding runs beside. The order is the promise: an offset is
committed after the outputs of every frame before it were acknowledged, so that each frame gets a
verdict or a dead letter at least once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from agent.batch import Batcher
from agent.decode import Decoder
from agent.errors import BrokerUnavailable, PublishFailed, Retryable
from agent.health import Health
from agent.metrics import Metrics
from agent.recognize import Recognizer
from agent.sinks import Sink
from agent.sources import EndOfStream, Source
from agent.types import Frame, Partition, Rejected, Verdict

#: Seconds that an idle poll waits for records, and so the most that a stop signal waits.
IDLE_POLL_S = 0.2
#: Seconds that a poll waits while frames are being decoded.
BUSY_POLL_S = 0.002
#: Batches' worth of records that may wait before the source is paused.
QUEUE_BATCHES = 4
#: Seconds between tries of what can be tried again, doubling up to the most.
BACKOFF_S = 0.25
MAX_BACKOFF_S = 5.0
#: Tries before a stopping agent leaves unacknowledged frames to the next one.
TRIES_WHEN_STOPPING = 3

_log = logging.getLogger(__name__)


class Pipeline:
    """Runs until it is stopped or the stream ends, and then drains."""

    def __init__(
        self,
        source: Source,
        decoder: Decoder,
        batcher: Batcher,
        recognizer: Recognizer,
        sink: Sink,
        *,
        queue_limit: int,
        health: Health,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        """`queue_limit` is in records; the source is paused while as many wait."""
        self._source = source
        self._decoder = decoder
        self._batcher = batcher
        self._recognizer = recognizer
        self._sink = sink
        self._queue_limit = queue_limit
        self._health = health
        self._metrics = metrics
        self._clock = clock
        self._stopping = threading.Event()
        self._lost: set[Partition] = set()
        self._full = False

    def stop(self) -> None:
        """Ask the loop to drain and return; safe from signal handlers and other threads."""
        self._stopping.set()

    def run(self) -> None:
        """Move frames until stopped or out of them; then answer what was already fetched.

        What cannot be published while stopping is left to be delivered again.
        """
        try:
            self._move()
            self._drain()
        except Retryable as error:
            _log.error("stopped with unanswered frames, which will be delivered again: %s", error)

    def _move(self) -> None:
        try:
            while not self._stopping.is_set():
                self._fetch()
                self._answer(self._batcher.take())
                self._recognizer.learn()
        except EndOfStream:
            _log.info("the stream has ended")

    def _fetch(self) -> None:
        """Hand what has arrived to the decoder, and keep our place in the group."""
        was_full, self._full = self._full, self._decoder.pending >= self._queue_limit
        if self._full:
            self._source.pause()
            if not was_full:
                self._metrics.pauses.inc()
        else:
            self._source.resume()
        try:
            records = self._source.poll(BUSY_POLL_S if self._decoder.pending else IDLE_POLL_S)
        except BrokerUnavailable as error:
            _log.warning("polling failed, trying again: %s", error)
            self._stopping.wait(BACKOFF_S)
            records = []
        self._note_lost()
        self._decoder.submit(records)
        self._health.beat()
        self._health.source_assigned = self._source.ready
        self._metrics.queue_depth.set(self._decoder.pending)
        self._metrics.lag.set(sum(self._source.lag().values()))

    def _answer(self, batch: Sequence[Frame | Rejected]) -> None:
        """Everything a batch needs, up to the commit; the source is paused meanwhile."""
        if not batch:
            return
        self._source.pause()
        self._lost.clear()
        rejected = [each for each in batch if isinstance(each, Rejected)]
        verdicts = self._recognizer.recognize([each for each in batch if isinstance(each, Frame)])
        self._timed("publish", lambda: self._publish(verdicts, rejected))
        self._timed("commit", lambda: self._commit(batch))
        self._count(batch, verdicts, rejected)

    def _drain(self) -> None:
        """Answer what is queued."""
        while self._decoder.pending:
            self._decoder.wait(IDLE_POLL_S)
            self._answer(self._batcher.take(draining=True))

    def _publish(self, verdicts: Sequence[Verdict], rejected: Sequence[Rejected]) -> None:
        def attempt() -> None:
            self._sink.send(verdicts, rejected)
            self._sink.flush()

        self._retrying("publishing", attempt)

    def _commit(self, batch: Sequence[Frame | Rejected]) -> None:
        """Commit the offset behind the last frame of each partition that is still ours."""
        ends = {each.record.id.log: each.record.id.offset + 1 for each in batch}

        def attempt() -> None:
            # Asked anew in every try: a partition may leave while we wait for the next.
            offsets = {log: end for log, end in ends.items() if log not in self._lost}
            if not offsets:
                return
            try:
                self._source.commit(offsets)
            except BrokerUnavailable:
                self._metrics.commits.labels("failed").inc()
                raise
            self._metrics.commits.labels("committed").inc()

        self._retrying("committing", attempt)

    def _retrying(self, doing: str, attempt: Callable[[], None]) -> None:
        """Until it succeeds; when stopping, a few times.

        Raises:
            Retryable: the agent is stopping and the tries are used up.
        """
        pause_s = BACKOFF_S
        tries = 0
        while True:
            try:
                return attempt()
            except (PublishFailed, BrokerUnavailable) as error:
                tries += 1
                if self._stopping.is_set() and tries >= TRIES_WHEN_STOPPING:
                    raise
                _log.warning("%s failed, trying again in %.2f s: %s", doing, pause_s, error)
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, MAX_BACKOFF_S)
            self._keep_place()

    def _keep_place(self) -> None:
        """A paused poll, so that a long retry does not cost us our partitions."""
        try:
            self._source.poll(0)
        except BrokerUnavailable:
            _log.debug("the group cannot be reached either")
        self._note_lost()
        self._health.beat()

    def _note_lost(self) -> None:
        lost = self._source.lost()
        if lost:
            self._lost |= lost
            self._decoder.drop(lost)

    def _count(
        self,
        batch: Sequence[Frame | Rejected],
        verdicts: Sequence[Verdict],
        rejected: Sequence[Rejected],
    ) -> None:
        self._health.batch_done()
        self._metrics.batch_size.observe(len(batch))
        for verdict in verdicts:
            camera = self._metrics.camera_label(verdict.camera)
            self._metrics.frames.labels(camera, "verdict").inc()
            self._metrics.frame_age.observe(verdict.age_s)
        for each in rejected:
            identity = each.record.id
            self._metrics.frames.labels("unknown", "dead_letter").inc()
            self._metrics.dead_letters.labels(each.error.reason).inc()
            _log.warning(
                "frame rejected: %s",
                each.error,
                extra={
                    "camera": (each.record.key or b"unknown").decode(errors="backslashreplace"),
                    "topic": identity.topic,
                    "partition": identity.partition,
                    "offset": identity.offset,
                },
            )

    def _timed(self, stage: str, work: Callable[[], None]) -> None:
        start = self._clock()
        work()
        self._metrics.stage.labels(stage).observe(self._clock() - start)
