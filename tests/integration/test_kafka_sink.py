import json
import time
from dataclasses import replace

import pytest

from agent.brokers import free_port
from agent.config import KafkaConfig
from agent.errors import BrokerUnavailable, CorruptImage, PublishFailed
from agent.sinks.kafka import KafkaSink
from agent.types import FrameId, Record, Rejected, Scored, Verdict
from tests.integration.brokers import create_topic, produce, read_all

pytestmark = pytest.mark.integration

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


def verdicts(count):
    return [replace(VERDICT, frame=FrameId("frames", 0, n)) for n in range(count)]


def rejected(value=b"\x00\xff", key=b"cam", headers=(("a", b"1"), ("b", None))):
    return Rejected(Record(FrameId("frames", 1, 7), key, value, headers, 5.0), CorruptImage("bad"))


@pytest.fixture
def open_sink(kafka_config):
    sinks = []

    def sink(**changes):
        sinks.append(KafkaSink.connect(kafka_config.model_copy(update=changes), now=lambda: 9.0))
        return sinks[-1]

    yield sink
    for one in sinks:
        one.close()


def published(config):
    return read_all(config.bootstrap_servers, config.verdicts_topic)


def dead_letters(config):
    return read_all(config.bootstrap_servers, config.dead_letter_topic)


def test_verdicts_are_there_after_the_flush(kafka_config, open_sink):
    sink = open_sink()
    sink.send(verdicts(50), [])
    sink.flush()
    records = published(kafka_config)
    assert [json.loads(r.value)["id"] for r in records] == [f"frames/0/{n}" for n in range(50)]
    assert {r.key for r in records} == {b"cam"}
    assert records[0].headers == [("content-type", b"application/cloudevents+json")]


def test_a_dead_letter_keeps_bytes_key_and_headers(kafka_config, open_sink):
    sink = open_sink()
    sink.send([], [rejected()])
    sink.flush()
    (record,) = dead_letters(kafka_config)
    assert (record.key, record.value) == (b"cam", b"\x00\xff")
    assert record.headers[:3] == [("a", b"1"), ("b", b""), ("tta.error.reason", b"corrupt")]


def test_records_without_key_or_value_are_dead_letters_too(kafka_config, open_sink):
    sink = open_sink()
    sink.send([], [rejected(None, None), rejected(None, b"k"), rejected(b"v", None)])
    sink.flush()
    kept = {(record.key, record.value) for record in dead_letters(kafka_config)}
    assert kept == {(None, b""), (b"k", None), (None, b"v")}


def test_a_frame_of_megabytes_is_kept_where_the_topic_takes_it(kafka_config, open_sink):
    topic = f"{kafka_config.group_id}.large"
    create_topic(kafka_config.bootstrap_servers, topic, **{"max.message.bytes": "8000000"})
    sink = open_sink(dead_letter_topic=topic)
    sink.send([], [rejected(b"x" * 3_000_000)])
    sink.flush()
    (record,) = read_all(kafka_config.bootstrap_servers, topic)
    assert len(record.value) == 3_000_000


def test_a_dead_letter_that_its_topic_refuses_leaves_its_value_behind(
    kafka_config, open_sink, apache
):
    sink = open_sink()
    sink.send(verdicts(1), [rejected(b"x" * 3_000_000), rejected()])
    sink.flush()
    letters = dead_letters(kafka_config)
    assert sorted(len(record.value) for record in letters) == [0, 2]
    assert [dict(r.headers).get("tta.error.value") for r in letters if not r.value] == [b"omitted"]
    assert len(published(kafka_config)) == 1


def test_the_sink_works_on_after_a_refusal(kafka_config, open_sink, apache):
    sink = open_sink()
    for _ in range(3):
        sink.send(verdicts(1), [rejected(b"x" * 3_000_000)])
        sink.flush()
    assert len(published(kafka_config)) == len(dead_letters(kafka_config)) == 3


def test_no_broker_is_told_in_bounded_time():
    servers = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=servers):
        KafkaSink.connect(KafkaConfig(bootstrap_servers=servers))
    assert time.monotonic() - begin < 20


def test_an_outage_fails_the_flush_and_a_repeat_succeeds(kafka_config, open_sink, apache):
    sink = open_sink()
    sink.send(verdicts(1), [])
    sink.flush()
    apache.kill()
    try:
        with pytest.raises(PublishFailed):
            publish(sink, verdicts(3))
    finally:
        apache.start()
    publish(sink, verdicts(3))
    ids = {json.loads(record.value)["id"] for record in published(kafka_config)}
    assert ids == {f"frames/0/{n}" for n in range(3)}


def publish(sink, batch):
    sink.send(batch, [])
    sink.flush()


def test_a_restart_of_the_broker_during_delivery_is_bridged(kafka_config, open_sink, apache):
    sink = open_sink(delivery_timeout_s=60.0)
    publish(sink, verdicts(1))
    apache.stop()
    sink.send(verdicts(5), [])
    apache.start()
    sink.flush()
    produce(kafka_config.bootstrap_servers, kafka_config.frames_topic, [(b"a", b"b")])
    assert len(published(kafka_config)) == 6
