import sys

import numpy as np
import pytest

from agent.bench import corruptions
from agent.bench.corruptions import CORRUPTIONS, IMAGENET_C, corrupt, plasma, scattered
from agent.errors import AgentError

DETERMINED = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
RANDOM = sorted(set(CORRUPTIONS) - DETERMINED)


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


def test_the_customary_order_is_kept():
    noise = ["gaussian_noise", "shot_noise", "impulse_noise"]
    blur = ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur"]
    weather = ["snow", "frost", "fog", "brightness"]
    digital = ["contrast", "elastic_transform", "pixelate", "jpeg_compression"]
    assert list(IMAGENET_C) == noise + blur + weather + digital
    assert list(CORRUPTIONS) == [*IMAGENET_C, "night"]


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


@pytest.mark.parametrize("name", RANDOM)
def test_another_seed_gives_another_picture(name):
    assert not np.array_equal(corrupted(scene(), name, seed=1), corrupted(scene(), name, seed=2))


@pytest.mark.parametrize(
    "name",
    [
        "contrast",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "elastic_transform",
        "pixelate",
    ],
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


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_pixels_are_scattered_as_by_a_walk_that_copies_one_at_a_time(reach):
    height, width = 23, 31
    down, right = np.random.default_rng(0).integers(
        -reach, reach, (2, height - 2 * reach, width - 2 * reach)
    )
    walked = np.arange(height * width).reshape(height, width)
    for i in range(height - reach, reach, -1):
        for j in range(width - reach, reach, -1):
            at = i - reach - 1, j - reach - 1
            walked[i, j] = walked[i + down[at], j + right[at]]
    at_once = scattered(height, width, reach, np.random.default_rng(0))
    assert np.array_equal(at_once, walked.ravel())


def test_nothing_is_scattered_where_there_is_no_room():
    assert scattered(6, 8, 4, np.random.default_rng(0)).tolist() == list(range(48))


def test_glass_frays_an_edge_and_leaves_alone_what_is_far_from_it():
    image = flat(50)
    image[:, 32:] = 200
    result = corrupted(image, "glass_blur", 3).astype(float)
    # A blur alone would leave all rows alike.
    assert result[8:40, 32].std() > 10
    assert (result[:, :16] == 50).all()
    assert (result[:, -16:] == 200).all()


@pytest.mark.parametrize(
    ("severity", "views", "last"),
    [(1, 12, 1.11), (2, 16, 1.15), (3, 11, 1.2), (4, 13, 1.24), (5, 11, 1.3)],
)
def test_zoom_averages_the_published_views(severity, views, last):
    # A ramp seen k times larger is k times less steep; the image itself counts as well.
    ramp = np.zeros((224, 224, 3), dtype=np.uint8)
    ramp[:] = np.arange(224)[:, None]
    steepness = (1 + (1 / np.linspace(1, last, views)).sum()) / (views + 1)
    expected = 111.5 + steepness * (np.arange(224) - 111.5)
    row = corrupted(ramp, "zoom_blur", severity)[100, :, 0]
    assert np.abs(row - expected).max() < 1.5


def test_zoom_keeps_the_centre_and_blurs_the_edge():
    image = np.zeros((224, 224, 3), dtype=np.uint8)
    image[::8] = image[:, ::8] = 255
    change = np.abs(corrupted(image, "zoom_blur", 1).astype(float) - image)
    assert change[108:116, 108:116].mean() < change[:8, :8].mean() / 2


def test_motion_leaves_a_trail_on_one_side():
    image = flat(0)
    image[24, 32] = 255
    columns = np.nonzero(corrupted(image, "motion_blur", 1).max(axis=(0, 2)))[0]
    assert columns.max() == 32
    assert columns.min() < 28


@pytest.mark.parametrize(("severity", "kept"), [(1, 0.8), (2, 0.7)])
def test_snow_whitens_what_no_flake_hides(severity, kept):
    # Where a flake-less scene is whitened, black turns to 127.5 and 100 to 150 + 127.5.
    black, grey = (
        corrupted(np.full((224, 224, 3), level, dtype=np.uint8), "snow", severity).min()
        for level in (0, 100)
    )
    assert black == pytest.approx((1 - kept) * 127.5, abs=1)
    assert grey == pytest.approx(kept * 100 + (1 - kept) * 277.5, abs=1)


def test_flakes_streak_and_are_the_same_turned_half_around():
    result = corrupted(np.zeros((224, 224, 3), dtype=np.uint8), "snow", 4)
    assert np.array_equal(result, result[::-1, ::-1])
    flakes = result[..., 0].astype(float)
    assert np.abs(np.diff(flakes, axis=0)).mean() < np.abs(np.diff(flakes, axis=1)).mean()


def test_snow_makes_nothing_darker():
    image = scene()
    assert all((corrupted(image, "snow", severity) >= image).all() for severity in range(1, 6))


@pytest.mark.parametrize(
    ("severity", "kept", "ice"),
    [(1, 1, 0.4), (2, 0.8, 0.6), (3, 0.7, 0.7), (4, 0.65, 0.7), (5, 0.6, 0.75)],
)
def test_frost_adds_the_published_share_of_its_photograph(severity, kept, ice):
    bare = corrupted(flat(0), "frost", severity).astype(float)
    lightest = corrupted(flat(0), "frost", 5) / 0.75
    assert np.abs(bare - ice * lightest).max() < 1.5
    assert bare.std() > 5
    over_grey = corrupted(flat(50), "frost", severity)
    assert np.abs(over_grey - np.minimum(bare + kept * 50, 255)).max() <= 1


def test_frost_is_enlarged_for_an_image_larger_than_its_photographs():
    pictures = [corrupted(np.zeros((700, 1000, 3), np.uint8), "frost", 5, s) for s in range(8)]
    assert all(picture[-20:, -20:].any() for picture in pictures)


def test_the_package_of_the_frost_is_never_imported():
    corrupted(scene(), "frost")
    assert "imagecorruptions" not in sys.modules


def test_without_its_photographs_frost_says_what_to_install(monkeypatch):
    corruptions._frost_photo.cache_clear()
    monkeypatch.setattr(corruptions, "FROST_PACKAGE", "no_such_package")
    with pytest.raises(AgentError, match=r"no_such_package.*streaming-tta-agent\[bench\]"):
        corrupted(scene(), "frost")


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
