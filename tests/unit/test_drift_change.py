import numpy as np
import pytest
import torch

from agent.drift.change import (
    CHANGE_DETECTORS,
    SIGNALS,
    Adwin,
    ChangePolicy,
    PageHinkleyTest,
    Ranks,
)


@pytest.mark.parametrize("kind", [Adwin, PageHinkleyTest])
@pytest.mark.parametrize("every", [10_000, 100_000])
def test_uniform_ranks_alarm_no_more_often_than_asked_for(kind, every):
    random = np.random.default_rng(0)
    frames, events = 200_000, 0
    detector = kind("entropy", every)
    for value in random.random(frames):
        events += detector.take(float(value))
    assert events <= 2 * frames / every


def test_page_hinkleys_bound_is_that_of_the_run_length():
    """Simulated on Gaussian values of the deviation that the bound is for, within a factor of 2."""
    every, frames = 2_000, 200_000
    values = np.random.default_rng(1).normal(0.5, 12**-0.5, frames)
    detector = PageHinkleyTest("energy", every)
    events = sum(detector.take(float(value)) for value in values)
    assert frames / every / 2 <= events <= frames / every * 2


@pytest.mark.parametrize("name", CHANGE_DETECTORS)
def test_a_change_is_told_within_two_hundred_frames_and_only_once(name):
    random = np.random.default_rng(2)
    detector = ChangePolicy(1_000_000, 64).detectors()[name]
    if name.endswith("agreement"):
        before, after = np.ones(500), (random.random(1000) < 0.6).astype(float)
    else:
        before, after = random.random(500), 0.5 + 0.5 * random.random(1000)
    assert sum(detector.take(float(value)) for value in before) == 0
    told = [frame for frame, value in enumerate(after) if detector.take(float(value))]
    assert told[0] < 200
    assert len(told) <= 2  # the first window may hold a little of what was before


def test_adwins_score_is_how_far_the_mean_is_from_the_usual():
    detector = Adwin("agreement", 1_000_000)
    assert detector.score == 0
    for value in (1.0, 1.0, 0.0, 0.0):
        detector.take(value)
    assert detector.score == 0.5


def test_page_hinkleys_score_passes_its_bound_when_it_tells():
    detector = PageHinkleyTest("energy", 1_000_000)
    assert detector.score == 0
    scores = []
    for value in [0.5] * 100 + [1.0] * 100:
        told = detector.take(value)
        scores.append(detector.score)
        if told:
            break
    assert scores[99] < scores[-2] <= PageHinkleyTest.bound("energy", 1_000_000) < scores[-1]


def test_rarer_alarms_need_more_evidence():
    often, seldom = (ChangePolicy(every, 64).thresholds() for every in (10_000, 10_000_000))
    assert all(seldom[name] > often[name] > 0 for name in CHANGE_DETECTORS)
    assert len(CHANGE_DETECTORS) == 2 * len(SIGNALS)


def test_ranks_of_normal_values_are_uniform_and_ties_share():
    normal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ranks = Ranks(normal).of(torch.randn(1000, generator=torch.Generator().manual_seed(1)))
    assert np.mean(ranks) == pytest.approx(0.5, abs=0.05)
    assert np.std(ranks) == pytest.approx(12**-0.5, abs=0.03)
    assert Ranks(torch.zeros(5)).of(torch.tensor([-1.0, 0.0, 1.0])) == [0, 0.5, 1]
