import random

import pytest
import torch

from agent.adapt.steadiness import Steadiness


def entropies(mean, n, seed=0):
    chance = random.Random(seed)
    return [chance.gauss(mean, 1.0) for _ in range(n)]


def steady(n=128, seed=0):
    watched = Steadiness(window=32, bar=3.0)
    assert not watched.add(entropies(2.0, n, seed))
    return watched


@pytest.mark.parametrize("mean", [0.5, 3.5])
def test_a_great_change_is_told_within_two_windows(mean):
    assert steady().add(entropies(mean, 64))


def test_a_small_change_is_told_by_many_frames_and_not_by_few():
    told = {32: 0, 128: 0}
    for seed in range(50):
        for frames in told:
            told[frames] += steady(seed=1).add(entropies(2.4, frames, seed + 9))
    assert told[32] <= 15
    assert told[128] >= 40


def test_chance_seldom_passes_for_a_change():
    false = sum(Steadiness(32, 3.0).add(entropies(2.0, 640, seed)) for seed in range(100))
    assert false <= 20


def test_after_a_change_all_begins_anew():
    watched = steady()
    assert watched.add(entropies(6.0, 32))
    assert not watched.add(entropies(6.0, 64))


def test_it_is_the_same_however_frames_are_batched():
    together, alone = steady(), steady()
    values = entropies(2.0, 50, 3)
    together.add(values)
    for value in values:
        alone.add([value])
    assert together.state().tolist() == alone.state().tolist()


def test_a_camera_at_rest_has_not_changed():
    assert not Steadiness(32, 3.0).add([0.1] * 6400)


def test_what_is_no_number_does_not_blind_it():
    watched = steady()
    watched.add([float("nan"), float("inf")])
    assert watched.add(entropies(6.0, 64))


def test_a_snapshot_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="three columns"):
        Steadiness(32, 3.0).load(torch.zeros(2, 2))


def test_it_survives_a_snapshot():
    watched, restored = steady(150), Steadiness(32, 3.0)
    restored.load(watched.state())
    later = entropies(2.4, 400, 5)
    assert [watched.add([x]) for x in later] == [restored.add([x]) for x in later]
