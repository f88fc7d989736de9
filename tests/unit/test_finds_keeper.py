import numpy as np
import pytest

from agent.finds import keeper as module
from agent.finds.allowance import MAX_CAMERAS, Allowance
from agent.finds.find import Find, Outcome, Remembered
from agent.finds.keeper import MAX_WAITING, SETTLE_S, Keeper
from agent.finds.seen import MEMORY, Seen
from agent.metrics import NOVELTY_OUTCOMES, Metrics
from agent.testing import FakeClock, record
from agent.types import Frame
from tests.unit.finds import DAY_S, D, MemoryStore, embedding, find, verdict


class Bench:
    """A keeper with fake surroundings."""

    def __init__(self, per_hour=100, store=None, max_age_s=DAY_S, similarity=0.8):
        self.clock = FakeClock(1000.0)
        self.store = store or MemoryStore()
        self.metrics = Metrics(10)
        self.keeper = Keeper(
            self.store,
            Seen(D, similarity, max_age_s),
            Allowance(per_hour, self.clock),
            similarity=similarity,
            metrics=self.metrics,
            monotonic=self.clock,
            wall=self.clock,
        )
        self.keeper.recall()
        self.keeper.settle()

    def pass_time(self, seconds=SETTLE_S):
        self.clock.advance(seconds)
        for _ in range(2 * MAX_WAITING):
            self.keeper.settle()

    def see(self, *finds):
        self.keeper.offer(finds)
        self.pass_time()

    @property
    def kept(self):
        return [each.verdict.frame.offset for each in self.store.kept]

    def counts(self):
        sample = self.metrics.registry.get_sample_value
        name = "tta_novelty_frames_total"
        return {each: sample(name, {"outcome": each}) for each in NOVELTY_OUTCOMES}


def test_outcomes_have_their_series_from_the_start():
    assert set(NOVELTY_OUTCOMES) == set(Outcome)
    assert Bench().counts() == dict.fromkeys(NOVELTY_OUTCOMES, 0)


def test_two_strange_things_are_both_kept_the_stranger_first():
    bench = Bench()
    bench.see(find(1, thing=0, margin=1.0), find(2, thing=1, margin=2.0))
    assert bench.kept == [2, 1]
    assert bench.metrics.registry.get_sample_value("tta_novelty_held_bytes") == 14


def test_one_strange_thing_makes_one_picture_its_strangest():
    bench = Bench()
    bench.keeper.offer([find(n, margin=[1.0, 3.0, 2.0][n]) for n in range(3)])
    bench.pass_time()
    for n in range(3, 400):
        bench.see(find(n, thing=0.1 * (n % 3)))
    assert bench.kept == [1]
    assert bench.counts()["duplicate"] == 399


def test_what_is_like_two_that_wait_stands_for_both_if_it_is_stranger():
    bench = Bench(similarity=0.7)
    bench.see(find(1, thing=0, margin=1.0), find(2, thing=1), find(3, thing=0.5, margin=2.0))
    assert bench.kept == [3]
    assert bench.counts()["duplicate"] == 2


def test_what_another_camera_showed_is_no_news():
    bench = Bench()
    bench.see(find(1, camera="a"))
    bench.see(find(2, camera="b"))
    assert bench.kept == [1]


def test_a_thing_is_news_again_when_its_picture_is_too_old():
    bench = Bench(max_age_s=100.0)
    bench.see(find(1))
    bench.pass_time(101.0)
    bench.see(find(2))
    assert bench.kept == [1, 2]


def test_a_short_allowance_goes_to_the_strangest_and_the_rest_waits_its_turn():
    bench = Bench(per_hour=2)
    bench.see(*[find(n, thing=n, margin=float(n)) for n in range(5)])
    assert bench.kept == [4, 3]
    bench.see(find(5, thing=5, margin=9.0))
    bench.pass_time(1800.0)
    assert bench.kept == [4, 3, 5]
    bench.pass_time(3600.0)
    assert bench.kept == [4, 3, 5, 2, 1]


def test_each_camera_has_an_allowance_of_its_own():
    bench = Bench(per_hour=1)
    bench.see(*[find(n, thing=n, camera=str(n % 2)) for n in range(4)])
    assert sorted(bench.kept) == [0, 1]


def test_one_find_is_put_at_a_time():
    bench = Bench()
    bench.keeper.offer([find(0, thing=0), find(1, thing=1)])
    bench.clock.advance(SETTLE_S)
    bench.keeper.settle()
    assert len(bench.kept) == 1


def test_what_waits_is_bounded_and_one_camera_does_not_crowd_out_another(monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 4)
    bench = Bench(per_hour=4)
    loud = [find(n, thing=n, margin=10.0 + n, camera="loud") for n in range(6)]
    bench.see(find(9, thing=6, margin=0.1, camera="quiet"), *loud)
    assert sorted(bench.kept) == [3, 4, 5, 9]
    assert bench.counts()["rate_limited"] == 3


def test_what_failed_is_tried_again_when_it_is_seen_again():
    bench = Bench()
    bench.store.refuses = True
    bench.see(find(1))
    bench.store.refuses = False
    bench.see(find(2))
    assert bench.kept == [2]
    assert bench.counts() == {"kept": 1, "duplicate": 0, "rate_limited": 0, "failed": 1}


def test_what_an_earlier_run_kept_is_not_kept_again():
    bench = Bench(store=MemoryStore([Remembered(embedding(3), 900.0)]))
    bench.see(find(1, thing=3), find(2, thing=5))
    assert bench.kept == [2]


def test_what_waits_is_put_at_the_end_as_far_as_it_is_allowed():
    bench = Bench(per_hour=2)
    bench.keeper.offer([find(n, thing=n, margin=float(n)) for n in range(3)])
    bench.keeper.close()
    assert bench.kept == [2, 1]
    assert bench.store.closed
    assert bench.counts()["rate_limited"] == 1


def test_frames_without_a_feature_come_last_and_are_alike():
    bench = Bench(per_hour=2)
    bench.see(find(1, None, margin=0.0), find(2, None, margin=0.0), find(3, 0), find(4, 1))
    assert bench.kept == [3, 4]
    bench.pass_time(3600)
    assert bench.kept == [3, 4, 1]


@pytest.mark.parametrize("novelty", [5.0, np.nan, np.inf])
def test_a_frame_without_a_feature_has_no_margin(novelty):
    frame = Frame(record(b""), "cam", 0.0, np.zeros((4, 4, 3), np.uint8))
    assert Find.of(frame, verdict(margin=novelty), np.zeros(D, np.float32)).margin == 0.0
    assert Find.of(frame, verdict(margin=3.0), embedding(0)).margin == 3.0


def test_memory_is_bounded():
    seen = Seen(D, 0.8, DAY_S)
    seen.add(embedding(0), 0.0)
    for _ in range(MEMORY):
        seen.add(embedding(1), 0.0)
    assert not seen.has(embedding(0), 1.0)
    assert seen.has(embedding(1), 1.0)


def test_whoever_invents_cameras_gets_no_more_than_so_many_have():
    clock = FakeClock()
    allowance = Allowance(2, clock)
    taken = sum(allowance.take(f"invented-{n}") for n in range(10 * MAX_CAMERAS))
    assert taken == 2 * MAX_CAMERAS
    clock.advance(3600.0)
    assert allowance.take("honest")
