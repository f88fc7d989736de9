"""What sinks without a broker keep; the Kafka sink has a suite of its own."""

import errno
import io
import json

import pytest

from agent.errors import PublishFailed, UnsupportedImage
from agent.sinks.jsonl import JsonlSink
from agent.sinks.memory import MemorySink
from agent.types import FrameId, Record, Rejected, Scored, Verdict

VERDICT = Verdict(
    frame=FrameId("frames", 0, 1),
    subject=None,
    camera="cam",
    captured_at=5.0,
    top=(Scored("dog", 0.9),),
    frozen=Scored("dog", 0.8),
    frozen_encoder="source",
    confidence=0.5,
    energy=-3.0,
    novelty=-4.0,
    threshold=-2.0,
    ood=False,
    domain=0,
    shift=0.0,
    strategy="frozen",
    version=0,
    model="offline",
    age_s=0.5,
    stage_s={},
)
REJECTED = Rejected(
    Record(FrameId("frames", 0, 2), b"cam", b"pixels", (), 5.0), UnsupportedImage("what is this")
)


class Memory:
    """The outputs as (kind, offset), whatever the sink."""

    def __init__(self):
        self.sink = MemorySink()

    def outputs(self):
        seen = [("verdict", verdict.frame.offset) for verdict in self.sink.verdicts]
        return seen + [("dead_letter", one.record.id.offset) for one in self.sink.rejected]


class Jsonl:
    def __init__(self):
        self.stream = io.StringIO()
        self.sink = JsonlSink(self.stream, now=lambda: 9.0)

    def outputs(self):
        return [self.output(json.loads(line)) for line in self.stream.getvalue().splitlines()]

    @staticmethod
    def output(fields):
        if fields["type"] == "dead_letter":
            return "dead_letter", fields["offset"]
        return "verdict", fields["data"]["frame"]["offset"]


@pytest.fixture(params=[Memory, Jsonl])
def kept(request):
    kept = request.param()
    yield kept
    kept.sink.close()


def test_what_was_flushed_is_there(kept):
    kept.sink.send([VERDICT], [REJECTED])
    kept.sink.flush()
    assert kept.outputs() == [("verdict", 1), ("dead_letter", 2)]


def test_batches_follow_each_other(kept):
    for _ in range(2):
        kept.sink.send([VERDICT], [])
        kept.sink.flush()
    assert kept.outputs() == [("verdict", 1)] * 2


def test_a_flush_of_nothing_is_fine(kept):
    kept.sink.send([], [])
    kept.sink.flush()
    assert kept.outputs() == []


def test_memory_shows_nothing_before_the_flush():
    sink = MemorySink()
    sink.send([VERDICT], [REJECTED])
    assert sink.verdicts == sink.rejected == []


def test_a_dead_letter_line_has_the_reason_and_no_bytes():
    kept = Jsonl()
    kept.sink.send([], [REJECTED])
    assert json.loads(kept.stream.getvalue()) == {
        "type": "dead_letter",
        "reason": "unsupported",
        "message": "what is this",
        "topic": "frames",
        "partition": 0,
        "offset": 2,
        "time": "1970-01-01T00:00:09.000Z",
    }


class BrokenStream(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def flush(self):
        raise self.error


def test_a_full_disk_fails_the_flush():
    with pytest.raises(PublishFailed):
        JsonlSink(BrokenStream(OSError(errno.ENOSPC, "full"))).flush()


def test_a_reader_that_went_away_ends_the_agent():
    with pytest.raises(BrokenPipeError):
        JsonlSink(BrokenStream(BrokenPipeError())).flush()
