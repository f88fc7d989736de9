"""Verdicts as CloudEvents 1.0 in JSON, structured mode."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from agent.types import Scored, Verdict

CONTENT_TYPE = "application/cloudevents+json"
VERDICT_TYPE = "tta.verdict.v1"

#: More digits would be noise, and half of a verdict's bytes.
_DIGITS = 6


def to_event(verdict: Verdict) -> dict[str, Any]:
    """A verdict as a CloudEvent. Numbers that are not finite become null.

    `id` is the frame's place in its log, so repeats of a verdict share it; `time` is the moment
    of capture.
    """
    return {
        "specversion": "1.0",
        "id": str(verdict.frame),
        "source": f"/cameras/{quote(verdict.camera, safe='')}",
        **({} if verdict.subject is None else {"subject": verdict.subject}),
        "type": VERDICT_TYPE,
        "time": rfc3339(verdict.captured_at),
        "datacontenttype": "application/json",
        "data": _data(verdict),
    }


def encode(verdict: Verdict) -> bytes:
    """A verdict's CloudEvent as UTF-8 JSON, about 1 KB."""
    return compact(to_event(verdict)).encode()


def compact(fields: dict[str, Any]) -> str:
    """JSON on one line."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def rfc3339(seconds: float) -> str:
    """A moment, given in seconds since the epoch, as text."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _data(verdict: Verdict) -> dict[str, Any]:
    return {
        "frame": verdict.frame._asdict(),
        "camera": verdict.camera,
        "captured_at": rfc3339(verdict.captured_at),
        "top": [_scored(scored) for scored in verdict.top],
        "frozen": _scored(verdict.frozen),
        "frozen_encoder": verdict.frozen_encoder,
        "confidence": _number(verdict.confidence),
        "energy": _number(verdict.energy),
        "novelty": _number(verdict.novelty),
        "threshold": _number(verdict.threshold),
        "ood": bool(verdict.ood),
        "domain": int(verdict.domain),
        "shift": _number(verdict.shift),
        "strategy": verdict.strategy,
        "version": int(verdict.version),
        "model": verdict.model,
        "age_s": _number(verdict.age_s),
        "stage_s": {stage: _number(seconds) for stage, seconds in verdict.stage_s.items()},
    }


def _scored(scored: Scored) -> dict[str, Any]:
    return {"label": scored.label, "probability": _number(scored.probability)}


def _number(value: float) -> float | None:
    return round(float(value), _DIGITS) if math.isfinite(value) else None
