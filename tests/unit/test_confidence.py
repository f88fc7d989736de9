import math

import pytest
import torch

from agent.score.confidence import GRIDS, MAX_DOUBT, WINDOW, Confidence, ConfidenceModel, shuffled
from agent.testing import pictures


def answers(confidences, labels=5):
    """Probabilities (N, labels): the first label's as given, the rest share what is left."""
    first = torch.tensor(confidences)[:, None]
    return torch.cat([first, ((1 - first) / (labels - 1)).expand(-1, labels - 1)], dim=1)


def spoilt(n=4000, seed=0):
    """Answers that get wrong faster than unsure: of 0.8, 0.7, 0.6 are right 0.8, 0.5, 0.3.

    The first are the frames as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    sound = answers([0.8] * n)
    rest = [sound]
    for sure, right in ((0.7, 0.5), (0.6, 0.3)):
        given = answers([sure] * n)
        # Where it is wrong the sound answer gives 0.05 to what the spoilt one says.
        wrong = torch.rand(n, generator=generator) > (right - 0.05) / 0.75
        given[wrong] = given[wrong].roll(1, dims=1)
        rest.append(given)
    return sound, rest


def vagueness(sure):
    return torch.special.entr(answers([sure])).sum() / math.log(5)


@pytest.mark.parametrize(("sure", "right"), [(0.8, 0.8), (0.7, 0.5), (0.6, 0.3)])
def test_it_learns_from_spoilt_frames_how_often_such_answers_are_right(sure, right):
    model = ConfidenceModel.fit(*spoilt())
    found = model(torch.tensor([sure]), vagueness(sure)[None]).item()
    assert found == pytest.approx(right, abs=0.05)


@pytest.mark.parametrize("sure", [0.2, 0.5, 0.99])
def test_on_ordinary_frames_it_is_the_softmax(sure):
    model = ConfidenceModel.fit(*spoilt())
    assert model(torch.tensor([sure]), vagueness(0.8)[None]).item() == pytest.approx(sure)


def test_with_hardly_any_frames_it_stays_near_the_softmax():
    model = ConfidenceModel.fit(*spoilt(n=1))
    assert model(torch.tensor([0.7]), vagueness(0.7)[None]).item() == pytest.approx(0.7, abs=0.12)


def test_vaguer_answers_that_are_right_more_often_are_not_worth_more():
    sound = answers([0.9] * 500)
    model = ConfidenceModel.fit(sound, [sound, answers([0.6] * 500)])
    assert model.doubt == pytest.approx(0, abs=1e-5)


def test_answers_that_turn_to_nonsense_are_doubted_within_bounds():
    sound = answers([0.99] * 500)
    model = ConfidenceModel.fit(sound, [sound, answers([0.97] * 500).roll(1, dims=1)])
    assert 10 < model.doubt <= MAX_DOUBT


def test_without_a_calibration_it_is_the_softmax():
    found = ConfidenceModel()(torch.tensor([0.2, 0.9]), torch.tensor([0.1, 0.8]))
    assert found.tolist() == pytest.approx([0.2, 0.9])


def test_certain_answers_are_never_more_than_a_probability():
    found = ConfidenceModel(2.0, 0.1)(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    assert all(0 <= p <= 1 for p in found.tolist())


def test_a_vague_domain_makes_the_same_answer_worth_less():
    confidence = Confidence(ConfidenceModel(4.0))
    confidence.observe([1] * 8, answers([0.3] * 8), [True] * 8)
    sharp, vague = confidence.observe([0, 1], answers([0.9, 0.9]), [True, True])
    assert vague < sharp - 0.1


def test_frames_that_were_not_admitted_say_nothing_of_their_domain():
    confidence = Confidence(ConfidenceModel(4.0))
    [before] = confidence.observe([1], answers([0.9]), [True])
    confidence.observe([1] * 50, answers([0.3] * 50), [False] * 50)
    [after] = confidence.observe([1], answers([0.9]), [True])
    assert after == before


def test_what_is_usual_is_the_mean_over_the_recent_known_frames():
    confidence = Confidence(ConfidenceModel())
    assert math.isnan(confidence.usual(3))
    confidence.observe([3] * 200, answers([0.4] * 200), [True] * 200)
    confidence.observe([3] * WINDOW, answers([0.8] * WINDOW), [True] * WINDOW)
    confidence.observe([3], answers([0.1]), [False])
    assert confidence.usual(3) == pytest.approx(0.8)
    confidence.forget(3)
    assert math.isnan(confidence.usual(3))


@pytest.mark.parametrize("grid", GRIDS)
def test_shuffling_keeps_every_patch(grid):
    images = pictures(3, seed=0)[..., :28, :28]
    moved = shuffled(images, grid, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    for image, other in zip(images, moved, strict=True):
        assert torch.allclose(image.flatten(1).sort().values, other.flatten(1).sort().values)
    assert torch.equal(moved, images) == (grid == 1)


def test_shuffling_bears_sizes_that_patches_do_not_divide():
    moved = shuffled(pictures(2, seed=0), 7, torch.Generator().manual_seed(0))
    assert moved.shape == (2, 3, 32, 32)
    assert torch.isfinite(moved).all()
