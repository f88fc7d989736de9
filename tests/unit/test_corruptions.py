import numpy as np
import pytest

from agent.bench.corruptions import CORRUPTIONS, corrupt, plasma
from agent.errors import AgentError


def scene(height=48, width=64):
    """A smooth gradient with one sharp edge."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack((rows * 4, columns * 3, rows + columns), axis=2)
    image[:, width // 2 :] //= 2
    return image.astype(np.uint8)


def flat(grey):
    return np.full((48, 64, 3), grey, dtype=np.uint8)


def distance(image, corrupted):
    return np.abs(image.astype(float) - corrupted).mean()


def corrupted(image, name, severity=3, seed=0):
    return corrupt(image, name, severity, np.random.default_rng(seed))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_same_seed_same_picture_of_the_same_form(name):
    image = scene()
    first = corrupted(image, name)
    assert first.shape == image.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first, corrupted(image, name))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_given_image_is_left_alone_and_the_result_differs(name):
    image = scene()
    result = corrupted(image, name)
    assert np.array_equal(image, scene())
    assert not np.array_equal(result, image)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"elastic_transform"}))
def test_the_highest_severity_is_further_away_than_the_lowest(name):
    image = scene()
    near, far = (corrupted(image, name, severity) for severity in (1, 5))
    assert distance(image, far) > distance(image, near)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise"])
def test_another_seed_gives_another_noise(name):
    assert not np.array_equal(corrupted(scene(), name, seed=1), corrupted(scene(), name, seed=2))


@pytest.mark.parametrize(
    "name",
    ["contrast", "defocus_blur", "motion_blur", "elastic_transform", "pixelate"],
)
def test_where_nothing_varies_there_is_nothing_to_blur(name):
    assert np.array_equal(corrupted(flat(100), name), flat(100))


def test_gaussian_noise_has_the_published_spread():
    noise = corrupted(flat(128), "gaussian_noise", 1).astype(float) - 128
    assert noise.std() == pytest.approx(0.08 * 255, rel=0.03)
    assert noise.mean() == pytest.approx(0, abs=1)


def test_shot_noise_varies_as_light_over_photons():
    noisy = corrupted(flat(51), "shot_noise", 1).astype(float) / 255
    assert noisy.var() == pytest.approx(0.2 / 60, rel=0.08)


def test_impulse_noise_is_half_salt_and_half_pepper():
    noisy = corrupted(flat(100), "impulse_noise", 5)
    assert np.mean(noisy == 255) == pytest.approx(0.27 / 2, abs=0.015)
    assert np.mean(noisy == 0) == pytest.approx(0.27 / 2, abs=0.015)
    assert set(np.unique(noisy)) == {0, 100, 255}


def test_contrast_keeps_the_mean_and_a_tenth_of_the_distance_to_it():
    image = flat(50)
    image[:24] = 150
    result = corrupted(image, "contrast", 4)
    assert set(np.unique(result)) == {95, 105}


def test_brightness_adds_to_the_value_and_keeps_the_hue():
    image = np.full((4, 4, 3), (100, 50, 0), dtype=np.uint8)
    # The value 100 gains 0.3 * 255 = 76.5; the other channels keep their ratio to it.
    assert corrupted(image, "brightness", 3)[0, 0].tolist() == [177, 88, 0]


def test_pixelate_makes_blocks_of_one_colour():
    blocks = corrupted(scene(), "pixelate", 5)[::4, ::4]
    enlarged = blocks.repeat(4, axis=0).repeat(4, axis=1)
    assert np.array_equal(corrupted(scene(), "pixelate", 5), enlarged)


def test_defocus_spreads_a_point_over_the_disk():
    image = flat(0)
    image[24, 32] = 255
    blurred = corrupted(image, "defocus_blur", 1)[..., 0]
    # 29 whole pixels lie within a radius of 3.
    assert np.count_nonzero(blurred) == 29
    assert blurred[24, 29] == blurred[21, 32] == round(255 / 29)


def test_motion_leaves_a_trail_on_one_side():
    image = flat(0)
    image[24, 32] = 255
    columns = np.nonzero(corrupted(image, "motion_blur", 1).max(axis=(0, 2)))[0]
    assert columns.max() == 32
    assert columns.min() < 28


def test_fog_never_outshines_the_brightest_pixel():
    image = scene()
    distances = [distance(image, corrupted(image, "fog", severity)) for severity in range(1, 6)]
    assert corrupted(image, "fog", 5).max() <= image.max()
    assert distances == sorted(distances)


def test_fog_has_no_light_of_its_own():
    assert corrupted(flat(0), "fog", 5).max() == 0


def test_night_is_darker_and_bluer_the_severer():
    levels = [corrupted(flat(200), "night", s).mean(axis=(0, 1)) for s in range(1, 6)]
    means = [level.mean() for level in levels]
    assert means == sorted(means, reverse=True)
    assert all(red < green < blue for red, green, blue in levels)
    assert means[0] < 200


def test_plasma_spans_its_range():
    clouds = plasma(64, 2, np.random.default_rng(0))
    assert clouds.shape == (64, 64)
    assert (clouds.min(), clouds.max()) == (0, 1)


@pytest.mark.parametrize(("name", "severity"), [("hail", 1), ("fog", 0), ("fog", 6)])
def test_unknown_weather_is_refused(name, severity):
    with pytest.raises(AgentError, match=r"hail|severity"):
        corrupted(scene(), name, severity)
