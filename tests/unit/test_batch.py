import pytest

from agent.batch import Batcher
from agent.config import BatchConfig
from agent.testing import FakeClock


class Ready:
    """A decoder with so many outcomes ready."""

    def __init__(self):
        self.outcomes = []

    def ready(self):
        return len(self.outcomes)

    def take(self, limit):
        taken, self.outcomes = self.outcomes[:limit], self.outcomes[limit:]
        return taken


@pytest.fixture
def parts():
    clock, decoder = FakeClock(), Ready()
    return Batcher(BatchConfig(max_size=4, max_wait_ms=50), decoder, clock), decoder, clock


def test_a_full_batch_goes_at_once(parts):
    batcher, decoder, _ = parts
    decoder.outcomes = list("abcdef")
    assert batcher.take() == list("abcd")


def test_a_part_of_one_goes_when_its_first_frame_has_waited(parts):
    batcher, decoder, clock = parts
    decoder.outcomes = ["a"]
    assert batcher.take() == []
    clock.advance(0.03)
    decoder.outcomes.append("b")
    assert batcher.take() == []
    clock.advance(0.02)
    assert batcher.take() == ["a", "b"]


def test_the_wait_begins_anew_with_the_next_batch(parts):
    batcher, decoder, clock = parts
    decoder.outcomes = list("abcde")
    batcher.take()
    clock.advance(0.06)
    assert batcher.take() == []
    clock.advance(0.06)
    assert batcher.take() == ["e"]


def test_who_waited_in_vain_leaves_no_wait_behind(parts):
    batcher, decoder, clock = parts
    decoder.outcomes = ["dropped with its partition"]
    batcher.take()
    decoder.outcomes = []
    batcher.take()
    clock.advance(1)
    decoder.outcomes = ["b"]
    assert batcher.take() == []


def test_draining_takes_what_is_there(parts):
    batcher, decoder, _ = parts
    decoder.outcomes = ["a"]
    assert batcher.take(draining=True) == ["a"]
    assert batcher.take(draining=True) == []
