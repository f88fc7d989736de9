import time

import pytest
from kafka import KafkaAdminClient

from agent.brokers import free_port
from agent.config import KafkaConfig
from agent.errors import BrokerUnavailable
from agent.sources.kafka import KafkaSource
from agent.types import Partition
from tests.integration.brokers import create_topic, produce

pytestmark = pytest.mark.integration

MAX_BYTES = 500_000


@pytest.fixture
def connect(kafka_config):
    """Opens members of the test's group and closes those that the test left open."""
    members = []

    def member(**changes):
        config = kafka_config.model_copy(update=changes)
        members.append(KafkaSource.connect(config, MAX_BYTES, max_records=10))
        return members[-1]

    yield member
    for one in members:
        one.close()


def fill(config, count=20):
    """`count` records, by turns in both partitions."""
    records = [(b"cam", b"frame-%d" % n) for n in range(count)]
    return produce(config.bootstrap_servers, config.frames_topic, records, partitions=2)


def poll(source, count, timeout_s=30):
    """At least `count` records; fewer when time ran out."""
    records, deadline = [], time.monotonic() + timeout_s
    while len(records) < count and time.monotonic() < deadline:
        records += source.poll(0.2)
    return records


def poll_until(condition, *sources, timeout_s=120):
    """Poll all members until the condition holds; the records of each."""
    polled, deadline = [[] for _ in sources], time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        for source, records in zip(sources, polled, strict=True):
            records.extend(source.poll(0.1))
    assert condition()
    return polled


def share(first, second):
    """Poll until the second member owns what the first lost: that, and what the second polled."""
    lost = set()

    def shared():
        lost.update(first.lost())
        return lost and second.ready

    _, moved = poll_until(shared, first, second)
    return lost, moved


def next_offsets(records):
    return {record.id.log: record.id.offset + 1 for record in records}


def committed(config):
    admin = KafkaAdminClient(bootstrap_servers=config.bootstrap_servers)
    try:
        offsets = admin.list_group_offsets(config.group_id)[config.group_id]
    finally:
        admin.close()
    return {Partition(*partition): offset.offset for partition, offset in offsets.items()}


def partitions(config, *indices):
    return frozenset(Partition(config.frames_topic, index) for index in indices)


def test_records_arrive_as_they_were_sent(kafka_config, connect):
    headers = [("ce_source", b"dock"), ("x", b"")]
    topic, before = kafka_config.frames_topic, time.time()
    produce(kafka_config.bootstrap_servers, topic, [(b"cam", b"\xff\xd8", headers)])
    (record,) = poll(connect(), 1)
    assert (record.key, record.value, record.headers) == (b"cam", b"\xff\xd8", tuple(headers))
    assert (record.id.topic, record.id.offset) == (topic, 0)
    assert before - 2 < record.timestamp < time.time() + 2


def test_polls_are_bounded_and_each_partition_is_in_order(kafka_config, connect):
    fill(kafka_config, 40)
    source = connect()
    poll_until(lambda: source.ready, source)
    polls = [source.poll(0.5) for _ in range(10)]
    assert max(map(len, polls)) <= 10
    for partition in partitions(kafka_config, 0, 1):
        offsets = [r.id.offset for batch in polls for r in batch if r.id.log == partition]
        assert offsets == sorted(offsets)


def test_a_restart_resumes_after_the_commit(kafka_config, connect):
    fill(kafka_config)
    first = connect()
    records = poll(first, 20)
    done, rest = records[:7], records[7:]
    first.commit(next_offsets(done))
    first.close()
    again = poll(connect(), len(rest))
    assert {r.id for r in again} == {r.id for r in rest}


def test_what_was_not_committed_comes_again(kafka_config, connect):
    fill(kafka_config)
    first = connect()
    records = poll(first, 20)
    first.close()
    assert {r.id for r in poll(connect(), 20)} == {r.id for r in records}


def test_a_pause_keeps_the_membership_beyond_the_poll_interval(kafka_config, connect):
    source = connect(max_poll_interval_s=7.0)
    poll_until(lambda: source.ready, source)
    source.pause()
    fill(kafka_config)
    end = time.monotonic() + 9
    while time.monotonic() < end:
        assert source.poll(0.2) == []
    assert (source.ready, source.lost()) == (True, frozenset())
    source.resume()
    assert len(poll(source, 20)) == 20


def test_lag_counts_what_waits(kafka_config, connect):
    fill(kafka_config, 30)
    source = connect()
    seen = len(poll(source, 1))
    lag = source.lag()
    assert 0 < sum(lag.values()) <= 30 - seen
    poll(source, 30 - seen)
    assert source.lag() == dict.fromkeys(partitions(kafka_config, 0, 1), 0)


def test_a_second_member_takes_its_share_and_the_first_says_so(kafka_config, connect):
    fill(kafka_config)
    first = connect()
    in_flight = poll(first, 20)
    second = connect()
    lost, moved = share(first, second)
    assert len(lost) == 1
    assert first.lost() == frozenset()
    expected = {r.id for r in in_flight if r.id.log in lost}
    moved += poll(second, len(expected) - len(moved))
    assert {r.id for r in moved} == expected
    assert first.poll(0.5) == []  # what stayed keeps its position


def test_only_owned_partitions_are_committed(kafka_config, connect):
    fill(kafka_config)
    first = connect()
    in_flight = poll(first, 20)
    second = connect()
    (lost,), _ = share(first, second)
    first.commit(next_offsets(in_flight))
    assert set(committed(kafka_config)) == partitions(kafka_config, 0, 1) - {lost}


def test_a_paused_member_does_not_fetch_what_it_gains(kafka_config, connect):
    first, second = connect(), connect()
    poll_until(lambda: first.ready and second.ready, first, second)
    first.pause()
    second.close()
    fill(kafka_config)
    assert poll(first, 1, timeout_s=5) == []
    first.resume()
    assert len(poll(first, 20)) == 20


def test_a_member_that_was_expelled_loses_all_and_starts_again(kafka_config, connect):
    fill(kafka_config)
    source = connect(max_poll_interval_s=6.0)
    records = poll(source, 20)
    time.sleep(8)
    source.commit(next_offsets(records))  # the group has moved on: neither error nor commit
    assert poll(source, 1, timeout_s=8) == []  # nothing comes before the loss is known
    assert source.lost() == partitions(kafka_config, 0, 1)
    assert {r.id for r in poll(source, 20)} == {r.id for r in records}


def test_a_topic_that_comes_late_is_found(kafka_config, connect):
    late = f"{kafka_config.frames_topic}.late"
    source = connect(frames_topic=late)
    source.poll(1)
    if not source.ready:
        create_late(kafka_config, late)
    produce(kafka_config.bootstrap_servers, late, [(b"cam", b"x")])
    assert len(poll(source, 1, timeout_s=60)) == 1


def create_late(config, topic):
    admin = KafkaAdminClient(bootstrap_servers=config.bootstrap_servers)
    missing = topic not in admin.list_topics()
    admin.close()
    if missing:
        create_topic(config.bootstrap_servers, topic)


def test_no_broker_is_told_in_bounded_time():
    servers = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=servers):
        KafkaSource.connect(KafkaConfig(bootstrap_servers=servers), MAX_BYTES, 10)
    assert time.monotonic() - begin < 20


def test_an_outage_is_told_and_survived(kafka_config, connect, apache):
    fill(kafka_config)
    source = connect()
    records = poll(source, 20)
    apache.kill()
    with pytest.raises(BrokerUnavailable, match=apache.servers):
        source.commit(next_offsets(records))
    with pytest.raises(BrokerUnavailable):
        poll(source, 1)
    apache.start()
    fill(kafka_config, 4)
    again, deadline = [], time.monotonic() + 60
    while len({r.id for r in [*records, *again]}) < 24 and time.monotonic() < deadline:
        again += source.poll(0.2)
        source.lost()  # the broker may have forgotten the member, and then all comes again
    source.commit(next_offsets(again))
    assert committed(kafka_config) == dict.fromkeys(partitions(kafka_config, 0, 1), 12)


def test_silence_of_a_dead_broker_is_told(kafka_config, apache):
    hasty = KafkaSource.connect(
        kafka_config, MAX_BYTES, max_records=10, clock=lambda: 10 * time.monotonic()
    )
    poll_until(lambda: hasty.ready, hasty)
    apache.kill()
    try:
        with pytest.raises(BrokerUnavailable):
            poll(hasty, 1, timeout_s=40)
    finally:
        apache.start()
        hasty.close()
