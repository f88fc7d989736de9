import math

import pytest
import torch

from agent.adapt.information import (
    WINDOW,
    Advantage,
    FalseAdvantage,
    information,
    usual_variety,
    variety,
)


def test_sure_answers_that_differ_say_most():
    assert information(torch.eye(4)) == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    "answers",
    [torch.full((4, 4), 0.25), torch.eye(4)[:1].expand(4, 4)],
    ids=["unsure", "collapsed"],
)
def test_unsure_or_always_the_same_answers_say_nothing(answers):
    assert information(answers) == pytest.approx(0.0, abs=1e-6)


def test_an_advantage_is_relative_above_one_nat():
    small, large = Advantage(), Advantage()
    small.add(0.7, 0.5)
    large.add(2.2, 2.0)
    assert (small.mean, large.mean) == (pytest.approx(0.2), pytest.approx(0.1))


def test_an_advantage_fades():
    advantage = Advantage()
    for corrected in (1.0, 0.0):
        advantage.add(corrected, 0.0, fade=0.5)
    assert advantage.mean == pytest.approx(0.5 / 1.5)
    assert Advantage(*advantage.state().tolist()).mean == advantage.mean


def test_a_false_advantage_is_bounded_the_closer_the_more_galleries_there_are():
    chance = FalseAdvantage.of([0.02, 0.04, 0.06])
    assert chance == FalseAdvantage(pytest.approx(0.04), pytest.approx(0.02))
    assert chance.bound(1) == pytest.approx(0.08)
    assert chance.bound(4) == pytest.approx(0.06)


def test_of_one_gallery_the_deviation_is_guessed():
    assert FalseAdvantage.of([-0.03]).bound(1) == pytest.approx(0.03)


def test_variety_counts_labels_by_their_share():
    assert variety([1, 2, 3, 4]) == pytest.approx(4)
    assert variety([1, 1, 1, 1]) == pytest.approx(1)
    assert 1 < variety([1, 1, 1, 2]) < 2


def test_the_usual_variety_is_that_of_whole_windows():
    assert usual_variety([1] * WINDOW + [1, 2] * (WINDOW // 2) + [3]) == pytest.approx(2**0.5)
