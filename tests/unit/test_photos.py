from itertools import islice

import numpy as np
import pytest
from PIL import Image

from agent.bench.photos import (
    DISTRACTORS,
    Photo,
    builtin_photos,
    deck,
    frame_of,
    known_labels,
    label_of,
    labelled_folder,
)
from agent.errors import AgentError


@pytest.fixture
def folder(tmp_path):
    """Ten labels of two photographs each."""
    for letter in "abcdefghij":
        for n in range(2):
            Image.new("RGB", (40, 30), (n, 0, 0)).save(tmp_path / f"{letter}_{n}.jpg")
    return tmp_path


def test_builtin_photos_are_colour_pictures_of_known_and_unknown_things():
    photos = builtin_photos()
    assert {photo.known for photo in photos} == {True, False}
    assert all(p.pixels.dtype == np.uint8 and p.pixels.shape[2] == 3 for p in photos)


def test_no_unknown_thing_and_no_distractor_bears_a_known_label():
    photos = builtin_photos()
    known = set(known_labels(photos))
    assert not known & {photo.label for photo in photos if not photo.known}
    assert not known & set(DISTRACTORS)
    assert len(DISTRACTORS) == len(set(DISTRACTORS))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("n01443537_goldfish.jpg", "goldfish"),
        ("n01484850_great_white_shark.jpg", "great white shark"),
        ("goldfish_12.jpg", "goldfish"),
        ("goldfish/12.jpg", "goldfish"),
        ("n01443537_goldfish/far/12.jpg", "goldfish"),
        ("Boeing_747/a.jpg", "Boeing 747"),
        ("12.jpg", "12"),
    ],
)
def test_a_label_comes_from_the_folder_or_the_file(tmp_path, name, label):
    assert label_of(tmp_path / name, tmp_path) == label


def test_a_fifth_of_a_folders_labels_is_held_out(folder):
    photos = labelled_folder(folder)
    unknown = {photo.label for photo in photos if not photo.known}
    assert len(photos) == 20
    assert len(unknown) == 2
    assert not unknown & set(known_labels(photos))


def test_which_labels_are_held_out_depends_on_the_seed_alone(folder):
    known = [tuple(known_labels(labelled_folder(folder, seed))) for seed in (0, 0, 1, 2, 3)]
    assert known[0] == known[1]
    assert len(set(known)) > 1


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(AgentError, match="no images"):
        labelled_folder(tmp_path)


def test_one_label_is_not_a_choice(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "cat_1.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "cat_2.png")
    with pytest.raises(AgentError, match="only the label 'cat'"):
        labelled_folder(tmp_path)


def test_a_file_that_is_no_image_is_named(folder):
    (folder / "k_1.jpg").write_bytes(b"not a JPEG")
    with pytest.raises(AgentError, match=r"k_1\.jpg"):
        labelled_folder(folder)


@pytest.mark.parametrize("shape", [(300, 450, 3), (600, 200, 3), (20, 900, 3)])
def test_every_photograph_makes_frames_of_one_size_that_differ(shape):
    rng = np.random.default_rng(0)
    photo = Photo("noise", rng.integers(0, 256, shape, dtype=np.uint8), known=True)
    first, second = frame_of(photo, rng), frame_of(photo, rng)
    assert first.shape == second.shape == (240, 320, 3)
    assert not np.array_equal(first, second)


def test_a_deck_deals_each_photograph_equally_often():
    photos = [Photo(label, np.zeros((3, 4, 3), np.uint8), known=True) for label in "abc"]
    dealt = [photo.label for photo in islice(deck(photos, np.random.default_rng(0)), 12)]
    assert [dealt.count(label) for label in "abc"] == [4, 4, 4]


def test_an_empty_deck_deals_nothing():
    assert list(deck([], np.random.default_rng(0))) == []
