"""The demo as a user runs it: on the embedded broker, from a command line."""

import subprocess
import sys

import pytest
from PIL import Image

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "agent", "demo", "--frames", "180", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return out, done.stdout


def test_it_ends_with_a_table_of_all_phases(played):
    _, printed = played
    for phase in ("clear", "fog", "night", "sensor noise", "unknown objects", "clear again", "all"):
        assert phase in printed


def test_every_frame_has_a_verdict(played):
    out, _ = played
    assert len((out / "verdicts.jsonl").read_text().splitlines()) == 180


def test_the_timeline_is_a_picture_to_read(played):
    out, _ = played
    with Image.open(out / "timeline.png") as picture:
        assert picture.width >= 1200
        assert picture.height >= 800


def test_the_agent_left_in_peace(played):
    out, _ = played
    assert "Traceback" not in (out / "agent.log").read_text()


def test_its_configuration_is_one_that_check_accepts(played):
    out, _ = played
    done = subprocess.run(
        [sys.executable, "-m", "agent", "check", str(out / "agent.yaml")], check=False
    )
    assert done.returncode == 0
