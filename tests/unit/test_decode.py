import io
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import agent.decode
from agent.config import DecodeConfig
from agent.decode import Decoder, decode
from agent.errors import CorruptImage, InvalidFrame, OversizedFrame, UnsupportedImage
from agent.types import Frame, FrameId, Partition, Record, Rejected

LIMITS = DecodeConfig(max_bytes=1_000_000, max_pixels=1_000_000)


def gradient(width=96, height=64):
    """Red rises to the right, green downwards, blue is constant."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=-1).astype(np.uint8))


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def record(value, offset=0, partition=0):
    return Record(FrameId("frames", partition, offset), b"cam", value, (), 5.0)


def pixels(value, size=32, crop_ratio=1.0, limits=LIMITS):
    return decode(record(value), limits, size, crop_ratio).pixels


def png_header(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 100) + b"IDAT"


def webp_header(chunk, payload):
    return b"RIFF" + struct.pack("<I", 100) + b"WEBP" + chunk + struct.pack("<I", 80) + payload


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_frame_has_the_models_size_and_keeps_its_record(form):
    frame = decode(record(encoded(gradient(), form)), LIMITS, 32, 0.875)
    assert (frame.pixels.shape, frame.pixels.dtype) == ((32, 32, 3), np.uint8)
    assert (frame.camera, frame.captured_at, frame.record.id.offset) == ("cam", 5.0, 0)


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (70, 70), (20, 50)])
def test_a_frame_is_the_centre_of_the_resampled_image(width, height):
    image = gradient(width, height)
    scale = 40 / min(width, height)
    whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
    expected = np.asarray(whole.crop((left, top, left + 32, top + 32)), dtype=int)
    assert np.abs(pixels(encoded(image), 32, 0.8) - expected).max() <= 5


def test_a_large_jpeg_decodes_at_reduced_scale_to_the_same_pixels():
    image = gradient(960, 640)
    lossless = pixels(encoded(image)).astype(int)
    assert np.abs(pixels(encoded(image, "JPEG", quality=95)) - lossless).mean() < 3


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = pixels(encoded(gradient(64, 64), "JPEG", exif=exif, quality=95)).astype(int)
    assert turned[0, 0, 0] > 230
    assert turned[-1, -1, 0] < 25


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
def test_every_png_mode_becomes_rgb(mode):
    if mode == "I;16":
        ramp = np.linspace(0, 65535, 64).astype(np.uint16)
        image = Image.fromarray(np.broadcast_to(ramp, (64, 64)).copy())
    else:
        image = gradient(64, 64).convert(mode)
    seen = pixels(encoded(image))
    assert seen.shape == (32, 32, 3)
    assert seen[:, -4:].mean() > seen[:, :4].mean() + 30


def test_cmyk_becomes_rgb():
    seen = pixels(encoded(gradient(64, 64).convert("CMYK"), "JPEG", quality=95))
    assert seen[16, -1, 0] > seen[16, 0, 0] + 100


def test_what_is_transparent_shows_white():
    image = Image.new("RGBA", (64, 64), (10, 20, 30, 0))
    assert (pixels(encoded(image)) == 255).all()


def test_of_an_animation_the_first_picture_counts():
    first, second = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    for form in ("PNG", "WEBP"):
        seen = pixels(encoded(first, form, save_all=True, append_images=[second], lossless=True))
        assert seen[5, 5, 0] > 250


@pytest.mark.parametrize(
    "value",
    [b"hello", b"GIF89a" + b"\0" * 50, encoded(gradient(), "BMP"), encoded(gradient(), "GIF")],
)
def test_other_formats_are_unsupported(value):
    with pytest.raises(UnsupportedImage):
        pixels(value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_corrupt(form):
    value = encoded(gradient(), form)
    with pytest.raises(CorruptImage):
        pixels(value[: len(value) * 2 // 3])


def test_an_image_without_pixels_is_corrupt():
    with pytest.raises(CorruptImage):
        pixels(png_header(0, 0))


def test_too_many_bytes_are_oversized():
    with pytest.raises(OversizedFrame):
        pixels(b"\0" * 1_000_001)


@pytest.mark.parametrize(
    "value",
    [
        png_header(2000, 2000),
        png_header(60_000, 60_000),  # what Pillow itself calls a bomb
        webp_header(b"VP8X", b"\0" * 4 + b"\xff\x3f\0" * 2),
        webp_header(b"VP8L", b"\x2f" + struct.pack("<I", 0x0FFFFFFF)),
        webp_header(b"VP8 ", b"\0" * 3 + b"\x9d\x01\x2a" + b"\xff\x3f" * 2),
    ],
)
def test_too_many_pixels_are_oversized_by_the_header_alone(value):
    with pytest.raises(OversizedFrame):
        pixels(value)


def test_the_limit_of_pixels_is_inclusive():
    value = encoded(gradient(100, 100), "WEBP")
    assert pixels(value, limits=DecodeConfig(max_pixels=10_000)).shape == (32, 32, 3)
    with pytest.raises(OversizedFrame):
        pixels(value, limits=DecodeConfig(max_pixels=9_999))


@pytest.mark.parametrize(("width", "height"), [(1, 50_000), (50_000, 1)])
def test_a_sliver_does_not_grow_on_the_way(width, height):
    assert pixels(encoded(Image.new("RGB", (width, height)))).shape == (32, 32, 3)


SEEDS = [encoded(gradient(), form) for form in ("JPEG", "PNG", "WEBP")]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    cut=st.none() | st.integers(0, 10_000),
)
def test_mutated_bytes_decode_or_are_invalid(seed, edits, cut):
    value = bytearray(seed)
    for place, byte in edits:
        value[place % len(value)] = byte
    try:
        frame = decode(record(bytes(value[:cut])), LIMITS, 32, 0.875)
    except InvalidFrame as error:
        assert len(str(error)) < 300
    else:
        assert frame.pixels.shape == (32, 32, 3)


@pytest.fixture
def decoder():
    decoder = Decoder(LIMITS, 32, 1.0)
    yield decoder
    decoder.close()


def take_all(decoder):
    outcomes = []
    while decoder.pending:
        decoder.wait(10)
        outcomes += decoder.take(100)
    return outcomes


def test_outcomes_keep_the_order_of_records(decoder):
    good = encoded(gradient())
    decoder.submit([record(b"bad" if n % 3 == 0 else good, n) for n in range(20)])
    outcomes = take_all(decoder)
    assert [outcome.record.id.offset for outcome in outcomes] == list(range(20))
    assert [type(o) for o in outcomes[:3]] == [Rejected, Frame, Frame]


def test_a_slow_head_holds_back_those_behind_it(decoder, monkeypatch):
    gate = threading.Event()

    def slow_first(record, *settings):
        if record.id.offset == 0:
            gate.wait(10)
        return decode(record, *settings)

    monkeypatch.setattr(agent.decode, "decode", slow_first)
    decoder.submit([record(encoded(gradient()), n) for n in range(2)])
    assert not decoder.wait(0.2)
    assert (decoder.ready(), decoder.take(5), decoder.pending) == (0, [], 2)
    gate.set()
    assert len(take_all(decoder)) == 2


def test_take_is_limited(decoder):
    decoder.submit([record(b"bad", n) for n in range(3)])
    assert decoder.wait(10)
    assert [o.record.id.offset for o in decoder.take(1)] == [0]
    assert decoder.pending == 2


def test_dropped_partitions_leave_the_others(decoder):
    decoder.submit([record(b"bad", n, partition=n % 2) for n in range(6)])
    decoder.drop(frozenset({Partition("frames", 0)}))
    assert [o.record.id.offset for o in take_all(decoder)] == [1, 3, 5]


def test_there_is_nothing_to_wait_for_in_an_empty_decoder(decoder):
    assert not decoder.wait(0)
    assert decoder.take(5) == []
