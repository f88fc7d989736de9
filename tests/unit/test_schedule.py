from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from agent.bench.photos import Photo
from agent.bench.schedule import CAMERAS, Phase, drifting, stream
from agent.errors import AgentError

CLEAR = Phase("clear", None, 5, 60, 0.5)
NOISE = Phase("noise", "gaussian_noise", 5, 6, 0.0)


def photo(label, known):
    return Photo(label, np.full((30, 40, 3), 128, np.uint8), known)


PHOTOS = [photo("cat", True), photo("dog", True), photo("coin", False)]


def spread(frame):
    return np.asarray(Image.open(BytesIO(frame.jpeg))).std()


@pytest.mark.parametrize("frames", [6, 7, 100, 900])
def test_the_drift_has_as_many_frames_as_asked(frames):
    schedule = drifting(frames)
    assert sum(phase.frames for phase in schedule) == frames
    assert max(p.frames for p in schedule) - min(p.frames for p in schedule) <= 1


def test_a_drift_needs_a_frame_for_each_phase():
    with pytest.raises(AgentError, match="6 phases"):
        drifting(5)


def test_the_drift_ends_where_it_began():
    first, *_, last = drifting()
    assert (first.corruption, first.unknown_share) == (last.corruption, last.unknown_share)


def test_the_same_seed_plays_the_same_stream():
    first, again, other = (list(stream(PHOTOS, [CLEAR], seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_frames_are_numbered_through_and_cameras_take_turns():
    frames = list(stream(PHOTOS, [CLEAR, NOISE], 0))
    assert [f.index for f in frames] == list(range(66))
    assert Counter(f.camera for f in frames) == dict.fromkeys(CAMERAS, 22)
    assert Counter(f.phase for f in frames) == {"clear": 60, "noise": 6}


def test_a_frame_is_a_vga_jpeg():
    image = Image.open(BytesIO(next(stream(PHOTOS, [CLEAR], 0)).jpeg))
    assert (image.format, image.size) == ("JPEG", (640, 480))


def test_unknown_things_come_in_their_share():
    unknown = [f for f in stream(PHOTOS, [CLEAR], 0) if not f.known]
    assert 20 <= len(unknown) <= 40
    assert {f.label for f in unknown} == {"coin"}


def test_without_unknown_photographs_every_frame_is_known():
    assert all(f.known for f in stream(PHOTOS[:2], [CLEAR], 0))


def test_the_phases_corruption_is_in_its_frames():
    frames = list(stream(PHOTOS, [CLEAR, NOISE], 0))
    assert max(spread(f) for f in frames if f.phase == "clear") < 1
    assert min(spread(f) for f in frames if f.phase == "noise") > 20
