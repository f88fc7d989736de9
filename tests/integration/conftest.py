"""One broker for the whole run; it says in the summary which one it was."""

import uuid

import pytest

from agent.config import KafkaConfig
from tests.integration.brokers import UnavailableError, create_topic, running_broker

BROKER_KIND = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def broker(request):
    try:
        with running_broker() as broker:
            request.config.stash[BROKER_KIND] = broker.kind
            yield broker
    except UnavailableError as error:
        pytest.fail(str(error))


@pytest.fixture
def apache(broker):
    """The broker as something that can be stopped and started."""
    if broker.kafka is None:
        pytest.skip("needs Apache Kafka, to stop and start it")
    yield broker.kafka


@pytest.fixture
def kafka_config(broker):
    """Topics and a group that no other test uses; frames have two partitions."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    config = KafkaConfig(
        bootstrap_servers=broker.servers,
        group_id=name,
        frames_topic=f"{name}.frames",
        verdicts_topic=f"{name}.verdicts",
        dead_letter_topic=f"{name}.dead-letter",
        session_timeout_s=6.0,
        delivery_timeout_s=10.0,
    )
    create_topic(broker.servers, config.frames_topic, partitions=2)
    for topic in (config.verdicts_topic, config.dead_letter_topic):
        create_topic(broker.servers, topic)
    return config


def pytest_terminal_summary(terminalreporter, config):
    kind = config.stash.get(BROKER_KIND, None)
    if kind is not None:
        terminalreporter.write_line(f"integration tests ran against: {kind}")
