"""A kept frame as bytes: a thumbnail, a CloudEvent, and the name that both have.

Camera ids, subjects and file contents are other people's text: names are made from a safe
alphabet, and what is read back is checked field by field.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import AfterValidator, AwareDatetime, BaseModel, Field, PlainValidator

from agent.finds.find import Find
from agent.sinks.cloudevents import compact, rfc3339, to_event
from agent.types import Verdict

EVENT_TYPE = "tta.novelty.v1"

#: Pattern of kept frames' names; files with others are somebody else's.
NAME = r"[0-9]{8}T[0-9]{9}Z-[A-Za-z0-9_-]{1,32}-[0-9a-f]{16}"

_JPEG_QUALITY = 85
_MAX_CAMERA = 32
#: Bytes of an event that is read back; those that are written have some 3 KB.
_MAX_EVENT_BYTES = 1 << 20


def name_of(verdict: Verdict) -> str:
    """A file name without ending: sorted by time of capture, the same for repeats of a frame."""
    moment = re.sub("[-:.]", "", rfc3339(verdict.captured_at))
    camera = re.sub("[^A-Za-z0-9_-]", "-", verdict.camera[:_MAX_CAMERA]) or "camera"
    digest = hashlib.sha256(str(verdict.frame).encode(errors="replace")).hexdigest()
    return f"{moment}-{camera}-{digest[:16]}"


def thumbnail(find: Find) -> bytes:
    """What the model saw, as JPEG."""
    file = io.BytesIO()
    Image.fromarray(find.pixels).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def event(find: Find, jpeg: bytes | None = None) -> bytes:
    """A CloudEvent in UTF-8 JSON: the verdict, the margin, the embedding, perhaps the thumbnail.

    The embedding is little-endian float16 in base64.
    """
    verdict = to_event(find.verdict)
    data: dict[str, Any] = {
        **verdict["data"],
        "margin": round(find.margin, 6),
        "embedding": base64.b64encode(find.embedding_D.astype("<f2").tobytes()).decode(),
    }
    if jpeg is not None:
        data["thumbnail"] = base64.b64encode(jpeg).decode()
    fields = {**verdict, "type": EVENT_TYPE, "data": data}
    return compact(fields).encode(errors="replace")


def _embedding(text: object) -> NDArray[np.float32]:
    if not isinstance(text, str):
        raise ValueError("expected text in base64")  # noqa: TRY004 - what pydantic expects
    embedding_D = np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)
    if not np.isfinite(embedding_D).all():
        raise ValueError("the embedding is not finite")
    length = float(np.linalg.norm(embedding_D))
    return embedding_D / length if length else embedding_D


class Guess(BaseModel):
    """A label and its probability, as an event has them."""

    label: str
    probability: float | None


class Data(BaseModel):
    """What is read of an event's data; `embedding` is a unit feature (D,), or zero for none."""

    camera: str
    top: list[Guess]
    domain: int
    model: str
    margin: Annotated[float, Field(allow_inf_nan=False)]
    embedding: Annotated[NDArray[np.float32], PlainValidator(_embedding)]


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("a moment that UTC has no date for") from error


class Event(BaseModel):
    """What is read of an event."""

    id: str
    time: Annotated[AwareDatetime, AfterValidator(_in_utc)]
    data: Data


def is_ours(path: Path) -> bool:
    """Whether it is a plain file: pipes never end, and links lead to what nobody kept here."""
    return path.is_file() and not path.is_symlink()


def read_event(path: Path) -> Event:
    """The event that `event` made, from a file.

    Raises:
        ValueError: it did not make this.
        OSError: the file cannot be read.
    """
    if not is_ours(path):
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        content = file.read(_MAX_EVENT_BYTES + 1)
    if len(content) > _MAX_EVENT_BYTES:
        raise ValueError("too large for a kept frame")
    return Event.model_validate_json(content)
