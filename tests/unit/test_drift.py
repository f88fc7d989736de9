import math

import pytest
import torch
import torch.nn.functional as F

from agent.score.drift import (
    WARM_UP,
    DriftMonitor,
    DriftReference,
    Summary,
    frechet,
    jensen_shannon,
)

D, K, WINDOW = 64, 10, 64


def frames(n, seed, shift=0.0):
    """Unit features scattered about a direction, and what a linear head says of them."""
    basis = torch.Generator().manual_seed(99)
    centre, head = torch.randn(D, generator=basis), torch.randn(D, K, generator=basis)
    away = torch.randn(D, generator=basis)
    noise = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    features = F.normalize(centre + 0.5 * noise + shift * away, dim=-1)
    return features, (2 * features @ head).softmax(dim=-1)


def monitor(reference_frames=256, window=WINDOW):
    return DriftMonitor(window, DriftReference(*frames(reference_frames, 0)))


def summary(mean, square, labels=(0.5, 0.5)):
    return Summary(torch.tensor(mean), torch.tensor(square), torch.tensor(labels))


def feed(monitor, features, probabilities, camera="cam"):
    found = monitor.observe([camera] * len(features), features, probabilities)
    return [reading for _, reading in found]


def test_frechet_by_hand():
    a = summary([0.0, 0.0], [1.0, 4.0])  # deviations 1, 2
    b = summary([3.0, 4.0], [9.0 + 4.0, 16.0 + 4.0])  # deviations 2, 2
    assert frechet(a, b) == pytest.approx(9 + 16 + 1)
    assert frechet(a, a) == 0


def test_rounding_below_zero_variance_is_no_variance():
    assert summary([1.0], [0.9999999]).deviation_D.tolist() == [0.0]


@pytest.mark.parametrize(
    ("p", "q", "bits"),
    [
        ((1.0, 0.0), (0.0, 1.0), 1.0),
        ((0.5, 0.5), (0.5, 0.5), 0.0),
        # ½·log2(1/¾) + ½·(½·log2(½/¾) + ½·log2(½/¼))
        ((1.0, 0.0), (0.5, 0.5), 0.5 * math.log2(4 / 3) + 0.25 * math.log2(2 / 3) + 0.25),
    ],
)
def test_jensen_shannon_by_hand(p, q, bits):
    assert jensen_shannon(torch.tensor(p), torch.tensor(q)) == pytest.approx(bits, abs=1e-6)
    assert jensen_shannon(torch.tensor(q), torch.tensor(p)) == pytest.approx(bits, abs=1e-6)


def test_a_summary_moves_as_a_running_mean():
    features, probabilities = frames(10, 1)
    running = Summary(features[0], features[0].square(), probabilities[0])
    for n in range(1, 10):
        frame = Summary(features[n], features[n].square(), probabilities[n])
        running = running.moved(frame, 1 / (n + 1))
    assert frechet(running, Summary.of(features, probabilities)) < 1e-9


@pytest.mark.parametrize("reference_frames", [64, 256, 1024])
@pytest.mark.parametrize("window", [64, 256])
def test_a_stationary_stream_gives_few_readings_above(reference_frames, window):
    readings = feed(monitor(reference_frames, window), *frames(8 * window, 1))
    above = [reading for reading in readings if reading.score > reading.threshold]
    assert len(readings) >= 50
    assert len(above) <= 0.05 * len(readings)


@pytest.mark.parametrize("detector", DriftMonitor.DETECTORS)
def test_a_shifted_stream_crosses_once(detector):
    drift = monitor()
    readings = feed(drift, *frames(256, 1)) + feed(drift, *frames(512, 2, shift=1.0))
    own = [reading for reading in readings if reading.detector == detector]
    assert sum(reading.crossed for reading in own) == 1
    assert own[-1].score > own[-1].threshold


def test_a_second_drift_crosses_again():
    drift = monitor()
    stages = [frames(512, seed, shift) for seed, shift in enumerate([1.0, 0.0, 1.0], start=1)]
    readings = [reading for stage in stages for reading in feed(drift, *stage)]
    assert sum(r.crossed for r in readings if r.detector == "frechet") == 2


def test_a_camera_is_not_judged_before_its_window_is_full():
    assert feed(monitor(), *frames(WINDOW - 1, 1, shift=9.0)) == []


def test_cameras_are_followed_apart():
    drift = monitor()
    feed(drift, *frames(512, 1, shift=1.0), camera="east")
    west = feed(drift, *frames(128, 2), camera="west")
    assert west
    assert all(reading.score <= reading.threshold for reading in west)


def test_without_a_reference_the_first_frames_are_normal():
    drift = DriftMonitor(WINDOW, None)
    assert feed(drift, *frames(WARM_UP, 0)) == []
    readings = feed(drift, *frames(512, 1)) + feed(drift, *frames(512, 2, shift=1.0))
    assert sum(r.crossed for r in readings if r.detector == "frechet") == 1
