import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from agent.adapt.restore import MAX_GAIN, Restoration, Spectrum, equalise, median3


def scenes(n=8, size=56, seed=0):
    """Smooth pictures with some fine texture, in the middle of the range."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    texture = 0.03 * torch.randn(n, 3, size, size, generator=generator)
    return (0.3 + 0.4 * smooth + texture).clamp(0, 1)


def repaired(x, normal):
    return equalise(x, Spectrum.of(x), Spectrum.of(normal))


def error(x, truth):
    return float((x - truth).square().mean())


def test_a_normal_spectrum_changes_nothing():
    x = scenes()
    assert torch.allclose(repaired(x, x), x, atol=1e-5)


def test_lost_contrast_comes_back():
    x = scenes()
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    assert error(repaired(mean + (x - mean) / 4, x), x) < 0.02 * error(mean + (x - mean) / 4, x)


def test_a_lost_level_comes_back():
    x = scenes()
    assert error(repaired(x - 0.2, x), x) < 0.02 * error(x - 0.2, x)


def test_noise_is_taken_away():
    x = scenes()
    noisy = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert error(repaired(noisy, x), x) < 0.5 * error(noisy, x)


def test_a_band_with_a_surplus_is_scaled_by_wieners_gain():
    normal, present = Spectrum.of(scenes()), Spectrum.of(scenes())
    present = Spectrum(4 * normal.energy_OA, normal.level_A, 8)
    x = scenes(1)
    level = x.mean(dim=(2, 3), keepdim=True)
    assert torch.allclose(equalise(x, present, normal), level + (x - level) / 4, atol=1e-4)


def test_amplification_is_bounded():
    normal = Spectrum.of(scenes())
    nothing = Spectrum(torch.zeros_like(normal.energy_OA), normal.level_A, 8)
    x = 0.5 + (scenes(1) - 0.5) / 100
    level = x.mean(dim=(2, 3), keepdim=True)
    expected = level + MAX_GAIN * (x - level)
    assert torch.allclose(equalise(x, nothing, normal), expected, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (50, 37), (336, 336)])
def test_any_size_keeps_its_shape_and_range(size):
    x = torch.rand(2, 3, *size)
    out = repaired(x, x**2)
    assert out.shape == x.shape
    assert 0 <= float(out.min()) <= float(out.max()) <= 1


def test_merged_spectra_are_those_of_all_images():
    x = scenes(12)
    merged = Spectrum.of(x[:3]).merged(Spectrum.of(x[3:]))
    assert merged.count == 12
    assert torch.allclose(merged.energy_OA, Spectrum.of(x).energy_OA, atol=1e-6)


def test_the_median_is_pillows():
    pixels = (scenes(1)[0] * 255).round().to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    oracle = np.asarray(image.filter(ImageFilter.MedianFilter(3)))
    ours = (median3(pixels[None] / 255)[0] * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(ours[1:-1, 1:-1], oracle[1:-1, 1:-1])


def test_each_restoration_is_one_combination():
    combinations = {(each.filters, each.equalises) for each in Restoration}
    assert len(combinations) == len(Restoration) == 4
    assert not (Restoration.NONE.filters or Restoration.NONE.equalises)
