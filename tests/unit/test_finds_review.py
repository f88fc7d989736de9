import json
import os
import re
import shutil
import sys
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import numpy as np
import pytest

from agent import cli
from agent.finds import sheet
from agent.finds.directory import DirectoryStore
from agent.finds.entry import Event, event
from agent.finds.review import Kept, grouped, since
from agent.testing import FakeClock
from tests.unit.finds import DAY_S, find

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "unknown"


@pytest.fixture
def keep(folder):
    def keep(*finds):
        store = DirectoryStore.open(folder, 2**30, DAY_S, "tiny", FakeClock(2e9))
        for each in finds:
            store.put(each)

    return keep


@pytest.fixture
def review(monkeypatch, capsys, tmp_path, folder):
    """Runs the command; gives its exit code, its output and the page."""

    def review(*arguments):
        out = tmp_path / "sheet.html"
        argv = ["tta-agent", "review", str(folder), "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as exited:
            cli.main()
        said = "".join(capsys.readouterr())
        return exited.value.code, said, out.read_text() if out.exists() else ""

    return review


def kept(*finds, picture=None):
    return [Kept(Event.model_validate_json(event(each)), picture) for each in finds]


def ids(groups):
    return [[int(each.event.id.rsplit("/")[-1]) for each in group.frames] for group in groups]


def test_frames_that_look_alike_stand_together_the_heaviest_first():
    frames = kept(find(0, 0, 1.0), find(1, 2, 2.0), find(2, 0.1, 4.0), find(3, 4, 3.0))
    assert ids(grouped(frames, 0.8, lambda done, total: None)) == [[2, 0], [3], [1]]


def test_frames_without_a_feature_are_alike():
    frames = kept(find(0, None, 0.0), find(1, 1), find(2, None, 0.0))
    assert ids(grouped(frames, 0.8, lambda done, total: None)) == [[1], [0, 2]]


def test_embeddings_of_two_models_are_not_compared():
    frames = kept(find(0), find(1))
    frames[1].event.data.model = "another"
    assert len(grouped(frames, 0.8, lambda done, total: None)) == 2
    frames = kept(find(0), find(1))
    frames[1].event.data.embedding = np.ones(3, np.float32)
    assert len(grouped(frames, 0.8, lambda done, total: None)) == 2


def test_many_groups_are_found_again():
    frames = kept(*[find(n, thing=n % 8 + (n % 5) / 5) for n in range(200)])
    groups = grouped(frames, 0.99, lambda done, total: None)
    assert sum(len(group.frames) for group in groups) == 200
    assert len(groups) == 40


def test_a_moment_is_a_date_or_so_long_ago():
    assert since("24h", NOW) == NOW - timedelta(hours=24)
    assert since("7d", NOW) == NOW - timedelta(days=7)
    assert since("2026-11-23", NOW) == datetime(2026, 11, 23, tzinfo=UTC)
    assert since("2026-11-23T09:00+01:00", NOW).hour == 9
    with pytest.raises(ValueError):
        since("yesterday", NOW)


def test_a_sheet_shows_every_frame_with_what_was_said_of_it(keep, review):
    keep(find(4, 0, 1.5, camera="gate"), find(5, 3))
    code, said, page = review()
    assert code == 0
    assert "2 frames are shown" in said
    for words in (
        "gate",
        "dog 50%, cat 25%",
        "margin 1.50",
        "domain 3",
        "frames/0/4",
        "2025-06-01",
    ):
        assert words in page
    assert page.count("data:image/jpeg;base64,/9j/") == 2


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_a_sheet_holds_other_peoples_text_and_nothing_of_their_making(keep, review):
    evil = "<script>alert(1)</script>\n\"'><img src=x onerror=y>\u202e"
    keep(find(1, camera=evil, subject=evil), find(2, 3, camera=evil * 200))
    code, _, page = review()
    parser = Tags()
    parser.feed(page)
    assert code == 0
    assert not parser.tags & {"script", "link", "iframe", "a"}
    assert not {name for name in parser.attributes if name.startswith("on")}
    assert "\u202e" not in page
    assert not re.search(r"(src|href)=\"?http|url\(", page)
    assert page.count("alert") < 10  # long ids are cut


def test_a_sheet_can_be_narrowed(keep, review):
    keep(find(1, 0, camera="a"), find(2, 1, camera="b", captured_at=1.9e9))
    assert "frames/0/2" not in review("--camera", "a")[2]
    assert "frames/0/1" not in review("--since", "2026-01-01")[2]
    code, said, _ = review("--camera", "c")
    assert code == 2
    assert "none of the 2 frames" in said
    assert "expected hours" in review("--since", "soon")[1]


def test_bad_files_are_counted_and_the_rest_is_shown(keep, review, folder):
    keep(find(1))
    good = next(folder.glob("*.json"))
    bad = ["", "[" * 100_000, "{}", good.read_text().replace('"margin":1.0', '"margin":"x"')]
    bad.append(re.sub('"embedding":"[^"]*"', '"embedding":"!"', good.read_text()))
    for number, text in enumerate(bad):
        (folder / f"{number}.json").write_text(text)
        shutil.copy(good.with_suffix(".jpg"), folder / f"{number}.jpg")
    (folder / "alone.json").write_text(good.read_text())
    code, _, page = review()
    assert code == 0
    assert "6 files could not be read" in page


def test_pipes_links_and_impossible_times_are_bad_files(keep, review, folder, tmp_path):
    keep(find(1), find(2, thing=1), find(3, thing=2))
    one, two, three = sorted(folder.glob("*.json"))
    one.unlink()
    os.mkfifo(one)
    secret = tmp_path / "secret"
    secret.write_text("do not mail this")
    two.with_suffix(".jpg").unlink()
    two.with_suffix(".jpg").symlink_to(secret)
    _, _, page = review()
    assert "2 files could not be read" in page
    fields = json.loads(three.read_text()) | {"time": "0001-01-01T00:00:00+10:00"}
    three.write_text(json.dumps(fields))
    assert review()[0] == cli.EXIT_ERROR


def test_an_empty_or_missing_folder_is_told(review, folder):
    assert review()[0] == 2
    folder.mkdir()
    code, said, _ = review()
    assert code == 2
    assert "novelty.directory" in said


def test_a_page_stays_small_enough_for_a_phone(keep, review, monkeypatch):
    monkeypatch.setattr(sheet, "PER_GROUP", 2)
    monkeypatch.setattr(sheet, "IN_ALL", 3)
    keep(*[find(n, 0) for n in range(4)], *[find(n, 3) for n in range(4, 7)], find(7, 5))
    _, _, page = review()
    assert page.count("<img") == 3
    assert page.count("not shown") == 3
    assert page.count("frames/0/") >= 8
