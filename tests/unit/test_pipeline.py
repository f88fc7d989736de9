from concurrent import futures

import numpy as np
import pytest

from agent import pipeline as module
from agent.batch import Batcher
from agent.config import BatchConfig, DecodeConfig
from agent.decode import Decoder
from agent.errors import BrokerUnavailable, PublishFailed
from agent.health import Health
from agent.metrics import Metrics
from agent.pipeline import Pipeline
from agent.sinks.memory import MemorySink
from agent.sources.memory import MemorySource
from agent.testing import FakeClock, jpeg, picture, record
from agent.types import Partition, Scored, Verdict

P0, P1 = Partition("frames", 0), Partition("frames", 1)
IMAGE = jpeg(picture(np.random.default_rng(0)))


class Recognizer:
    """Says "cat" to everything, after what the test wants to happen meanwhile."""

    def __init__(self, meanwhile=lambda: None):
        self.meanwhile = meanwhile
        self.batches = []
        self.learned = 0

    def recognize(self, frames):
        self.batches.append([frame.record.id for frame in frames])
        self.meanwhile()
        cat = Scored("cat", 1.0)
        return [
            Verdict(
                *(frame.record.id, None, frame.camera, frame.captured_at, (cat,), cat, "source"),
                *(0.0, 0.0, 0.0, False, 0, 0.0, "fake", 0, "fake", 0.0, {}),
            )
            for frame in frames
        ]

    def learn(self):
        self.learned += 1


class Failing(MemorySink):
    """Refuses the first flushes; notes what it was sent and what was committed by then."""

    def __init__(self, failures, source, on_failure=lambda: None):
        super().__init__()
        self.failures = failures
        self.source = source
        self.on_failure = on_failure
        self.sends = []
        self.committed_at_failure = []

    def send(self, verdicts, rejected):
        super().send(verdicts, rejected)
        self.sends.append(ids(verdicts, rejected))

    def flush(self):
        if self.failures > 0:
            self.failures -= 1
            self._sent.clear()
            self.committed_at_failure.append(dict(self.source.committed))
            self.on_failure()
            raise PublishFailed("not acknowledged")
        super().flush()


class Source(MemorySource):
    """Notes every commit and every pause."""

    def __init__(self, records, max_records=32):
        super().__init__(records, max_records)
        self.commits = []
        self.on_commit = lambda: None
        self.on_poll = lambda: None

    def poll(self, timeout_s):
        self.on_poll()
        return super().poll(timeout_s)

    def commit(self, offsets):
        self.on_commit()
        super().commit(offsets)
        self.commits.append(dict(offsets))


class Prompt(Decoder):
    """Decodes before it returns, so that batches do not depend on how fast threads are."""

    def submit(self, records):
        super().submit(records)
        futures.wait([future for _, future in self._queue])


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_S", 0.0)


@pytest.fixture
def build():
    decoders = []

    def make(source, sink=None, recognizer=None, batch=4, queue_limit=16):
        decoder = Prompt(DecodeConfig(workers=2), 32, 1.0)
        decoders.append(decoder)
        clock = FakeClock()
        return Pipeline(
            source,
            decoder,
            Batcher(BatchConfig(max_size=batch, max_wait_ms=0), decoder, clock),
            recognizer or Recognizer(),
            sink or MemorySink(),
            queue_limit=queue_limit,
            health=Health(clock, 60.0),
            metrics=Metrics(10),
            clock=clock,
        )

    yield make
    for decoder in decoders:
        decoder.close()


def records(n, partition=0, start=0):
    return [record(IMAGE, offset, partition=partition) for offset in range(start, start + n)]


def mixed(n):
    """Frames of two partitions in turn."""
    return [each for pair in zip(records(n), records(n, 1), strict=True) for each in pair]


def ids(verdicts, rejected):
    return [v.frame for v in verdicts] + [r.record.id for r in rejected]


def test_every_frame_gets_a_verdict_in_order(build):
    source, sink = MemorySource(records(50)), MemorySink()
    build(source, sink).run()
    assert [v.frame.offset for v in sink.verdicts] == list(range(50))
    assert source.committed == {P0: 50}


def test_every_record_gets_a_verdict_or_a_dead_letter(build):
    bad = [record(b"no image", 20), record(None, 21)]
    source, sink = MemorySource([*records(20), *bad, *records(10, start=22)]), MemorySink()
    build(source, sink).run()
    assert sorted(i.offset for i in ids(sink.verdicts, sink.rejected)) == list(range(32))
    assert [r.record.id.offset for r in sink.rejected] == [20, 21]
    assert source.committed == {P0: 32}


def test_a_stream_of_nothing_but_bad_records_is_committed(build):
    source, sink = MemorySource([record(b"no image", n) for n in range(5)]), MemorySink()
    build(source, sink).run()
    assert len(sink.rejected) == 5
    assert source.committed == {P0: 5}


def test_nothing_is_committed_before_it_is_acknowledged(build):
    source = Source(records(4))
    sink = Failing(3, source)
    build(source, sink).run()
    assert sink.committed_at_failure == [{}] * 3
    assert source.committed == {P0: 4}


def test_what_was_not_acknowledged_is_sent_again_and_the_same(build):
    source = Source(records(4))
    sink = Failing(2, source)
    recognizer = Recognizer()
    build(source, sink, recognizer).run()
    assert sink.sends[0] == sink.sends[1] == sink.sends[2]
    assert [v.frame.offset for v in sink.verdicts] == [0, 1, 2, 3]
    assert len(recognizer.batches) == len(sink.sends) - 2  # not recognised anew


def test_a_commit_that_fails_is_tried_again(build):
    source = Source(records(4))
    failures = iter([BrokerUnavailable("gone"), BrokerUnavailable("gone")])

    def fail():
        for error in failures:
            raise error

    source.on_commit = fail
    pipeline = build(source)
    pipeline.run()
    assert source.committed == {P0: 4}
    assert (
        pipeline._metrics.registry.get_sample_value("tta_commits_total", {"outcome": "failed"}) == 2
    )


def test_a_partition_lost_before_the_commit_is_not_committed(build):
    source = Source(mixed(2))
    sink = Failing(1, source, on_failure=lambda: source.lose(frozenset({P0})))
    build(source, sink).run()
    assert source.commits[0] == {P1: 2}
    assert source.committed == {P0: 2, P1: 2}
    assert {v.frame for v in sink.verdicts} == {r.id for r in mixed(2)}


def test_a_partition_lost_while_a_commit_is_tried_again_is_not_committed(build):
    source = Source(mixed(4), max_records=8)
    losses = iter([frozenset({P0})])

    def fail():
        for lost in losses:
            source.lose(lost)
            raise BrokerUnavailable("rebalancing")

    source.on_commit = fail
    build(source, batch=8).run()
    assert source.commits[0] == {P1: 4}
    assert source.committed == {P0: 4, P1: 4}


def test_queued_frames_of_a_lost_partition_are_dropped(build):
    source, sink = Source(mixed(20), max_records=8), MemorySink()
    losses = iter([None, None, frozenset({P0})])
    source.on_poll = lambda: [source.lose(lost) for lost in [next(losses, None)] if lost]
    build(source, sink, batch=2).run()
    assert sorted(v.frame for v in sink.verdicts) == sorted(r.id for r in mixed(20))
    assert source.committed == {P0: 20, P1: 20}


def test_stop_answers_what_was_fetched_and_no_more(build):
    source, sink = Source(records(100), max_records=10), MemorySink()
    recognizer = Recognizer()
    pipeline = build(source, sink, recognizer, queue_limit=100)
    recognizer.meanwhile = pipeline.stop
    pipeline.run()
    answered = len(sink.verdicts)
    assert answered == 10 == 100 - sum(source.lag().values())
    assert source.committed == {P0: answered}


def test_a_stop_before_the_start_returns(build):
    source = Source(records(3))
    pipeline = build(source)
    pipeline.stop()
    pipeline.run()
    assert source.commits == []


def test_a_stop_while_the_sink_is_down_returns_and_commits_nothing(build):
    source = Source(records(100), max_records=4)
    sink = Failing(10**9, source)
    pipeline = build(source, sink, batch=4)
    sink.on_failure = pipeline.stop
    pipeline.run()
    assert source.commits == []
    assert sink.verdicts == []


def test_nothing_behind_an_unanswered_batch_is_committed(build):
    source = Source(records(40), max_records=40)
    sink = Failing(module.TRIES_WHEN_STOPPING, source)
    pipeline = build(source, sink, batch=4, queue_limit=40)
    sink.on_failure = pipeline.stop
    pipeline.run()
    assert source.commits == []


def test_an_outage_is_waited_out_when_nobody_stops(build):
    source = Source(records(8))
    sink = Failing(50, source)
    build(source, sink).run()
    assert source.committed == {P0: 8}


def test_a_poll_that_fails_is_tried_again(build):
    source, sink = Source(records(8)), MemorySink()
    failures = iter([BrokerUnavailable("gone")] * 3)

    def fail():
        for error in failures:
            raise error

    source.on_poll = fail
    build(source, sink).run()
    assert len(sink.verdicts) == 8


def test_a_full_queue_pauses_the_source(build):
    source, sink = Source(records(60), max_records=4), MemorySink()
    depths = []
    pipeline = build(source, sink, batch=1, queue_limit=8)
    source.on_poll = lambda: depths.append(pipeline._decoder.pending)
    pipeline.run()
    assert max(depths) <= 8 + 4 - 1
    assert len(sink.verdicts) == 60
    assert pipeline._metrics.registry.get_sample_value("tta_pauses_total") >= 1


def test_a_pause_is_counted_once_however_long_it_lasts(build):
    source = Source(records(9), max_records=8)
    pipeline = build(source, batch=8, queue_limit=8)
    waits = iter(range(20))
    pipeline._batcher.take = lambda draining=False: (
        [] if next(waits, None) is not None else pipeline._decoder.take(8)
    )
    pipeline.run()
    assert pipeline._metrics.registry.get_sample_value("tta_pauses_total") == 1


def test_the_source_is_paused_while_a_batch_is_computed(build):
    source = Source(records(12), max_records=4)
    states = []
    build(source, recognizer=Recognizer(lambda: states.append(source._paused))).run()
    assert states
    assert all(states)


def test_learning_gets_its_turn_and_the_loop_is_seen(build):
    source = Source(records(12), max_records=4)
    recognizer = Recognizer()
    pipeline = build(source, recognizer=recognizer)
    assert not pipeline._health.live().ok
    pipeline.run()
    assert recognizer.learned >= 3
    assert pipeline._health.live().ok
    assert pipeline._health.source_assigned
