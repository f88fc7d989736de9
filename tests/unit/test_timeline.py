import numpy as np
import pytest
from PIL import Image

from agent.bench.scoreboard import Outcome, Said
from agent.bench.timeline import rolling, write_timeline
from agent.errors import AgentError
from agent.types import FrameId


def outcome(index, phase, *, known=True):
    said = Said(FrameId("frames", 0, index), "cat", "dog", -9.0, -7.0, not known, 0, 1.0, 0.1)
    return Outcome(index, phase, "cat", known, said)


STREAM = [outcome(i, "clear" if i < 30 else "fog", known=i % 7 > 0) for i in range(60)]


def test_a_picture_is_written_where_asked(tmp_path):
    path = tmp_path / "new" / "timeline.png"
    write_timeline(STREAM, path, "Two phases")
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (1800, 1200))
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    assert path.stat().st_size > 20_000


def test_the_picture_shows_what_happened(tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    write_timeline(STREAM, first, "A stream")
    write_timeline(STREAM[:40], second, "A stream")
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize("stream", [STREAM[:1], [outcome(i, "x", known=False) for i in range(3)]])
def test_a_stream_cut_short_can_be_drawn(tmp_path, stream):
    write_timeline(stream, tmp_path / "t.png", "Short")
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_without_verdicts_there_is_no_timeline(tmp_path):
    with pytest.raises(AgentError, match="no verdict"):
        write_timeline([], tmp_path / "t.png", "Nothing")


def test_the_rolling_mean_grows_into_its_window():
    hits = [True, False, True, True, True]
    assert rolling(hits, 2).tolist() == [1.0, 0.5, 0.5, 1.0, 1.0]
    assert rolling(hits, 3).tolist() == pytest.approx([1.0, 0.5, 2 / 3, 2 / 3, 1.0])
