"""The benchmark's photographs, labels, scores and tables."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from agent.bench import pool as pools
from agent.bench import report
from agent.bench.ablations import ABLATIONS, NOTHING
from agent.bench.arena import Score, play
from agent.bench.competitors import Arena, competitor
from agent.bench.label_sets import LabelSet, labelling
from agent.bench.picture import write_picture
from agent.bench.pool import CLEAR, Condition
from agent.bench.suites import Shot, Suite
from agent.calibration import calibrate
from agent.config import ModelConfig
from agent.errors import AgentError
from agent.testing import picture, tiny_encoder, tiny_words, tiny_zero_shot

NAMES = ("n01443537_goldfish", "n02085620_Chihuahua", "n02691156_airliner")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(64):
        Image.fromarray(picture(rng)).save(tmp_path / f"{NAMES[n % 3]}_{n}.png")
    return tmp_path


@pytest.fixture
def pool(folder, tmp_path_factory):
    return pools.load(folder, 32, 1.0, tmp_path_factory.mktemp("cache"))


class Parrot:
    """Gives always the same answer."""

    def __init__(self, word):
        self.word = word
        self.batches = []

    def answer(self, cameras, pixels):
        self.batches.append(len(pixels))
        return [self.word] * len(cameras)


def test_photographs_are_cropped_and_some_are_kept_for_calibration(pool):
    assert pool.pixels.shape == (64, 32, 32, 3)
    assert len(pool.calibration) == 16
    assert not set(pool.calibration) & set(pool.stream)


def test_a_condition_is_made_once_and_kept(pool):
    first = np.array(pool.under(Condition("gaussian_noise", 5)))
    (file,) = pool.cache.iterdir()
    stamp = file.stat().st_mtime_ns
    assert np.array_equal(pool.under(Condition("gaussian_noise", 5)), first)
    assert file.stat().st_mtime_ns == stamp
    assert not np.array_equal(first, pool.under(CLEAR))


def test_lowres_leaves_as_few_pixels_as_it_says(pool):
    reduced = pool.under(Condition("lowres", 3))[0].astype(float)
    assert reduced.shape == (32, 32, 3)
    assert np.abs(np.diff(reduced, axis=0)).mean() < 20


def test_too_few_photographs_are_refused(tmp_path):
    with pytest.raises(AgentError, match="64 or more"):
        pools.load(tmp_path, 32, 1.0, tmp_path / "cache")


def test_all_labels_of_wordnet_names_are_the_thousand(folder):
    names = labelling(LabelSet.ALL, folder)
    assert len(names.labels) == 998  # two names are each given to two classes
    assert names.truth(folder / f"{NAMES[0]}_1.png", folder) == "goldfish"


def test_fleet_labels_are_twenty_groups(folder):
    names = labelling(LabelSet.FLEET, folder)
    shown = Counter(names.truth(path, folder) for path in folder.iterdir())
    assert len(names.labels) == 20
    assert set(shown) == {"fish", "dog", None}  # an airliner is in no group


def test_fleet_labels_need_wordnet_names(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"")
    with pytest.raises(AgentError, match="WordNet"):
        labelling(LabelSet.FLEET, tmp_path)


def test_accuracy_counts_known_frames_by_phase(pool):
    fish = [i for i in pool.stream if pool.labels[i] == pool.labels[0]][:3]
    other = [i for i in pool.stream if pool.labels[i] != pool.labels[0]]
    unknown = next(i for i in other if pool.labels[i] != pool.labels[other[0]])
    shots = [Shot(i, CLEAR, "day") for i in (*fish, other[0], unknown)]
    shots += [Shot(fish[0], CLEAR, "night")]
    suite = Suite("test", tuple(shots), batch=4, held_out=frozenset({pool.labels[unknown]}))
    parrot = Parrot(pool.labels[0])
    score = play(suite, pool, "parrot", parrot)
    assert score.accuracy == {"day": 0.75, "night": 1.0}
    assert (score.mean, score.frames, parrot.batches) == (0.875, 6, [4, 2])


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_differs_from_the_default_and_runs(name, pool):
    ablation = ABLATIONS[name]
    assert ablation.changes or ablation.parameters != NOTHING.parameters
    encoder = tiny_encoder()
    zero_shot = tiny_zero_shot(encoder)
    images = [pool.pixels[i] for i in pool.calibration]
    normal = calibrate(encoder, zero_shot, images, tiny_words(encoder), "tiny")
    model = ModelConfig(labels=list(zero_shot.labels))
    arena = Arena(lambda: encoder, model, zero_shot, normal, seed=0)
    runner = competitor(name, arena, 16)
    dark = pool.pixels // 4
    for start in range(0, 64, 16):
        answers = runner.answer(["cam"] * 16, dark[start : start + 16])
        assert set(answers) <= set(zero_shot.labels)


def test_every_nth_frame_is_shown(pool):
    suite = Suite("test", tuple(Shot(i, CLEAR, "day") for i in list(pool.stream)[:9]))
    assert play(suite, pool, "parrot", Parrot(""), every=4).frames == 3


def scores():
    one = Score("test", "frozen", {"a": [True, False], "b": [False, False]}, 2.0, 4)
    two = Score("test", "continual", {"a": [True, True], "b": [False, True]}, 3.0, 4)
    return [one, two]


def test_the_table_compares_with_frozen():
    rows = {line.split(" | ")[0]: line for line in report.markdown(scores()).splitlines()}
    assert rows["| a"] == "| a | 50.0 | 100.0 |"
    assert rows["| gain over frozen"] == "| gain over frozen | +0.0 | +50.0 |"
    assert rows["| least gain"] == "| least gain | +0.0 | +50.0 |"
    assert rows["| time, of frozen's"] == "| time, of frozen's | 1.00 | 1.50 |"
    assert report.table(scores()).row_count == 7


def test_the_picture_shows_gains_the_best_on_top(tmp_path):
    worse = Score("test", "worse", {"a": [False, False], "b": [False, False]}, 3.0, 4)
    frozen, better = scores()
    for n, order in enumerate([(frozen, worse, better), (better, frozen, worse)]):
        write_picture(order, "frozen", tmp_path / f"{n}.png")
    one, other = ((tmp_path / f"{n}.png").read_bytes() for n in (0, 1))
    with Image.open(tmp_path / "0.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"), float)
    assert one == other  # the order of the competitors does not matter
    top, bottom = np.array_split(pixels, 2)
    blueness = lambda half: float((half[..., 2] - half[..., 0]).mean())  # noqa: E731
    assert blueness(top) > 0 > blueness(bottom)


def test_without_competitors_there_is_no_picture(tmp_path):
    write_picture(scores()[:1], "frozen", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_the_json_holds_every_score(tmp_path):
    report.save(tmp_path / "bench.json", scores(), {"seed": 3})
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["seed"] == 3
    assert [score["mean"] for score in content["scores"]] == [0.25, 0.75]
