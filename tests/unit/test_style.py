import pytest
import torch

from agent.adapt.style import MEASURES, StyleReference, style
from agent.testing import pictures


def generator(seed=0):
    """Each test has its own, so that what it draws does not depend on which ran before."""
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_style_of_a_blank_image_is_finite(value):
    assert torch.isfinite(style(torch.full((2, 3, 224, 224), value))).all()


@pytest.mark.parametrize("side", [32, 50, 63, 64, 224])
def test_the_style_of_noise_is_finite_at_any_size(side):
    measured = style(torch.rand(3, 3, side, side, generator=generator()))
    assert torch.isfinite(measured).all()
    assert (measured.shape, measured.dtype) == ((3, MEASURES), torch.float32)


def test_the_style_of_an_image_does_not_depend_on_its_batch():
    batch = pictures(4, 1)
    assert torch.allclose(style(batch)[2], style(batch[2:3])[0], atol=1e-5)


def test_the_style_begins_with_the_levels_of_the_opponent_channels():
    orange = torch.tensor([0.9, 0.6, 0.3]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert style(orange)[0, :3].tolist() == pytest.approx([0.6, 0.3, 0.45], abs=1e-6)


def changed(change, image):
    """How each measure of the style of `image` changes."""
    return (style(change(image)) - style(image))[0]


NOISE = torch.rand(1, 3, 64, 64, generator=generator(7)) * 0.2 + 0.4


def test_detail_is_measured_by_octave():
    smooth = torch.nn.functional.avg_pool2d(NOISE, 5, stride=1, padding=2, count_include_pad=False)
    before, after = style(NOISE)[0, 6:10], style(smooth)[0, 6:10]
    lost = (before - after).tolist()
    assert lost[0] > lost[1] > lost[2] > 0


def test_single_bad_pixels_make_detail_peaked():
    bad = (torch.rand(1, 1, 64, 64, generator=generator()) < 0.02).float()
    peaked = changed(lambda image: image * (1 - bad) + bad, NOISE * 0 + 0.5)
    even = changed(lambda image: image + NOISE - 0.5, NOISE * 0 + 0.5)
    assert peaked[10] < even[10] - 0.5


def test_sharpness_in_the_middle_is_told_from_sharpness_at_the_edge():
    middle = torch.zeros(1, 1, 64, 64)
    middle[..., 16:48, 16:48] = 1
    grey = NOISE * 0 + 0.5
    assert style(torch.where(middle > 0, NOISE, grey))[0, 12] > style(NOISE)[0, 12] + 0.5
    assert style(torch.where(middle > 0, grey, NOISE))[0, 12] < style(NOISE)[0, 12] - 0.5


@pytest.mark.parametrize(("axis", "sign"), [(3, -1), (2, 1)])
def test_the_direction_of_a_blur_shows(axis, sign):
    blur = changed(lambda image: (image + image.roll(1, axis) + image.roll(2, axis)) / 3, NOISE)
    assert sign * blur[13] > 0.15
    assert sign * blur[15] > 0.15


def test_the_grid_of_jpeg_shows():
    coarse = torch.rand(1, 3, 8, 8, generator=generator()).repeat_interleave(8, 2)
    blocks = coarse.repeat_interleave(8, 3)
    assert style(blocks)[0, 16] > 3
    assert style(blocks)[0, 17] > 0.8  # and all else is flat
    assert style(NOISE)[0, 16].abs() < 0.3


@pytest.mark.parametrize(("value", "measure"), [(0.0, 18), (1.0, 19)])
def test_saturated_pixels_show(value, measure):
    clipped = torch.rand(1, 3, 64, 64, generator=generator()) < 0.2
    raised = changed(lambda image: torch.where(clipped, value, image), NOISE)
    assert raised[measure] > 4
    assert raised[37 - measure] == 0


def test_whitened_normal_styles_have_mean_zero_and_variance_one():
    draw = generator()
    mixing = torch.randn(5, 5, generator=draw)
    styles = torch.randn(400, 5, generator=draw) @ mixing + 3
    reference = StyleReference.of(styles)
    white = reference.whitened(styles)
    assert torch.allclose(white.mean(dim=0), torch.zeros(5), atol=1e-4)
    assert torch.allclose(white.std(dim=0), torch.ones(5), atol=1e-3)
    raw = torch.corrcoef(styles.T).fill_diagonal_(0).abs().max()
    assert torch.corrcoef(white.T).fill_diagonal_(0).abs().max() < 0.3 * raw
    assert reference.frames == 400


def test_a_measure_that_never_varies_does_not_break_the_reference():
    styles = torch.randn(20, 3, generator=generator())
    styles[:, 1] = 2.0
    reference = StyleReference.of(styles)
    assert torch.isfinite(reference.whitened(styles + 1)).all()


@pytest.mark.parametrize("frames", [22, 32, 64])
def test_few_normal_frames_do_not_make_others_look_strange(frames):
    draw = generator()
    styles = torch.randn(frames, MEASURES, generator=draw)
    unseen = torch.randn(400, MEASURES, generator=draw)
    assert StyleReference.of(styles).whitened(unseen).square().mean().sqrt() < 1.4
