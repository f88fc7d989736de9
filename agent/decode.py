"""Turns records into frames: bounded, in parallel, in order.

`decode` is pure and raises only `InvalidFrame`; `Decoder` runs it in threads (the codecs release
the interpreter lock) and hands the outcomes back in the order of submission.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from agent.config import DecodeConfig
from agent.envelope import unwrap
from agent.errors import CorruptImage, InvalidFrame, OversizedFrame, UnsupportedImage
from agent.types import Frame, Partition, Record, Rejected

#: Pillow must never try another codec: each is attack surface for bytes from the network.
_FORMATS = ("JPEG", "PNG", "WEBP")

#: JPEG is decoded at a reduced scale that keeps this many times the pixels a side needs, so that
#: the resampling that follows still has something to average.
_DRAFT_GAP = 2

#: What shows through transparent pixels.
_BACKDROP = (255, 255, 255, 255)

_MAX_MESSAGE = 200


def decode(record: Record, limits: DecodeConfig, size: int, crop_ratio: float) -> Frame:
    """Read one record into a frame of `size` by `size` pixels.

    The short side is resampled (bicubic) to `size / crop_ratio` and the centre is kept, which is
    how the model's own preprocessing sees an image.

    Args:
        record: the record as the source delivered it.
        limits: bounds, checked before pixels are allocated.
        size: side of the frame in pixels.
        crop_ratio: share of the short side that the frame keeps, above 0 and at most 1.

    Raises:
        InvalidFrame: the record can never become a frame; the subclass says why.
    """
    envelope = unwrap(record, limits.max_bytes)
    pixels = _read(envelope.image, limits.max_pixels, size, crop_ratio)
    return Frame(record, envelope.camera, envelope.captured_at, pixels)


def _read(image: bytes, max_pixels: int, size: int, crop_ratio: float) -> NDArray[np.uint8]:
    _check_magic(image)
    # Pillow's WebP reader allocates the canvas as it opens the file, so its size is read first.
    _check_size(_webp_size(image), max_pixels)
    try:
        with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
            _check_size(opened.size, max_pixels)
            return _fit(opened, size, crop_ratio)
    except InvalidFrame:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise OversizedFrame(f"the image has too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise CorruptImage("the image's header cannot be read") from error
    except Exception as error:  # codecs raise nearly everything on bytes that were tampered with
        reason = f"{type(error).__name__}: {error}"[:_MAX_MESSAGE]
        raise CorruptImage(f"the image cannot be decoded: {reason}") from error


def _check_magic(image: bytes) -> None:
    webp = image[:4] == b"RIFF" and image[8:12] == b"WEBP"
    if not (webp or image.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))):
        raise UnsupportedImage("the bytes are not a JPEG, PNG or WebP image")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise CorruptImage(f"the image has no pixels: {width} by {height}")
    if width * height > max_pixels:
        raise OversizedFrame(
            f"the image has {width} by {height} pixels, the limit is {max_pixels} in all"
        )


def _webp_size(image: bytes) -> tuple[int, int]:
    """Width and height as a WebP header states them; (1, 1) for any other format."""
    if image[8:12] != b"WEBP":
        return 1, 1
    header = image[12:30].ljust(18, b"\0")
    match header[:4]:
        case b"VP8X":
            return _little(header[12:15]) + 1, _little(header[15:18]) + 1
        case b"VP8L":
            bits = _little(header[9:13])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return _little(header[14:16]) & 0x3FFF, _little(header[16:18]) & 0x3FFF
    raise CorruptImage("the WebP header names no known bitstream")


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _fit(image: Image.Image, size: int, crop_ratio: float) -> NDArray[np.uint8]:
    short = max(size, round(size / crop_ratio))
    scale = _DRAFT_GAP * short / min(image.size)
    image.draft(None, (int(image.width * scale) + 1, int(image.height * scale) + 1))
    upright = ImageOps.exif_transpose(image)
    # Resampling the crop alone gives the same pixels as cropping the resampled image, and keeps
    # an image one pixel wide and 40 million high from growing 256 times both ways on the way.
    side = min(upright.size) * size / short
    left, top = (upright.width - side) / 2, (upright.height - side) / 2
    box = (left, top, left + side, top + side)
    fitted = _resamplable(upright).resize((size, size), Image.Resampling.BICUBIC, box)
    return np.array(_rgb(fitted), dtype=np.uint8)


def _resamplable(image: Image.Image) -> Image.Image:
    """Leave the modes whose values are indices or wider than a byte, which do not average."""
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        backdrop = Image.new("RGBA", image.size, _BACKDROP)
        return Image.alpha_composite(backdrop, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


class Decoder:
    """A pool of threads that decodes records and keeps their order.

    One thread submits and takes. Outcomes leave only from the head of the queue, so a slow frame
    holds back those behind it and offsets stay contiguous.
    """

    def __init__(self, config: DecodeConfig, size: int, crop_ratio: float) -> None:
        self._limits = config
        self._size = size
        self._crop_ratio = crop_ratio
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="decode")
        self._queue: deque[tuple[Record, Future[Frame]]] = deque()

    @property
    def pending(self) -> int:
        """Records submitted and neither taken nor dropped."""
        return len(self._queue)

    def submit(self, records: Iterable[Record]) -> None:
        """Queue records behind those already submitted."""
        for record in records:
            future = self._pool.submit(decode, record, self._limits, self._size, self._crop_ratio)
            self._queue.append((record, future))

    def ready(self) -> int:
        """How many outcomes can be taken from the head without waiting."""
        return sum(1 for _ in takewhile(lambda entry: entry[1].done(), self._queue))

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for the record at the head; true if it can be taken."""
        if not self._queue:
            return False
        done, _ = wait_for([self._queue[0][1]], timeout_s)
        return bool(done)

    def take(self, limit: int) -> list[Frame | Rejected]:
        """Remove up to `limit` outcomes from the head, in order; none that is still decoding."""
        return [self._outcome(*self._queue.popleft()) for _ in range(min(limit, self.ready()))]

    def drop(self, partitions: frozenset[Partition]) -> None:
        """Forget the records of partitions that now belong to another member."""
        kept = deque[tuple[Record, Future[Frame]]]()
        for record, future in self._queue:
            if record.id.log in partitions:
                future.cancel()
            else:
                kept.append((record, future))
        self._queue = kept

    def close(self) -> None:
        """Forget what is queued and end the threads."""
        self._queue.clear()
        self._pool.shutdown(cancel_futures=True)

    @staticmethod
    def _outcome(record: Record, future: Future[Frame]) -> Frame | Rejected:
        try:
            return future.result()
        except InvalidFrame as error:
            return Rejected(record, error)
