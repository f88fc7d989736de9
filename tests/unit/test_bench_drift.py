import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from agent.bench import drift_report as report
from agent.bench.drift_lab import Outcome
from agent.bench.drift_picture import write_severity, write_timeline
from agent.bench.drift_streams import BATCH, STEPS, Take, gradual, onset, takes
from agent.bench.drift_trials import alarms, delays, severities, spearman, timeline
from agent.bench.drift_watch import told
from agent.bench.pool import CLEAR, Condition, Pool
from agent.drift.reading import DETECTORS, Reading, Scope, publish
from agent.drift.statistics import DISTANCES
from agent.metrics import Metrics

FOG = Condition("fog", 3)


@pytest.fixture
def pool(tmp_path):
    return Pool(tuple(f"label {i}" for i in range(64)), np.zeros((64, 8, 8, 3), np.uint8), tmp_path)


def rng():
    return np.random.default_rng(0)


class Scripted:
    """Scores the severity; begins in the batch that is told, and once before any onset."""

    def __init__(self, began_in=()):
        self.metrics = Metrics(1)
        self.batches = 0
        self.began_in = set(began_in)

    def show(self, take: Take):
        readings = [
            Reading(scope, "camera-0", name, 2.0 * take.condition.severity, 2.0, began=False)
            for scope in Scope
            for name in DETECTORS[scope]
        ]
        if self.batches in self.began_in:
            readings.append(Reading(Scope.CAMERA, "camera-0", "mmd", 9.0, 2.0, began=True))
        publish(readings, self.metrics)
        self.batches += 1


def test_photographs_that_were_calibrated_on_are_never_shown_and_others_equally_often(pool):
    shown = [photo for take in takes(pool, FOG, 480, rng()) for photo in take.photos]
    assert set(Counter(shown).values()) == {10}
    assert set(shown) == set(pool.stream)


def test_an_onset_comes_after_clear_frames(pool):
    shown = onset(pool, FOG, 64, 96, rng())
    assert [take.condition for take in shown] == [CLEAR] * 2 + [FOG] * 3
    assert all(len(take.photos) == BATCH for take in shown)


def test_delays_are_counted_from_the_onset(pool):
    shown = onset(pool, FOG, 64, 96, rng())
    found = delays(Scripted(began_in=[0, 3]), shown)
    assert found.pop("mmd") == 64
    assert set(found.values()) == {math.inf}


def test_alarms_are_events(pool):
    found = alarms(Scripted(began_in=[1, 4]), takes(pool, CLEAR, 320, rng()))
    assert found[Scope.CAMERA]["mmd"] == 2
    assert sum(found[Scope.CAMERA].values()) + sum(found[Scope.SITE].values()) == 2
    assert "| mmd | 2 | 0 |" in report.alarms(found, 320)


def test_severities_are_those_of_the_steps(pool):
    found = severities(Scripted(), gradual(pool, "fog", 96, rng()), 96)
    assert found == {name: list(STEPS) for name in DISTANCES}


def test_what_prometheus_sees_is_read():
    metrics = Metrics(1)
    publish([Reading(Scope.CAMERA, "camera-0", "mmd", 0.5, 0.25, began=True)], metrics)
    assert told(metrics, Scope.CAMERA) == {"mmd": (0.5, 0.25, 1)}
    assert told(metrics, Scope.SITE) == {}


def test_spearman_is_scipys():
    scores = np.random.default_rng(0).normal(size=9)
    assert spearman(scores, STEPS) == pytest.approx(spearmanr(scores, STEPS).statistic)
    assert spearman([1.0] * 9, STEPS) == 0


def test_the_report_tells_the_latest_repeat_and_whether_any_told():
    found = Outcome("frozen")
    found.delays[FOG] = {name: [math.inf, 64.0] for name in DETECTORS[Scope.CAMERA]}
    found.delays[FOG]["style"] = [32.0, 96.0]
    found.severity["fog"] = {name: [float(step) for step in STEPS] for name in DISTANCES}
    text = report.outcome(found)
    row = next(line for line in text.splitlines() if line.startswith("| fog 3"))
    assert row.split(" | ")[-1] == "64 |"
    assert "96" in row
    assert "–" in row
    assert "| mean | 1.00 |" in text


def test_the_cost_is_a_share_of_answering():
    assert "1.00%" in report.cost([{"encode": 1.5, "drift": 0.01}, {"encode": 0.5, "drift": 0.01}])


def test_pictures_are_pictures(pool, tmp_path):
    line = timeline(Scripted(), onset(pool, FOG, 64, 96, rng()))
    assert line["mmd"][-1] == (96, 3.0)
    write_timeline({"fog 3": line, "snow 3": line, "frost 3": line}, tmp_path / "time.png")
    steps = {name: [float(step) for step in STEPS] for name in DISTANCES}
    write_severity({"fog": steps, "snow": steps}, tmp_path / "severity.png")
    for name in ("time.png", "severity.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 600
