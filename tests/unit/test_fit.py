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
    assert not fit.is_suspect("a")
    assert not fit.is_suspect("never seen")


def test_answers_that_say_less_raise_one_once_there_are_enough(fit):
    watch(fit, VAGUE[:-1])
    assert not fit.is_suspect("a")
    watch(fit, VAGUE[-1:])
    assert fit.is_suspect("a")


def test_a_drop_within_bounds_is_none(fit):
    blurred = 0.95 * SURE + 0.05 * VAGUE
    assert 0.8 < information(blurred) / information(SURE) < 0.9
    watch(fit, blurred)
    assert not fit.is_suspect("a")


def test_a_camera_does_not_fit_where_the_plain_answers_say_much_more(fit):
    watch(fit, VAGUE)
    assert compare(fit, VAGUE[:-1], SURE[:-1]) == {}  # too few
    assert compare(fit, VAGUE[-1:], SURE[-1:]) == {"a": 1}
    assert not fit.is_suspect("a")


def test_a_camera_that_looks_at_one_thing_fits_and_is_left_alone_longer_each_time(fit):
    pauses = []
    for _ in range(4):
        windows = 0
        while not fit.is_suspect("a"):
            watch(fit, ONE_THING)
            windows += 1
        pauses.append(windows)
        assert compare(fit, ONE_THING, ONE_THING) == {}
        assert not fit.is_suspect("a")
    assert pauses == [1, 2, 3, 5]


def test_audits_without_suspicion_tell_too(fit):
    assert compare(fit, VAGUE, SURE) == {"a": 1}
    assert compare(fit, SURE, VAGUE, "b") == {}


def test_cameras_are_watched_one_by_one_against_their_domains_usual(fit):
    answers = torch.stack([VAGUE, SURE], dim=1).flatten(0, 1)
    fit.observe(["a", "b"] * K, [1] * 2 * K, answers)
    assert (fit.is_suspect("a"), fit.is_suspect("b")) == (True, False)
    watch(fit, VAGUE, "c", domain=2)  # nothing is usual there
    assert not fit.is_suspect("c")


def test_what_was_usual_is_forgotten_with_the_correction(fit):
    watch(fit, VAGUE)
    fit.forget(1)
    assert not fit.is_suspect("a")
    watch(fit, VAGUE)
    assert not fit.is_suspect("a")


def test_a_camera_that_goes_elsewhere_starts_anew(fit):
    watch(fit, VAGUE)
    watch(fit, VAGUE[:1], domain=2)
    assert not fit.is_suspect("a")
