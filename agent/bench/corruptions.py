"""Image corruptions, each at five severities.

Definitions and constants are those of ImageNet-C: D. Hendrycks and T. Dietterich, "Benchmarking
Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019. Two things differ:
results are rounded to 8 bits where the original truncates, midway too in glass blur and snow, and
images of any size are taken, though the constants in pixels were chosen for 224. `night` is not
part of ImageNet-C; it is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.filters import gaussian
from skimage.transform import warp

from agent.errors import AgentError

Pixels = NDArray[np.uint8]
#: An RGB image of shape (H, W, 3) with values from 0 to 1.
Light = NDArray[np.float32]
Corruption = Callable[[Light, int, np.random.Generator], Light]

SEVERITIES = range(1, 6)

#: The package whose wheel holds the photographs of frost. It is never imported: it needs names that
#: its own dependencies no longer have.
FROST_PACKAGE = "imagecorruptions"
#: The wheel has a sixth, which the original never draws.
FROST_PHOTOS = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


def corrupt(image: Pixels, name: str, severity: int, rng: np.random.Generator) -> Pixels:
    """A corrupted copy of `image`, which has shape (H, W, 3), RGB.

    Raises:
        AgentError: no corruption has that name, or `severity` is not 1 to 5.
    """
    if name not in CORRUPTIONS:
        raise AgentError(f"no corruption {name!r}; there are: {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise AgentError(f"severity must be 1 to 5, not {severity}")
    return _to_pixels(CORRUPTIONS[name](_to_light(image), severity, rng))


def gaussian_noise(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """Electronic noise of low light: the same spread everywhere."""
    sigma = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return x + np.float32(sigma) * rng.standard_normal(x.shape, dtype=np.float32)


def shot_noise(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """The noise of counting few photons."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def impulse_noise(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """Salt and pepper in equal parts, drawn for each colour channel apart."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    draw = rng.random(x.shape, dtype=np.float32)
    return np.where(draw < share, np.float32(draw < share / 2), x)


def defocus_blur(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """A lens out of focus: convolution with a disk whose edge is softened."""
    del rng
    radius, softening = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    return _convolve(x, _disk(radius, softening))


def glass_blur(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """Frosted glass: blurred, the pixels scattered over their neighbourhood, blurred again."""
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[
        severity - 1
    ]
    height, width, _ = x.shape
    pixels = gaussian(x, sigma, channel_axis=-1).reshape(-1, 3)
    for _ in range(rounds):
        pixels = pixels[scattered(height, width, reach, rng)]
    blurred: Light = gaussian(pixels.reshape(x.shape), sigma, channel_axis=-1)
    return blurred


def motion_blur(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """A shaken camera: light trails off at up to 45 degrees from the horizontal."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return _trailed(x, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """A camera rushing ahead: the mean of the image and of ever larger views of its centre."""
    del rng
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity - 1]
    # At severity 1 an error of rounding includes the end, as it does in the original.
    factors = np.arange(1, end, step)
    planes = np.ascontiguousarray(x.transpose(2, 0, 1))
    # Twice, for the original counts the image itself as well as its view at a factor of 1.
    total = 2 * planes
    for factor in factors[1:]:
        total += _zoomed(planes, float(factor))
    mean: Light = total / np.float32(len(factors) + 1)
    return mean.transpose(1, 2, 0)


def snow(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """A whitened scene, streaks of falling flakes, and the same streaks turned half around."""
    mean, spread, size, threshold, radius, sigma, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    noise = np.float32(mean) + np.float32(spread) * rng.standard_normal(x.shape[:2], np.float32)
    flakes = _zoomed(noise, size)
    flakes = np.where(flakes < threshold, 0, np.minimum(flakes, 1))[..., None]
    flakes = _trailed(flakes, radius, sigma, rng.uniform(-135, -45))
    grey = x @ np.array((0.299, 0.587, 0.114), dtype=np.float32)
    white = np.maximum(x, 1.5 * grey[..., None] + 0.5)
    snowy: Light = kept * x + (1 - kept) * white + flakes + flakes[::-1, ::-1]
    return snowy


def frost(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """Ice on the lens: a part of a photograph of frost is added to the dimmed scene.

    Raises:
        AgentError: the package with the photographs is not installed.
    """
    scene, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    photo = _frost_photo(FROST_PHOTOS[rng.integers(len(FROST_PHOTOS))])
    height, width, _ = x.shape
    # The photographs hold more than 224 pixels a side; larger images get them enlarged.
    scale = max(1, height / photo.height, width / photo.width)
    view_width, view_height = width / scale, height / scale
    top = int(rng.uniform(0, photo.height - view_height))
    left = int(rng.uniform(0, photo.width - view_width))
    view = photo.resize(
        (width, height),
        Image.Resampling.BICUBIC,
        # Rounding could put the far edges a hair outside.
        box=(
            left,
            top,
            min(left + view_width, photo.width),
            min(top + view_height, photo.height),
        ),
    )
    return scene * x + ice * _to_light(np.asarray(view))


def fog(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """Light added in clouds; the exposure is then lowered to what it was."""
    thickness, roughness = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    height, width, _ = x.shape
    side = 2 ** math.ceil(math.log2(max(height, width, 2)))
    clouds = plasma(side, roughness, rng)[:height, :width, None]
    brightest = float(x.max())
    return (x + thickness * clouds) * (brightest / (brightest + thickness))


def brightness(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """Overexposure: the value of HSV is raised, hue and saturation stay."""
    del rng
    lift = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + np.float32(lift), 1)
    # Scaling all channels alike is what keeps hue and saturation; black has neither.
    scaled: Light = x * (raised / np.maximum(value, np.float32(1e-6)))
    return np.where(value > 0, scaled, raised)


def contrast(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """Every channel drawn towards its mean."""
    del rng
    kept = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean: Light = x.mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
    return (x - mean) * np.float32(kept) + mean


def elastic_transform(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """An affine jolt, then every pixel pushed along a smooth random field."""
    strength, smoothness, jolt = (
        244 * share
        for share in (
            (2, 0.7, 0.1),
            (2, 0.08, 0.2),
            (0.05, 0.01, 0.02),
            (0.07, 0.01, 0.02),
            (0.12, 0.01, 0.02),
        )[severity - 1]
    )
    height, width, _ = x.shape
    reach = min(height, width) // 3
    corners = np.array((width // 2, height // 2)) + reach * np.array(((1, 1), (1, -1), (-1, -1)))
    moved = corners + rng.uniform(-jolt, jolt, corners.shape)
    back = np.eye(3)
    back[:2] = np.linalg.solve(np.column_stack((moved, np.ones(3))), corners).T
    jolted = warp(x, back, order=1, mode="reflect")
    rows, columns = np.mgrid[:height, :width]
    noise = rng.uniform(-1, 1, (2, height, width))
    down, right = (
        strength * gaussian(field, smoothness, mode="reflect", truncate=3) for field in noise
    )
    sources = np.stack((rows + down, columns + right))
    channels = [warp(jolted[..., c], sources, order=1, mode="symmetric") for c in range(3)]
    return np.stack(channels, axis=2).astype(np.float32)


def pixelate(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """Enlarged from fewer pixels."""
    del rng
    kept = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    height, width, _ = x.shape
    small = (max(1, int(width * kept)), max(1, int(height * kept)))
    image = Image.fromarray(_to_pixels(x)).resize(small, Image.Resampling.BOX)
    return _to_light(np.asarray(image.resize((width, height), Image.Resampling.BOX)))


def jpeg_compression(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """JPEG of low quality."""
    del rng
    quality = (25, 18, 15, 10, 7)[severity - 1]
    file = BytesIO()
    Image.fromarray(_to_pixels(x)).save(file, "JPEG", quality=quality)
    return _to_light(np.asarray(Image.open(file)))


def night(x: Light, severity: int, rng: np.random.Generator) -> Light:
    """A camera at night (our own): less light, bluer, few photons, half regained by the gain.

    Light is linear here: pixels are raised to 2.2 and back. `exposure` is the share of daylight
    left, and a white pixel in daylight would free 1500 electrons. The gain, 1/sqrt(exposure),
    amplifies the noise with the scene.
    """
    exposure = (0.3, 0.2, 0.12, 0.07, 0.04)[severity - 1]
    moonlight = np.array((0.6, 0.8, 1.0), dtype=np.float32)
    electrons = 1500 * exposure * moonlight * x**2.2
    # Shot noise as a Gaussian of the same variance, and two electrons of read noise.
    spread = np.sqrt(electrons + 4)
    counted = electrons + spread * rng.standard_normal(x.shape, dtype=np.float32)
    amplified: Light = np.maximum(counted, 0) / np.float32(1500 * math.sqrt(exposure))
    return amplified ** np.float32(1 / 2.2)


def plasma(side: int, roughness: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """A cloud map by the diamond-square algorithm on a torus.

    Args:
        side: height and width, a power of two.
        roughness: lower is rougher; the randomness falls by its square at each finer step.
        rng: where the randomness comes from.

    Returns:
        An array of shape (side, side) that spans 0 to 1.
    """
    grid = np.zeros((side, side), dtype=np.float32)
    amplitude = 1.0
    step = side
    while step >= 2:
        half = step // 2
        corners = grid[::step, ::step]
        rows = corners + np.roll(corners, -1, axis=0)
        columns = corners + np.roll(corners, -1, axis=1)
        centres = _jittered(rows + np.roll(rows, -1, axis=1), amplitude, rng)
        grid[half::step, half::step] = centres
        above = columns + centres + np.roll(centres, 1, axis=0)
        beside = rows + centres + np.roll(centres, 1, axis=1)
        grid[::step, half::step] = _jittered(above, amplitude, rng)
        grid[half::step, ::step] = _jittered(beside, amplitude, rng)
        step = half
        amplitude /= roughness**2
    grid -= grid.min()
    spanning: NDArray[np.float32] = grid / grid.max()
    return spanning


def scattered(height: int, width: int, reach: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Which pixel each pixel takes its colour from, both counted along the rows.

    The original walks backwards over all but the border and means to swap each pixel with one up to
    `reach` away, one less downwards and to the right. Its assignment overwrites the first before
    reading it, and so copies: colours are repeated and lost. That is kept, for published results
    rest on it. So is the order of the walk: a pixel that takes from one already passed gets what
    that one got. Such chains are followed for all pixels at once, each turn doubling the length
    followed, so for the same draws the result is exactly that of the loop.
    """
    own = np.arange(height * width)
    source = own.reshape(height, width).copy()
    inner = source[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1]
    down, right = rng.integers(-reach, reach, (2, *inner.shape))
    inner += down * width + right
    flat = source.ravel()
    # Only from a pixel of a higher index, which the walk has passed, does the chain go on.
    chain = np.maximum(flat, own)
    while not np.array_equal(end := chain[chain], chain):
        chain = end
    return flat[chain]


def _trailed(x: Light, radius: int, sigma: float, degrees: float) -> Light:
    """Motion blur as ImageMagick does it: half a Gaussian trailing off in one direction."""
    angle = math.radians(degrees)
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    right = np.ceil(steps * math.cos(angle) - 0.5).astype(int)
    down = np.ceil(steps * math.sin(angle) - 0.5).astype(int)
    height, width, _ = x.shape
    reach = 2 * radius + 1
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    blurred = np.zeros_like(x)
    for weight, i, j in zip(weights.astype(np.float32), down, right, strict=True):
        blurred += weight * padded[reach + i :, reach + j :][:height, :width]
    return blurred


def _zoomed(planes: Light, factor: float) -> Light:
    """The centre of an image of shape (..., H, W), linearly interpolated to fill all of it."""
    for axis in (-2, -1):
        length = planes.shape[axis]
        kept = math.ceil(length / factor)
        enlarged = round(kept * factor)
        # The outermost pixels stay outermost, and what is then too much is trimmed on both sides.
        inside = (np.arange(length) + (enlarged - length) // 2) * (kept - 1) / (enlarged - 1)
        places = inside + (length - kept) // 2
        low = np.minimum(places.astype(int), length - 2)
        share = (places - low).astype(np.float32)
        if axis == -2:
            share = share[:, None]
        planes = planes.take(low, axis) * (1 - share) + planes.take(low + 1, axis) * share
    return planes


@cache
def _frost_photo(name: str) -> Image.Image:
    package = find_spec(FROST_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise AgentError(
            f"the photographs of frost need {FROST_PACKAGE}: "
            "pip install 'streaming-tta-agent[bench]'"
        )
    path = Path(package.submodule_search_locations[0]) / "frost" / name
    with Image.open(path) as photo:
        return photo.convert("RGB")


def _jittered(
    sums: NDArray[np.float32], amplitude: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """The mean of four neighbours, plus or minus up to `amplitude`."""
    jitter = 2 * rng.random(sums.shape, dtype=np.float32) - 1
    return sums / 4 + np.float32(amplitude) * jitter


def _disk(radius: int, softening: float) -> NDArray[np.float64]:
    """A disk of unit sum, blurred with a small Gaussian of standard deviation `softening`.

    As in the original, a disk that fills its square is mirrored there and so gains about 1 %.
    """
    reach, taps = (8, 3) if radius <= 8 else (radius, 5)
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(float)
    disk /= disk.sum()
    near = np.arange(taps) - taps // 2
    bell = np.exp(-(near**2) / (2 * softening**2))
    bell /= bell.sum()
    for _ in range(2):
        padded = np.pad(disk, ((taps // 2, taps // 2), (0, 0)), mode="reflect")
        # Along the rows, then, transposed, along the columns.
        disk = sum(bell[i] * padded[i : i + len(disk)] for i in range(taps)).T
    return disk


def _convolve(x: Light, kernel: NDArray[np.float64]) -> Light:
    """Convolution with a symmetric kernel, the image mirrored at its border."""
    reach = len(kernel) // 2
    height, width, _ = x.shape
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    shape = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, s=shape)[..., None]
    blurred = np.fft.irfft2(spectrum, s=shape, axes=(0, 1))
    return blurred[2 * reach :, 2 * reach :][:height, :width].astype(np.float32)


def _to_light(image: Pixels) -> Light:
    return image.astype(np.float32) / np.float32(255)


def _to_pixels(x: Light) -> Pixels:
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


CORRUPTIONS: dict[str, Corruption] = {
    corruption.__name__: corruption
    for corruption in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
        night,
    )
}
#: The corruptions of ImageNet-C, in its order.
IMAGENET_C = tuple(name for name in CORRUPTIONS if name != "night")
