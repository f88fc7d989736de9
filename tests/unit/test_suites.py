import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from agent.bench.pool import CLEAR, Condition, Pool
from agent.bench.suites import SUITES


@pytest.fixture(scope="module")
def pool():
    labels = tuple(f"label {n % 50}" for n in range(400))
    return Pool(labels, np.zeros((400, 8, 8, 3), np.uint8), Path("nowhere"))


def suite(name, pool, frames=72, seed=0):
    return SUITES[name](pool, frames, np.random.default_rng(seed))


@pytest.mark.parametrize("name", [name for name in SUITES if name != "long"])
def test_a_suite_is_seeded_and_never_shows_what_was_calibrated_on(name, pool):
    shots = suite(name, pool).shots
    assert shots == suite(name, pool).shots != suite(name, pool, seed=1).shots
    assert {shot.photo for shot in shots} <= set(pool.stream)


def test_continual_is_clear_fifteen_corruptions_at_their_worst_and_clear(pool):
    phases = Counter(shot.phase for shot in suite("continual", pool).shots)
    assert len(phases) == 17
    assert set(phases.values()) == {72}
    assert list(phases)[0::16] == ["clear", "clear again"]


def test_gradual_waxes_and_wanes_in_steps_of_one(pool):
    shots = [s for s in suite("gradual", pool).shots if s.phase == "fog"]
    severities = [shot.condition.severity for shot in shots]
    assert (severities[0], max(severities), severities[-1]) == (1, 5, 1)
    assert max(abs(a - b) for a, b in itertools.pairwise(severities)) == 1


def test_recurring_comes_round_twenty_times(pool):
    shots = suite("recurring", pool, frames=100).shots
    assert len(shots) == 20 * 4 * 100
    phases = Counter(shot.phase for shot in shots)
    assert phases["fog, new"] == 100
    assert phases["fog, arrival"] == phases["fog, stay"] == 19 * 50


def test_mixed_shows_eight_domains_in_every_batch(pool):
    mixed = suite("mixed", pool)
    for start in range(0, len(mixed.shots), mixed.batch):
        batch = mixed.shots[start : start + mixed.batch]
        assert len({(shot.camera, shot.condition) for shot in batch}) == 8


def test_correlated_comes_sorted_by_label(pool):
    shots = [shot for shot in suite("correlated", pool).shots if shot.phase == "clear"]
    labels = [pool.labels[shot.photo] for shot in shots]
    assert len([1 for a, b in itertools.pairwise(labels) if a != b]) < len(set(labels))


def test_imbalanced_follows_zipf(pool):
    shots = suite("imbalanced", pool, frames=2000).shots
    counts = [n for _, n in Counter(pool.labels[shot.photo] for shot in shots).most_common()]
    assert counts[0] / counts[3] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize(("name", "share"), [("open-25", 0.25), ("open-50", 0.5)])
def test_open_shows_what_no_label_names(name, share, pool):
    stream = suite(name, pool, frames=500)
    unknown = np.mean([pool.labels[shot.photo] in stream.held_out for shot in stream.shots])
    assert len(stream.held_out) == 25
    assert unknown == pytest.approx(share, abs=0.05)


def test_single_answers_one_frame_at_a_time(pool):
    assert suite("single", pool).batch == 1


def test_lowres_falls_to_an_eighth_and_comes_back(pool):
    stream = suite("lowres", pool)
    steps = [stream.shots[start].condition for start in range(0, len(stream.shots), 72)]
    assert steps[0] == steps[-1] == CLEAR
    assert steps[3] == Condition("lowres", 3)


def test_long_is_a_hundred_thousand_frames_of_the_same_weather_in_every_tenth(pool):
    shots = suite("long", pool, frames=250).shots
    assert len(shots) >= 100_000
    first = Counter(s.condition for s in shots if s.phase == "tenth 1")
    last = Counter(s.condition for s in shots if s.phase == "tenth 10")
    assert first == last
