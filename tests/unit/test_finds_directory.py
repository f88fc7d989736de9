import base64
import json
import logging
import os
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from agent.finds import directory as module
from agent.finds.directory import DirectoryStore
from agent.finds.entry import event, name_of, read_event
from agent.finds.find import Outcome
from agent.testing import FakeClock
from tests.unit.finds import DAY_S, embedding, find, verdict


@pytest.fixture
def clock():
    return FakeClock(1e9)


@pytest.fixture
def opened(tmp_path, clock):
    def opened(max_bytes=2**20, max_age_s=DAY_S, model="tiny", folder=tmp_path / "unknown"):
        return DirectoryStore.open(folder, max_bytes, max_age_s, model, clock)

    return opened


def put(store, *finds):
    for each in finds:
        store.put(each)
    return [outcome for _, outcome in store.outcomes()]


def names(store):
    return sorted(path.name for path in store._folder.iterdir())


def offsets(store):
    events = [json.loads(path.read_text()) for path in store._folder.glob("*.json")]
    return sorted(each["data"]["frame"]["offset"] for each in events)


def test_a_kept_frame_is_a_picture_and_a_verdict(opened):
    store = opened()
    one = find(7, thing=2, margin=0.5, camera="gate 3")
    assert put(store, one) == [Outcome.KEPT]
    jpg, written = names(store)
    assert (jpg[:-4], written[:-5]) == (name_of(one.verdict),) * 2
    assert jpg.startswith("20250601T120000250Z-gate-3-")
    with Image.open(store._folder / jpg) as picture:
        assert picture.size == (16, 16)
    fields = json.loads((store._folder / written).read_text())
    assert (fields["id"], fields["data"]["margin"]) == ("frames/0/7", 0.5)
    read = read_event(store._folder / written)
    assert read.data.embedding == pytest.approx(embedding(2))
    assert store.held_bytes == sum(path.stat().st_size for path in store._folder.iterdir())


def test_an_event_may_hold_the_thumbnail():
    fields = json.loads(event(find(), b"jpeg"))
    assert base64.b64decode(fields["data"]["thumbnail"]) == b"jpeg"


def test_a_repeat_is_not_kept_twice_nor_after_a_restart(opened):
    assert put(opened(), find(1), find(1)) == [Outcome.KEPT, Outcome.DUPLICATE]
    assert put(opened(), find(1)) == [Outcome.DUPLICATE]


@pytest.mark.parametrize(
    "camera", ["../../etc/passwd", "a/b", "\n\r\0", "x" * 10_000, "", "ü\u202e", "..", "-rf"]
)
def test_no_camera_leaves_the_folder(opened, tmp_path, camera):
    store = opened()
    assert put(store, find(1, camera=camera, subject="../../x\0")) == [Outcome.KEPT]
    assert [path.name for path in tmp_path.iterdir()] == ["unknown"]
    assert all(len(name) < 100 and name.isascii() and name.isprintable() for name in names(store))
    assert put(opened(), find(1, camera=camera)) == [Outcome.DUPLICATE]


def test_names_sort_by_time_and_differ_by_frame():
    moments = [0.0, 1.5, 1e9, 2e10]
    ordered = [name_of(verdict(captured_at=moment)) for moment in moments]
    assert ordered == sorted(ordered)
    assert name_of(verdict(1)) != name_of(verdict(2))


def test_the_folder_stays_below_its_limit_and_the_least_novel_goes(opened, monkeypatch):
    monkeypatch.setattr(module, "OLDEST", 2)
    store = opened()
    put(store, find(0, margin=3.0), find(1, margin=1.0), find(2, margin=0.5))
    store._max_bytes = store.held_bytes
    put(store, find(3))
    assert offsets(store) == [0, 2, 3]  # of the two oldest, 1 was the less novel
    assert store.held_bytes <= store._max_bytes
    assert store.held_bytes == sum(path.stat().st_size for path in store._folder.iterdir())


def test_there_are_never_more_frames_than_can_be_followed(opened, monkeypatch):
    monkeypatch.setattr(module, "MAX_FRAMES", 2)
    store = opened()
    put(store, *[find(n, margin=float(n)) for n in range(4)])
    assert offsets(store) == [2, 3]


def test_old_frames_go_also_when_nothing_new_comes(opened, clock):
    store = opened()
    put(store, find(0))
    clock.advance(DAY_S / 2)
    put(store, find(1))
    clock.advance(DAY_S / 2 + 1)
    store.tend()
    assert offsets(store) == [1]


def test_a_clock_that_was_ahead_keeps_nothing_for_longer(opened, clock):
    store = opened()
    clock.advance(30 * DAY_S)
    put(store, find(0))
    clock.advance(-30 * DAY_S)
    put(store, find(1))
    store.tend()
    clock.advance(DAY_S + 1)
    store.tend()
    assert offsets(store) == []


def test_a_restart_goes_on_with_what_is_there(opened, clock):
    first = opened()
    put(first, find(0, thing=0), find(1, thing=1))
    for path in first._folder.iterdir():
        os.utime(path, (clock(), clock()))
    second = opened()
    assert second.held_bytes == first.held_bytes
    assert [each.kept_at for each in second.remembered()] == [clock(), clock()]
    known = np.stack([each.embedding_D for each in second.remembered()])
    assert sorted(known.argmax(axis=1)) == [0, 1]
    assert list(opened(model="another").remembered()) == []
    clock.advance(DAY_S + 1)
    assert names(opened()) == []


def test_foreign_files_stay_and_cut_off_writes_go(opened, clock):
    store = opened()
    name = name_of(verdict(1))
    foreign = ["notes.txt", "a.jpg", f"{name}.jpg.json", f"{name}.png", f"x{name}.jpg", "b.part"]
    for each in [*foreign, f"{name}.jpg.part"]:
        (store._folder / each).write_text("mine")
    (store._folder / f"{name_of(verdict(2))}.jpg").mkdir()
    clock.advance(100 * DAY_S)
    again = opened(max_bytes=1)
    put(again, find(3))
    assert set(foreign) < set(names(again))
    assert f"{name}.jpg.part" not in names(again)


def test_damaged_frames_are_no_hindrance_and_go_first(opened, monkeypatch):
    store = opened()
    put(store, find(0, margin=5.0), find(1, margin=1.0))
    (store._folder / f"{name_of(verdict(0))}.json").write_text("[" * 100_000)
    again = opened()
    assert len(list(again.remembered())) == 1
    again._max_bytes = again.held_bytes
    put(again, find(2))
    assert f"{name_of(verdict(0))}.jpg" not in names(again)


def test_a_folder_that_cannot_be_written_is_told_once(opened, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    store = opened(folder=blocked / "unknown")
    assert put(store, find(0), find(1)) == [Outcome.FAILED] * 2
    store.tend()
    assert len(caplog.records) == 1
    blocked.unlink()
    assert put(store, find(0)) == [Outcome.KEPT]
    assert "again" in caplog.records[-1].message


def test_a_full_disk_leaves_nothing_half_written(opened, monkeypatch):
    store = opened()
    put(store, find(0))

    def full(self, content):
        if ".json" in self.name:
            raise OSError(28, "No space left on device")
        return self.open("wb").write(content)

    monkeypatch.setattr(module.Path, "write_bytes", full)
    before = names(store)
    assert put(store, find(1)) == [Outcome.FAILED]
    assert names(store) == before
    assert BytesIO((store._folder / before[0]).read_bytes()).read(2) == b"\xff\xd8"
