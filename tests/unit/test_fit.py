import pytest
import torch

from agent.adapt.fit import Fit, FitConfig
from agent.adapt.information import information

K = 8
SURE = torch.eye(K)  # each frame shows something else, and is known for sure
VAGUE = torch.full((K, K), 1 / K)
ONE_THING = torch.eye(K)[:1].expand(K, K)


def watch(fit, answers, camera="a", domain=1):
    fit.observe([camera] * len(answers), [domain] * len(answers), answers)


def compare(fit, corrected, plain, camera="a", domain=1):
    return fit.compare([camera] * len(plain), [domain] * len(plain), corrected, plain)


@pytest.fixture
def fit():
    fit = Fit(FitConfig(frames=K, drop=0.2, memory=4))
    for _ in range(4):
        watch(fit, SURE)
    return fit


def test_answers_that_say_as_much_as_ever_raise_no_suspicion(fit):
    watch(fit, SURE)
    assert not fit.is_suspect("a", 1)
    assert not fit.is_suspect("never seen", 1)


def test_answers_that_say_less_raise_one_once_there_are_enough(fit):
    watch(fit, VAGUE[:-1])
    assert not fit.is_suspect("a", 1)
    watch(fit, VAGUE[-1:])
    assert fit.is_suspect("a", 1)


def test_a_drop_within_bounds_is_none(fit):
    blurred = 0.95 * SURE + 0.05 * VAGUE
    assert 0.8 < information(blurred) / information(SURE) < 0.9
    watch(fit, blurred)
    assert not fit.is_suspect("a", 1)


def test_a_camera_does_not_fit_where_the_plain_answers_say_much_more(fit):
    watch(fit, VAGUE)
    assert compare(fit, VAGUE[:-1], SURE[:-1]) == {}  # too few
    assert compare(fit, VAGUE[-1:], SURE[-1:]) == {"a": 1}
    assert not fit.is_suspect("a", 1)


def test_a_camera_that_looks_at_one_thing_fits_and_is_left_alone_longer_each_time(fit):
    pauses = []
    for _ in range(4):
        windows = 0
        while not fit.is_suspect("a", 1):
            watch(fit, ONE_THING)
            windows += 1
        pauses.append(windows)
        assert compare(fit, ONE_THING, ONE_THING) == {}
        assert not fit.is_suspect("a", 1)
    assert pauses == [1, 2, 3, 5]


def test_audits_without_suspicion_tell_too(fit):
    assert compare(fit, VAGUE, SURE) == {"a": 1}
    assert compare(fit, SURE, VAGUE, "b") == {}


def test_cameras_are_watched_one_by_one_against_their_domains_usual(fit):
    answers = torch.stack([VAGUE, SURE], dim=1).flatten(0, 1)
    fit.observe(["a", "b"] * K, [1] * 2 * K, answers)
    assert (fit.is_suspect("a", 1), fit.is_suspect("b", 1)) == (True, False)
    watch(fit, VAGUE, "c", domain=2)  # nothing is usual there
    assert not fit.is_suspect("c", 2)


def test_what_was_usual_is_forgotten_with_the_correction(fit):
    watch(fit, VAGUE)
    fit.forget(1)
    assert not fit.is_suspect("a", 1)
    watch(fit, VAGUE)
    assert not fit.is_suspect("a", 1)


def test_a_frame_elsewhere_changes_nothing(fit):
    watch(fit, VAGUE)
    watch(fit, VAGUE[:1], domain=2)
    assert fit.is_suspect("a", 1)
    assert not fit.is_suspect("a", 2)


def test_right_answers_on_one_thing_are_kept_although_wrong_ones_say_more(fit):
    watch(fit, ONE_THING)
    assert fit.is_suspect("a", 1)
    unsure = 0.8 * SURE + 0.2 * VAGUE
    assert information(unsure) > 1
    assert information(ONE_THING) == 0
    assert compare(fit, ONE_THING, unsure) == {}


def test_rounding_is_no_drop():
    fit = Fit(FitConfig(frames=K))
    for seed in range(20):
        noise = torch.rand(K, K, generator=torch.Generator().manual_seed(seed))
        watch(fit, (torch.ones(K, K) + 1e-3 * noise) / K)
    assert not fit.is_suspect("a", 1)
