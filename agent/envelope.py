"""Opens a record: which camera, when, and the bytes of the image.

Three forms are read. In each, what the form does not say comes from the record itself:

    plain         value = image, key = camera, record timestamp
    CloudEvents   value = image, headers `ce_source` = camera and `ce_time` (binary mode)
    JSON          {"camera": …, "timestamp": …, "image": base64}

JSON is recognised by `content-type: application/json` or by a value that begins with a brace,
which no image does. Whether the image is one is the decoder's question.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agent.errors import OversizedFrame, UnreadableEnvelope
from agent.types import Record

#: The camera of a record that names none.
UNKNOWN_CAMERA = "unknown"

#: A camera's name becomes a key, a metric label and a log field, so it must stay small.
MAX_CAMERA_BYTES = 256

#: Room in a JSON envelope for everything but the image.
_JSON_OVERHEAD_BYTES = 64 * 1024

#: The last second that a datetime can hold, 9999-12-31T23:59:59Z.
_LAST_SECOND = 253402300799


@dataclass(frozen=True, slots=True)
class Envelope:
    """An opened record. `captured_at` is in seconds since the epoch."""

    camera: str
    captured_at: float
    image: bytes


def unwrap(record: Record, max_bytes: int) -> Envelope:
    """Open a record whose image has at most `max_bytes`.

    Raises:
        UnreadableEnvelope: there is no value, or a field is malformed or of the wrong type.
        OversizedFrame: the image is over `max_bytes`.
    """
    if not record.value:
        raise UnreadableEnvelope("the record has no value")
    headers = _headers(record)
    if _is_json(headers, record.value):
        return _unwrap_json(record, headers, max_bytes)
    if len(record.value) > max_bytes:
        raise OversizedFrame(f"the image has {len(record.value)} bytes, the limit is {max_bytes}")
    return Envelope(_camera(record, headers), _captured_at(record, headers), record.value)


def _unwrap_json(record: Record, headers: Mapping[str, bytes], max_bytes: int) -> Envelope:
    value = record.value or b""
    # Four characters carry three bytes; checked first so that no huge document is parsed.
    limit = max_bytes * 4 // 3 + _JSON_OVERHEAD_BYTES
    if len(value) > limit:
        raise OversizedFrame(f"the envelope has {len(value)} bytes, the limit is {limit}")
    fields = _parse(value)
    camera = _camera(record, headers)
    if "camera" in fields:
        camera = _bounded(fields["camera"], "camera") or camera
    captured_at = _captured_at(record, headers)
    if "timestamp" in fields:
        captured_at = _timestamp(fields["timestamp"], "timestamp")
    return Envelope(camera, captured_at, _image(fields.get("image"), max_bytes))


def _parse(value: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UnreadableEnvelope(f"the JSON cannot be parsed: {type(error).__name__}") from error
    if not isinstance(fields, dict):
        raise UnreadableEnvelope("the JSON is not an object")
    return fields


def _image(text: object, max_bytes: int) -> bytes:
    if not isinstance(text, str) or not text:
        raise UnreadableEnvelope('"image" must be a base64 string')
    size = len(text) * 3 // 4 - text[-2:].count("=")
    if size > max_bytes:
        raise OversizedFrame(f"the image has {size} bytes, the limit is {max_bytes}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnreadableEnvelope('"image" is not valid base64') from error


def _headers(record: Record) -> dict[str, bytes]:
    """Headers by lower-case name; of a name given twice the last counts, as for Kafka."""
    return {name.lower(): value for name, value in record.headers if value}


def _is_json(headers: Mapping[str, bytes], value: bytes) -> bool:
    media_type = headers.get("content-type", b"").partition(b";")[0].strip().lower()
    return media_type == b"application/json" or value.startswith(b"{")


def _camera(record: Record, headers: Mapping[str, bytes]) -> str:
    if "ce_source" in headers:
        return _bounded(_text(headers["ce_source"], "ce_source"), "ce_source") or UNKNOWN_CAMERA
    return _bounded(_text(record.key or b"", "the key"), "the key") or UNKNOWN_CAMERA


def _captured_at(record: Record, headers: Mapping[str, bytes]) -> float:
    if "ce_time" in headers:
        return _timestamp(_text(headers["ce_time"], "ce_time"), "ce_time")
    # Brokers keep what a client wrote, be it −1 for none or microseconds by mistake. The picture is
    # good all the same, so its time is only brought into what a datetime can hold.
    return min(max(record.timestamp, 0.0), float(_LAST_SECOND))


def _text(value: bytes, field: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableEnvelope(f"{field} is not UTF-8") from error


def _bounded(camera: object, field: str) -> str:
    if not isinstance(camera, str):
        raise UnreadableEnvelope(f"{field} must be a string")
    try:
        size = len(camera.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise UnreadableEnvelope(f"{field} is not Unicode text") from error
    if size > MAX_CAMERA_BYTES:
        raise UnreadableEnvelope(f"{field} has {size} bytes, the limit is {MAX_CAMERA_BYTES}")
    return camera


def _timestamp(value: object, field: str) -> float:
    """Seconds since the epoch, from a number of them or from an RFC 3339 string."""
    seconds = math.nan
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is not None:
                seconds = moment.timestamp()
        elif isinstance(value, int | float) and not isinstance(value, bool):
            seconds = float(value)
    except (ValueError, OverflowError):
        pass  # falls through to the refusal below, as a time without its zone does
    if not 0 <= seconds <= _LAST_SECOND:
        raise UnreadableEnvelope(f"{field} must be an RFC 3339 time with its zone, or seconds")
    return seconds
