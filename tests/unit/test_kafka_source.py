from kafka import TopicPartition

from agent.config import KafkaConfig
from agent.sources.kafka import KafkaSource
from agent.testing import FakeClock


class Quiet:
    """A consumer to which the group gives nothing."""

    def __init__(self):
        self.joined = self.left = 0

    def poll(self, timeout_ms):
        return {}

    def subscribe(self, topics, listener):
        self.joined += 1

    def unsubscribe(self):
        self.left += 1

    def pause(self, *partitions):
        pass

    def end_offsets(self, partitions, timeout_ms):
        return {}


def idle(source, clock, minutes):
    for _ in range(6 * minutes):
        clock.advance(10.1)
        source.poll(0)


def test_a_member_without_partitions_joins_anew_ever_more_rarely():
    clock, consumer = FakeClock(), Quiet()
    source = KafkaSource(consumer, KafkaConfig(), clock, clock)
    idle(source, clock, minutes=1)
    assert consumer.joined == consumer.left == 2
    source.gain([TopicPartition("frames", 0)])
    source.lose([TopicPartition("frames", 0)])
    idle(source, clock, minutes=60)
    assert consumer.joined == consumer.left == 8


def test_a_quiet_member_with_partitions_stays():
    clock, consumer = FakeClock(), Quiet()
    source = KafkaSource(consumer, KafkaConfig(), clock, clock)
    source.gain([TopicPartition("frames", 0)])
    idle(source, clock, minutes=10)
    assert consumer.joined == 0
