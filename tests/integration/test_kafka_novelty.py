import base64
import json
import time

import pytest

from agent.brokers import free_port
from agent.config import KafkaConfig
from agent.errors import BrokerUnavailable
from agent.finds.find import Outcome
from agent.finds.topic import MAX_IN_FLIGHT, TopicStore
from tests.integration.brokers import create_topic, read_all
from tests.unit.finds import find

pytestmark = pytest.mark.integration


@pytest.fixture
def topic(kafka_config):
    name = f"{kafka_config.group_id}.unknown"
    create_topic(kafka_config.bootstrap_servers, name)
    return name


@pytest.fixture
def connect(kafka_config):
    stores = []

    def connect(topic, **changes):
        stores.append(TopicStore.connect(kafka_config.model_copy(update=changes), topic))
        return stores[-1]

    yield connect
    for store in stores:
        store.close()


def put(store, *finds):
    for each in finds:
        store.put(each)
    return outcomes_of(store, len(finds))


def outcomes_of(store, count, timeout_s=30.0):
    """What became of `count` finds, once it is known."""
    outcomes = []
    deadline = time.monotonic() + timeout_s
    while len(outcomes) < count and time.monotonic() < deadline:
        outcomes += [outcome for _, outcome in store.outcomes()]
        time.sleep(0.01)
    return outcomes


def settled(store):
    """Put until the producer knows the topic: the first finds may come before."""
    for _ in range(50):
        if put(store, find(0)) == [Outcome.KEPT]:
            return store
    raise AssertionError("the topic does not answer")


def test_an_event_holds_verdict_and_picture_keyed_by_camera(kafka_config, topic, connect):
    store = settled(connect(topic))
    assert put(store, find(7, thing=2, margin=1.5, camera="gate ü")) == [Outcome.KEPT]
    record = read_all(kafka_config.bootstrap_servers, topic)[-1]
    assert record.key == "gate ü".encode()
    assert record.headers == [("content-type", b"application/cloudevents+json")]
    fields = json.loads(record.value)
    assert (fields["id"], fields["type"]) == ("frames/0/7", "tta.novelty.v1")
    assert fields["data"]["margin"] == 1.5
    assert base64.b64decode(fields["data"]["thumbnail"]).startswith(b"\xff\xd8\xff")


def test_what_is_under_way_arrives_before_the_end(kafka_config, topic, connect):
    store = settled(connect(topic))
    for n in range(5):
        store.put(find(n + 1))
    store.close()
    assert [outcome for _, outcome in store.outcomes()] == [Outcome.KEPT] * 5
    records = read_all(kafka_config.bootstrap_servers, topic)
    ids = {json.loads(record.value)["id"] for record in records}
    assert {f"frames/0/{n + 1}" for n in range(5)} <= ids


def test_no_broker_at_the_start_is_told():
    servers = f"127.0.0.1:{free_port()}"
    with pytest.raises(BrokerUnavailable, match=servers):
        TopicStore.connect(KafkaConfig(bootstrap_servers=servers), "unknown")


def test_an_outage_fails_finds_and_holds_up_nothing(topic, connect, apache, caplog):
    store = settled(connect(topic, delivery_timeout_s=2.0))
    caplog.clear()
    apache.kill()
    try:
        begin = time.monotonic()
        for n in range(MAX_IN_FLIGHT + 10):
            store.put(find(n))
        assert time.monotonic() - begin < 1.0
        assert outcomes_of(store, MAX_IN_FLIGHT + 10) == [Outcome.FAILED] * (MAX_IN_FLIGHT + 10)
    finally:
        apache.start()
    assert sum("cannot be kept" in record.message for record in caplog.records) == 1
    assert put(settled(store), find(100)) == [Outcome.KEPT]
