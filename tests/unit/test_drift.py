import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2

from agent.drift import monitor as monitors
from agent.drift.distances import frechet, jensen_shannon, squared, squared_log_ratio
from agent.drift.fourier import RandomFourier
from agent.drift.groups import FRAMES_PER_GROUP, label_groups
from agent.drift.monitor import WARM_UP, DriftMonitor, DriftPolicy
from agent.drift.reading import DETECTORS, Reading, Scope, publish
from agent.drift.seen import Seen
from agent.drift.sites import site_of
from agent.drift.statistics import DISTANCES, DriftReference, Statistics
from agent.drift.threshold import STRIDE, _quantile, limits
from agent.drift.window import Window
from agent.metrics import Metrics

D, K, S, WINDOW = 64, 10, 20, 64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


BASIS = generator(99)
CENTRE, TEXT_KD = torch.randn(D, generator=BASIS), F.normalize(torch.randn(K, D, generator=BASIS))
AWAY = torch.randn(D, generator=BASIS)


def frames(n, seed, shift=0.0):
    """Unit features about a direction, what a prompt says of them, and styles that move as well."""
    random = generator(seed)
    features_ND = F.normalize(CENTRE + 0.5 * torch.randn(n, D, generator=random) + shift * AWAY)
    logits_NK = 10 * features_ND @ TEXT_KD.T
    styles_NS = torch.randn(n, S, generator=random) + shift
    probabilities_NK = logits_NK.softmax(-1)
    return Seen(
        features_ND, probabilities_NK, probabilities_NK, styles_NS, -logits_NK.logsumexp(-1)
    )


def spread(seen):
    """The same, with features that also scatter more within what they are taken for."""
    wider_BD = torch.randn(seen.features_BD.shape, generator=generator(7))
    features_BD = F.normalize(seen.features_BD + 0.3 * wider_BD)
    return Seen(features_BD, seen.zero_shot_BK, seen.adapted_BK, seen.styles_BS, seen.energies_B)


def reference_of(seen):
    return DriftReference(seen.features_BD, seen.zero_shot_BK, seen.styles_BS, seen.energies_B)


def monitor(reference_frames=256, **policy):
    reference = reference_of(frames(reference_frames, 0)) if reference_frames else None
    return DriftMonitor(
        DriftPolicy(**{"window": WINDOW} | policy), reference, TEXT_KD, generator(1)
    )


def rows(seen, picked):
    parts = (seen.features_BD, seen.zero_shot_BK, seen.adapted_BK, seen.styles_BS, seen.energies_B)
    return Seen(*(part[picked] for part in parts))


def feed(drift, seen, camera="cam", batch=16):
    readings = []
    for start in range(0, len(seen.features_BD), batch):
        part = rows(seen, slice(start, start + batch))
        readings += drift.observe([camera] * len(part.features_BD), part)
    return readings


def of(readings, detector, scope=Scope.CAMERA):
    return [each for each in readings if (each.detector, each.scope) == (detector, scope)]


def began(readings, scope=Scope.CAMERA):
    return {each.detector for each in readings if each.began and each.scope is scope}


# Distances


def test_frechet_is_the_closed_form_for_diagonal_covariances():
    random = np.random.default_rng(0)
    means, deviations = random.normal(size=(2, 6)), random.uniform(0.5, 2, size=(2, 6))
    first, second = (np.diag(each**2) for each in deviations)
    mixed = sqrtm(sqrtm(first) @ second @ sqrtm(first)).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(first + second - 2 * mixed)
    a, b = torch.tensor(np.concatenate([means, means**2 + deviations**2], axis=1))
    assert float(frechet(a, b)) == pytest.approx(expected)
    assert float(frechet(a, a)) == 0


def test_rounding_below_zero_variance_is_no_variance():
    assert float(frechet(torch.tensor([1.0, 0.9999999]), torch.tensor([1.0, 1.0]))) == 0


def test_jensen_shannon_is_scipys_squared():
    p, q = np.random.default_rng(0).dirichlet(np.ones(7), size=2)
    ours = jensen_shannon(torch.tensor(p), torch.tensor(q))
    assert float(ours) == pytest.approx(jensenshannon(p, q, base=2) ** 2)


def test_jensen_shannon_of_what_never_meets_is_one_bit():
    assert float(jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))) == 1


def test_half_is_as_far_as_twice():
    half, one, two = (torch.tensor([value]) for value in (0.5, 1.0, 2.0))
    assert float(squared_log_ratio(half, one)) == pytest.approx(math.log(2) ** 2)
    assert float(squared_log_ratio(two, one)) == pytest.approx(math.log(2) ** 2)


def test_random_features_estimate_the_kernel_distance():
    near, far = frames(200, 1).features_BD, frames(200, 2, shift=0.5).features_BD
    bandwidth = float(torch.pdist(near).median())
    fourier = RandomFourier.of(near, generator())

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / (2 * bandwidth**2)).mean()

    exact = kernel(near, near) + kernel(far, far) - 2 * kernel(near, far)
    ours = squared(fourier(near).mean(0), fourier(far).mean(0))
    assert float(ours) == pytest.approx(float(exact), rel=0.15)


@pytest.mark.parametrize("features", [torch.ones(1, 4), torch.ones(5, 4)])
def test_features_that_are_all_alike_have_a_bandwidth(features):
    assert RandomFourier.of(features, generator())(features).isfinite().all()


# Groups of labels


def test_labels_are_counted_apart_where_frames_suffice():
    assert torch.equal(label_groups(TEXT_KD, K * FRAMES_PER_GROUP), torch.eye(K))


def test_many_labels_are_grouped_by_likeness():
    kinds = F.normalize(torch.randn(4, D, generator=generator(1)))
    labels = F.normalize(kinds.repeat_interleave(25, dim=0) + 0.02 * torch.randn(100, D))
    groups_KG = label_groups(labels, 4 * FRAMES_PER_GROUP)
    assert groups_KG.shape == (100, 4)
    assert (groups_KG.sum(dim=1) == 1).all()
    group = groups_KG.argmax(dim=1).view(4, 25)
    assert (group == group[:, :1]).all()
    assert len(set(group[:, 0].tolist())) == 4


# Windows


def test_a_young_window_is_a_plain_mean_in_whatever_batches():
    vectors = torch.randn(20, 3, generator=generator())
    window = Window(64)
    for part in vectors.split([1, 7, 12]):
        window.take(part)
    assert torch.allclose(window.mean_P, vectors.mean(0), atol=1e-6)
    assert (window.seen, window.is_full) == (20, False)


def test_a_full_window_has_the_variance_of_a_plain_mean():
    vectors = torch.randn(40_000, 1, generator=generator())
    window, means = Window(32), []
    for part in vectors.split(8):
        window.take(part)
        means.append(float(window.mean_P))
    assert np.var(means[20:]) == pytest.approx(1 / 32, rel=0.1)


# Thresholds


@pytest.mark.parametrize(("freedom", "within"), [(1, 0.15), (4, 0.08), (40, 0.03)])
@pytest.mark.parametrize("chance", [1e-2, 1e-5])
def test_rare_values_of_squares_are_known(freedom, within, chance):
    values = torch.randn(200_000, freedom, generator=generator()).square().sum(1).double()
    assert _quantile(values, chance) == pytest.approx(chi2.isf(chance, freedom), rel=within)


def test_what_never_varies_is_its_own_threshold():
    assert _quantile(torch.ones(10, dtype=torch.float64), 1e-6) == 1


@pytest.mark.parametrize("reference_frames", [128, 512])
def test_false_alarms_are_no_more_frequent_than_asked_for(reference_frames):
    """On Gaussian features, over many references: no more than once in half of `every`."""
    every, cameras, length = 2_000, 10, 1_600
    events = dict.fromkeys(DISTANCES, 0)
    for seed in range(cameras):
        drift = DriftMonitor(
            DriftPolicy(WINDOW, every),
            reference_of(frames(reference_frames, 1000 + seed)),
            TEXT_KD,
            generator(seed),
        )
        for reading in feed(drift, frames(length, 2000 + seed), batch=STRIDE):
            if reading.scope is Scope.CAMERA and reading.detector in events:
                events[reading.detector] += reading.began
    expected = cameras * length / every
    assert all(found <= 2 * expected for found in events.values()), events


def test_a_large_calibration_does_not_make_thresholds_tight():
    """Days differ by more than chance; only what a window owes to chance may shrink."""
    small, large = (
        monitor(n)._normal.limits[Scope.CAMERA]["frechet"].threshold for n in (128, 1024)
    )
    assert large == pytest.approx(small, rel=0.3)


def test_one_draw_that_is_far_from_all_others_makes_no_threshold_below_the_usual():
    values = torch.full((4096,), 0.01, dtype=torch.float64)
    values[0] = 1.0
    assert _quantile(values, 1e-6) >= 0.01


def test_rarer_alarms_need_higher_scores_and_longer_windows_lower_ones():
    reference = reference_of(frames(256, 0))
    statistics = Statistics(reference, TEXT_KD, generator())
    vectors = statistics.of(reference.features_ND, reference.probabilities_NK, reference.styles_NS)

    def threshold(window, every):
        found = limits(vectors, statistics.scores, window, every, generator())
        return {name: limit.threshold for name, limit in found.items()}

    usual, rarer, longer = (
        threshold(64, 10_000),
        threshold(64, 10_000_000),
        threshold(512, 10_000),
    )
    assert all(rarer[name] > usual[name] > longer[name] for name in DISTANCES)


# The monitor


def test_every_detector_has_its_series_from_the_first_frame():
    metrics = Metrics(10)
    publish(monitor().observe(["plant/cam"], frames(1, 1)), metrics)
    for detector in DETECTORS[Scope.CAMERA]:
        labels = {"camera": "plant/cam", "detector": detector}
        assert metrics.registry.get_sample_value("tta_drift_events_total", labels) == 0
    for detector in DETECTORS[Scope.SITE]:
        labels = {"site": "plant", "detector": detector}
        assert metrics.registry.get_sample_value("tta_site_drift_events_total", labels) == 0
        assert math.isnan(metrics.registry.get_sample_value("tta_site_drift_score", labels))


def test_a_stationary_stream_begins_nothing():
    readings = feed(monitor(), frames(20 * WINDOW, 1))
    assert began(readings) == began(readings, Scope.SITE) == set()


@pytest.mark.parametrize("detector", DISTANCES)
def test_a_shift_is_told_once(detector):
    drift = monitor()
    feed(drift, frames(320, 1))
    own = of(feed(drift, spread(frames(640, 2, shift=1.0))), detector)
    assert sum(reading.began for reading in own) == 1
    assert own[-1].score > own[-1].threshold


@pytest.mark.parametrize("signal", ["entropy", "energy", "agreement"])
@pytest.mark.parametrize("kind", ["adwin", "page_hinkley"])
def test_a_change_of_what_is_answered_is_told(signal, kind):
    drift = monitor()
    before, after = frames(640, 1), frames(640, 2)
    assert not began(feed(drift, before))
    changed = {
        "entropy": after.adapted_BK.pow(0.3) / after.adapted_BK.pow(0.3).sum(-1, keepdim=True),
        "energy": after.adapted_BK,
        "agreement": after.adapted_BK.roll(1, dims=0),
    }[signal]
    energies = after.energies_B + (5.0 if signal == "energy" else 0.0)
    after = Seen(after.features_BD, after.zero_shot_BK, changed, after.styles_BS, energies)
    assert f"{kind}_{signal}" in began(feed(drift, after))


def test_a_second_drift_is_told_again():
    drift = monitor()
    stages = [frames(640, seed, shift) for seed, shift in enumerate([1.0, 0.0, 1.0], start=1)]
    readings = [reading for stage in stages for reading in feed(drift, stage)]
    assert sum(reading.began for reading in of(readings, "frechet")) == 2


def test_a_score_that_stays_at_the_threshold_is_one_event():
    drift = monitor()
    limit = drift._normal.limits[Scope.CAMERA]["mmd"]
    stream = monitors._Stream(Window(1), {})
    stream.window.take(torch.zeros(1, len(drift._normal.mean_P)))
    told = []
    for factor in (1.1, 0.99, 1.1, 0.0, 1.1):
        score = torch.tensor([factor * limit.threshold])
        drift._normal.statistics.scores = lambda *means, score=score: {"mmd": score}
        told += drift._read(Scope.CAMERA, [("cam", stream)], drift._normal)
    assert [reading.began for reading in told] == [True, False, False, False, True]


def test_a_camera_is_not_judged_before_its_window_is_full():
    readings = feed(monitor(), frames(WINDOW - 1, 1, shift=9.0))
    assert all(math.isnan(r.score) for name in DISTANCES for r in of(readings, name))
    assert not began(readings) & set(DISTANCES)


def test_cameras_are_followed_apart_and_sites_together():
    drift = monitor()
    told = []
    for seed in range(60):
        far, near = frames(8, seed, shift=0.6), frames(8, 100 + seed)
        told += drift.observe(["a/east"] * 8, far) + drift.observe(["b/west"] * 8, near)
    assert {r.name for r in told if r.began and r.scope is Scope.CAMERA} == {"a/east"}
    assert {r.name for r in told if r.began and r.scope is Scope.SITE} == {"a"}


def test_what_all_cameras_of_a_site_share_shows_at_the_site():
    """Each camera sees too few frames for its own window; the site has enough."""
    drift, told = monitor(), []
    for camera in range(40):
        told += drift.observe([f"plant/{camera}"] * 16, frames(16, camera, shift=0.5))
    assert "frechet" in began(told, Scope.SITE)
    assert not began(told) & set(DISTANCES)


@pytest.mark.parametrize(
    ("camera", "site"),
    [
        ("plant-3/gate-north", "plant-3"),
        ("eu/plant/gate", "eu/plant"),
        ("gate", "home"),
        ("/gate", "home"),
        ("", "home"),
        ("plant/", "plant"),
    ],
)
def test_the_site_is_what_stands_before_the_last_slash(camera, site):
    assert site_of(camera, "home") == site


def test_sites_beyond_the_limit_share_a_series():
    metrics = Metrics(2)
    for site in "abcd":
        publish([Reading(Scope.SITE, site, "mmd", 0.5, 0.2, began=True)], metrics)
    events = {
        site: metrics.registry.get_sample_value(
            "tta_site_drift_events_total", {"site": site, "detector": "mmd"}
        )
        for site in ("a", "b", "c", "other")
    }
    assert events == {"a": 1, "b": 1, "c": None, "other": 2}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["features_BD", "zero_shot_BK", "adapted_BK", "styles_BS"])
def test_what_is_not_finite_is_left_out(field, bad):
    drift, clean = monitor(), monitor()
    seen = frames(320, 1)
    dirty = rows(seen, list(range(320)))
    getattr(dirty, field)[::7] = bad
    told = feed(drift, dirty, batch=320)
    expected = feed(clean, rows(seen, [row for row in range(320) if row % 7]), batch=320)
    assert [each.score for each in told] == pytest.approx(
        [each.score for each in expected], nan_ok=True
    )
    assert drift.observe(["cam"], rows(dirty, [0])) == []


def test_a_camera_at_rest_counts_for_little_until_it_has_looked_for_long():
    drift, still = monitor(), rows(frames(1, 3), [0] * 16)
    told = [reading for _ in range(WINDOW - 1) for reading in drift.observe(["cam"] * 16, still)]
    assert all(math.isnan(r.score) for r in of(told, "frechet"))
    told = drift.observe(["cam"] * 32, rows(frames(1, 3), [0] * 32))
    assert "frechet" in began(told)


def test_frames_shown_twice_count_once():
    once, twice = monitor(), monitor()
    seen = frames(200, 3)
    doubled = rows(seen, [row // 2 for row in range(400)])
    first, second = of(feed(once, seen), "mmd"), of(feed(twice, doubled, batch=32), "mmd")
    assert [r.score for r in second] == pytest.approx([r.score for r in first], nan_ok=True)


def test_what_one_camera_shows_is_no_news_of_another():
    drift = monitor()
    assert drift._news.rows(["a", "b", "a"], frames(1, 0).features_BD.expand(3, -1)) == [0, 1]


def test_a_silent_camera_tells_nothing_and_goes_on_where_it_was():
    drift = monitor()
    feed(drift, frames(320, 1), camera="east")
    assert all(reading.name != "east" for reading in feed(drift, frames(320, 2), camera="west"))
    again = of(feed(drift, frames(8, 3), camera="east"), "frechet")
    assert len(again) == 1  # its window is still full
    assert not again[0].began


def test_the_camera_that_was_silent_for_longest_makes_room(monkeypatch):
    monkeypatch.setattr(monitors, "MAX_FOLLOWED", 4)
    drift = monitor()
    for number in range(20):
        drift.observe([f"site-{number}/cam"], frames(1, number))
    assert [list(drift._streams[scope]) for scope in Scope] == [
        [f"site-{number}/cam" for number in range(16, 20)],
        [f"site-{number}" for number in range(16, 20)],
    ]


def test_a_newcomer_crowds_out_no_camera_of_its_batch(monkeypatch):
    monkeypatch.setattr(monitors, "MAX_FOLLOWED", 4)
    drift = monitor()
    for number in range(4):
        drift.observe([f"s{number}/c"], frames(1, number))
    drift.observe(["new/c", "s0/c"], frames(2, 9))
    assert {"new/c", "s0/c"} <= set(drift._streams[Scope.CAMERA])


def test_a_batch_crowds_none_of_its_own_cameras_out():
    cameras = [f"{number}/cam" for number in range(200)]
    assert {r.name for r in monitor().observe(cameras, frames(200, 1))} >= set(cameras)


def test_without_a_reference_the_first_frames_are_normal():
    drift = monitor(reference_frames=0)
    warming = feed(drift, frames(WARM_UP, 0))
    assert warming
    assert all(math.isnan(reading.score) for reading in warming)
    assert not began(feed(drift, frames(320, 1)))
    assert set(DISTANCES) <= began(feed(drift, spread(frames(320, 2, shift=1.0))))


def test_one_seed_one_result():
    first, second = (feed(monitor(), frames(320, 1, shift=0.3)) for _ in range(2))
    assert [each.score for each in first] == pytest.approx(
        [each.score for each in second], abs=0, nan_ok=True
    )
