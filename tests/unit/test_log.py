import io
import json
import logging
import re

import numpy as np
import pytest
from pydantic import SecretStr

from agent.config import LogConfig
from agent.log import configure


@pytest.fixture
def logged():
    """Configures logging and gives the lines written since; puts everything back."""
    root, ours, stream = logging.getLogger(), logging.getLogger("agent"), io.StringIO()
    before = root.handlers, root.level, ours.level

    def lines(**config):
        configure(LogConfig(**config), stream)
        return lambda: stream.getvalue().splitlines()

    yield lines
    logging.captureWarnings(False)
    root.handlers = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_a_line_is_one_json_object(logged):
    lines = logged()
    logging.getLogger("agent.x").info("read %d", 3, extra={"camera": "gate\n", "offset": 7})
    (line,) = map(json.loads, lines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    expected = {"level": "info", "logger": "agent.x", "message": "read 3"}
    assert line == {**expected, "camera": "gate\n", "offset": 7}


def test_an_exception_stays_on_its_line(logged):
    lines = logged()
    try:
        raise OSError("no disk")
    except OSError:
        logging.getLogger("agent").exception("stopped")
    (line,) = map(json.loads, lines())
    assert "OSError: no disk" in line["exception"]


def test_values_json_cannot_say_become_what_it_can(logged):
    lines = logged()
    extra = {"energy": np.float32(0.5), "n": np.int64(3), "gap": float("nan"), "key": b"\xff"}
    logging.getLogger("agent").info("odd", extra=extra | {"stage_s": {"encode": float("inf")}})
    line = json.loads(lines()[0], parse_constant=pytest.fail)
    assert (line["energy"], line["n"], line["gap"], line["key"]) == (0.5, 3, "nan", "\\xff")
    assert line["stage_s"] == {"encode": "inf"}


def test_secrets_are_not_logged(logged):
    lines = logged()
    logging.getLogger("agent").info("%s", SecretStr("hunter2"), extra={"s": SecretStr("hunter2")})
    assert "hunter2" not in lines()[0]


def test_text_keeps_foreign_values_on_their_line(logged):
    lines = logged(format="text")
    logging.getLogger("agent.x").warning("late", extra={"camera": "a\n\x1b[31mb"})
    (line,) = lines()
    assert line.endswith(r'WARNING agent.x: late camera="a\n\u001b[31mb"')


def test_libraries_are_heard_from_warnings_on(logged):
    lines = logged(level="debug")
    for name in ("kafka.conn", "PIL", "root"):
        logging.getLogger(name).info("chatter")
    logging.getLogger("agent").debug("ours")
    logging.getLogger("kafka.conn").warning("gone")
    assert [json.loads(line)["message"] for line in lines()] == ["ours", "gone"]


def test_the_level_bounds_what_is_written(logged):
    lines = logged(level="error")
    logging.getLogger("agent").warning("soft")
    logging.getLogger("kafka").warning("soft")
    assert lines() == []


def test_configuring_twice_does_not_write_twice(logged):
    logged()
    lines = logged()
    logging.getLogger("agent").info("once")
    assert len(lines()) == 1
