"""Logs on standard error: one JSON object a line for machines, or text for people.

Say what happened in the message and where in `extra`: `camera`, `offset`, `domain`, … become keys.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from numbers import Integral, Real
from typing import Any, TextIO

from agent.config import LogConfig

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, logger, message, the extras, and the exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = {**_extras(record), **fields}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class TextFormatter(logging.Formatter):
    """The same for people: a line, and the traceback below it if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        # Camera ids come from outside: as JSON they can neither break the line nor colour it.
        extras = "".join(f" {key}={json.dumps(value)}" for key, value in _extras(record).items())
        line = f"{_time(record)} {record.levelname:7} {record.name}: {record.getMessage()}{extras}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(config: LogConfig, stream: TextIO | None = None) -> None:
    """Send all logs to `stream` (standard error) and nowhere else.

    `config.level` is for the agent; libraries are heard from warnings on, since several log each
    record or request, and some to the root logger.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if config.format == "json" else TextFormatter())
    level = logging.getLevelNamesMapping()[config.level.upper()]
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("agent").setLevel(level)
    logging.captureWarnings(True)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: _plain(value) for key, value in vars(record).items() if key not in _OWN}


def _plain(value: object) -> Any:
    """`value` as JSON can say it; secrets hide themselves when they become text."""
    match value:
        case None | bool() | str():
            return value
        case Real():
            return _number(value)
        case bytes():
            return value.decode(errors="backslashreplace")
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _:
            return str(value)


def _number(value: Real) -> int | float | str:
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)  # JSON knows neither NaN nor infinity
