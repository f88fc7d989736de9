import os

import pytest

from agent.errors import AgentError
from agent.produce import images_under, paced
from agent.testing import FakeClock


def test_only_image_files_are_played(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.jpg" / "b.PNG").write_bytes(b"b")
    (tmp_path / "a.jpg").write_bytes(b"a")
    assert images_under(tmp_path) == [tmp_path / "a.jpg", tmp_path / "folder.jpg" / "b.PNG"]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(AgentError, match="holds no image files"):
        images_under(tmp_path)


def test_a_file_that_cannot_be_read_is_left_out(tmp_path, caplog):
    (tmp_path / "a.jpg").write_bytes(b"a")
    assert list(paced([tmp_path / "gone.jpg", tmp_path / "a.jpg"], None)) == [b"a"]
    assert "gone.jpg is left out" in caplog.text


def test_frames_are_paced(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a")
    clock = FakeClock()
    list(paced([tmp_path / "a.jpg"] * 3, 10, clock, clock.advance))
    assert clock.now == pytest.approx(0.2)
