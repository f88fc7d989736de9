"""What every source that ends keeps; the Kafka source has a suite of its own with a broker."""

import io
import os

import av
import numpy as np
import pytest
from PIL import Image

from agent.errors import InvalidConfig
from agent.sources import EndOfStream
from agent.sources.directory import DirectorySource
from agent.sources.memory import MemorySource
from agent.sources.video import VideoSource
from agent.types import FrameId, Partition, Record

FRAMES = 5


def folder_of_images(path):
    (path / "b").mkdir()
    (path / ".hidden").write_bytes(b"no")
    for name in ("2.jpg", "1.jpg", "b/1.jpg", "b/2.jpg", "3.txt"):
        (path / name).write_bytes(name.encode())
        os.utime(path / name, (1000, 1000))
    return path


def video(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for n in range(FRAMES):
            picture = np.full((64, 64, 3), 40 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    os.utime(path, (1000, 1000))
    return path


def memory(records=FRAMES):
    return MemorySource(
        [Record(FrameId("m", 0, n), b"cam", b"x", (), 5.0) for n in range(records)], 2
    )


@pytest.fixture(params=["memory", "directory", "video"])
def source(request, tmp_path):
    match request.param:
        case "memory":
            source = memory()
        case "directory":
            source = DirectorySource.open(folder_of_images(tmp_path), "cam", 1000, 2)
        case "video":
            source = VideoSource.open(video(tmp_path / "clip.mp4"), "cam", 2)
    yield source
    source.close()


def drain(source):
    records = []
    while True:
        try:
            records += source.poll(0)
        except EndOfStream:
            return records


def test_every_record_comes_once_and_in_order(source):
    assert [record.id.offset for record in drain(source)] == list(range(FRAMES))


def test_a_poll_returns_no_more_than_asked(source):
    assert len(source.poll(0)) == 2


def test_records_name_the_camera_and_one_log(source):
    records = drain(source)
    assert {record.key for record in records} == {b"cam"}
    assert len({record.id.log for record in records}) == 1


def test_the_end_stays_the_end(source):
    drain(source)
    with pytest.raises(EndOfStream):
        source.poll(0)


def test_a_paused_source_delivers_nothing_and_forgets_nothing(source):
    source.pause()
    assert source.poll(0) == []
    source.resume()
    assert len(drain(source)) == FRAMES


def test_lag_counts_what_was_not_polled(source):
    assert list(source.lag().values()) == [FRAMES]
    source.poll(0)
    assert list(source.lag().values()) == [FRAMES - 2]


def test_nothing_is_lost_and_all_is_ready(source):
    assert source.lost() == frozenset()
    assert source.ready


def test_commits_are_accepted(source):
    record = source.poll(0)[0]
    source.commit({record.id.log: 1})
    assert len(drain(source)) == FRAMES - 2


def test_a_memory_source_plays_a_rebalance():
    source, log = memory(), Partition("m", 0)
    source.poll(0)
    source.commit({log: 1})
    source.lose(frozenset({log}))
    assert source.lost() == {log}
    assert source.lost() == frozenset()
    assert [record.id.offset for record in drain(source)] == [1, 2, 3, 4]


def test_a_directory_is_read_in_the_order_of_paths(tmp_path):
    source = DirectorySource.open(folder_of_images(tmp_path), "cam", 1000)
    records = drain(source)
    assert [r.value for r in records] == [b"1.jpg", b"2.jpg", b"3.txt", b"b/1.jpg", b"b/2.jpg"]
    assert {(r.id.topic, r.timestamp) for r in records} == {(tmp_path.name, 1000.0)}


def test_a_file_of_a_directory_is_named(tmp_path):
    records = drain(DirectorySource.open(folder_of_images(tmp_path), "cam", 1000))
    assert [r.subject for r in records] == ["1.jpg", "2.jpg", "3.txt", "b/1.jpg", "b/2.jpg"]


def test_of_a_large_file_enough_is_read_to_reject_it(tmp_path):
    (tmp_path / "large.jpg").write_bytes(b"x" * 100)
    assert len(drain(DirectorySource.open(tmp_path, "cam", 10))[0].value) == 11


def test_a_file_that_vanished_is_a_record_without_a_value(tmp_path):
    source = DirectorySource.open(folder_of_images(tmp_path), "cam", 1000)
    (tmp_path / "1.jpg").unlink()
    assert [record.value for record in drain(source)][:2] == [None, b"2.jpg"]


def test_a_video_gives_its_pictures_and_their_times(tmp_path):
    records = drain(VideoSource.open(video(tmp_path / "clip.mp4"), "cam"))
    means = [np.asarray(Image.open(io.BytesIO(record.value))).mean() for record in records]
    assert means == pytest.approx([0, 40, 80, 120, 160], abs=4)
    times = [record.timestamp for record in records]
    assert times == pytest.approx([999.5, 999.6, 999.7, 999.8, 999.9], abs=0.01)


def test_broken_packets_are_delivered_to_be_rejected(tmp_path):
    path = video(tmp_path / "clip.mp4")
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 4
    content[begin : begin + 60] = b"\xff" * 60
    path.write_bytes(content)
    records = drain(VideoSource.open(path, "cam"))
    assert not records[0].value.startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("make", [DirectorySource.open, VideoSource.open])
def test_a_path_that_is_not_there_is_refused(make, tmp_path):
    with pytest.raises(InvalidConfig, match=r"source\.path"):
        make(tmp_path / "none", "cam", 10)


def test_a_file_without_video_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a video")
    with pytest.raises(InvalidConfig, match=r"source\.path"):
        VideoSource.open(tmp_path / "notes.txt", "cam")
