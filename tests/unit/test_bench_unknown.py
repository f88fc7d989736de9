"""What `bench-unknown` measures, on frames whose answers are known."""

import numpy as np
import pytest
from PIL import Image

from agent.bench import unknown, unknown_picture
from agent.bench.pool import CLEAR, Condition, Pool
from agent.bench.unknown import Separation, Told

LABELS = tuple(f"label {n}" for n in range(1000))


def told(known=(True, True, True, False), flagged=(False, True, False, True)):
    margin = [1.0 if each else -1.0 for each in flagged]
    return Told(
        list(known), list(flagged), margin, [True, False, True, False], [0.9] * 4, [0.6] * 4
    )


@pytest.fixture
def pool(tmp_path):
    labels = tuple(LABELS[n % 8] for n in range(64))
    return Pool(labels, np.zeros((64, 4, 4, 3), np.uint8), tmp_path)


def test_near_splits_hold_out_half_of_what_is_shown():
    near = [s for s in unknown.splits(LABELS, LABELS[:100], has_animals=True) if s.kind == "near"]
    assert len(near) == unknown.HALVES
    for split in near:
        assert len(set(LABELS[:100]) - set(split.known)) == 50
        assert set(LABELS[100:]) <= set(split.known)
    assert len({split.known for split in near}) == unknown.HALVES


def test_far_splits_tell_animals_from_things():
    far = [s for s in unknown.splits(LABELS, LABELS, has_animals=True) if s.kind == "far"]
    assert [len(split.known) for split in far] == [398, 602]
    assert {s.kind for s in unknown.splits(LABELS, LABELS, has_animals=False)} == {"near"}


def test_a_score_that_separates_is_perfect_and_its_opposite_is_not():
    strange = np.array([False] * 50 + [True] * 50)
    perfect = Separation.of(strange, strange.astype(float))
    assert (perfect.auroc, perfect.aupr, perfect.fpr95) == (1.0, 1.0, 0.0)
    assert Separation.of(strange, -strange.astype(float)).auroc == 0.0


def test_fpr95_is_the_share_of_known_frames_above_the_strangest_95_percent():
    strange = np.array([True] * 20 + [False] * 20)
    scores = np.concatenate([np.arange(20) + 10.5, np.arange(20)])
    # 19 of 20 unknown frames lie above 11; of the known ones 12 to 19 do.
    assert Separation.of(strange, scores).fpr95 == pytest.approx(8 / 20)


def test_only_known_frames_can_be_false_alarms():
    assert told().false_alarms == pytest.approx(1 / 3)
    assert told().recall == 1.0
    assert np.isnan(told(known=(True,) * 4).recall)


def test_the_calibration_error_is_the_gap_between_saying_and_being_right():
    both = told()
    assert both.calibration_error(both.softmax) == pytest.approx(0.9 - 2 / 3)
    assert both.calibration_error(both.confidence) == pytest.approx(2 / 3 - 0.6)


def test_who_is_right_as_often_as_said_has_no_calibration_error():
    rng = np.random.default_rng(0)
    said = rng.random(200_000)
    assert unknown.calibration_error(said, rng.random(200_000) < said) < 0.005


def test_phases_are_put_together():
    whole = unknown.together({"a": told(), "b": told()})
    assert len(whole.known) == 8
    assert whole.false_alarms == pytest.approx(1 / 3)


def test_an_open_storm_shows_the_share_of_unknown_frames_that_was_asked_for(pool):
    conditions = [CLEAR, Condition("fog", 3)]
    suite = unknown.open_storm(pool, conditions, 2000, 0.25, np.random.default_rng(0))
    strange = [pool.labels[shot.photo] in suite.held_out for shot in suite.shots]
    assert np.mean(strange) == pytest.approx(0.25, abs=0.02)
    assert len(suite.held_out) == 4
    assert suite.conditions == conditions
    assert all(shot.photo in pool.stream for shot in suite.shots)


def test_pictures_are_drawn(tmp_path):
    one = Separation(0.9, 0.8, 0.3)
    means = {
        (k, s, c): one for k in ("near", "far") for s in ("a", "b") for c in ("clear", "fog 3")
    }
    unknown_picture.draw_scores(means, tmp_path / "scores.png")
    unknown_picture.draw_alarms({"fog": 0.2}, {"fog": 0.05}, 0.05, tmp_path / "alarms.png")
    unknown_picture.draw_reliability({"mixed": told()}, tmp_path / "confidence.png")
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_textures_are_cropped_as_the_model_wants_them(tmp_path):
    textures = unknown.textures(32, 0.875, tmp_path, seed=0)
    assert textures.pixels.shape == (11 * unknown.CROPS, 32, 32, 3)
    assert {"bricks", "page"} <= set(textures.labels)
    again = unknown.textures(32, 0.875, tmp_path, seed=0)
    assert np.array_equal(textures.pixels, again.pixels)
