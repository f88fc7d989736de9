import math

import pytest
import torch

from agent.adapt.domains import SOURCE
from agent.score.novelty import Normal
from agent.score.threshold import PRIOR, WARM_UP, WINDOW, Thresholds

NIGHT = 1


def normal(n, seed, mean=-20.0):
    return mean + torch.randn(n, generator=torch.Generator().manual_seed(seed))


def adapted(*batches):
    """Thresholds with a reference of 500 normal frames that then saw batches of a night."""
    thresholds = Thresholds(0.05, Normal.of(normal(500, 0)))
    for batch in batches:
        thresholds.observe([NIGHT] * len(batch), batch)
    return thresholds


@pytest.mark.parametrize(
    ("n", "rate", "rank"),
    [
        (99, 0.05, 95),  # (99 + 1) · 0.95 = 95
        (100, 0.05, 96),  # 101 · 0.95 = 95.95
        (9, 0.5, 5),
        (9, 0.1, 9),
        (5, 0.05, 5),  # 5.7 is beyond the largest
    ],
)
def test_the_threshold_is_the_split_conformal_rank(n, rate, rank):
    scores = torch.arange(1.0, n + 1).flip(0)
    assert Normal.of(scores).threshold(rate) == rank


def test_normal_frames_are_flagged_at_the_rate_that_was_asked_for():
    rates = []
    for seed in range(50):
        threshold = Normal.of(normal(200, seed)).threshold(0.1)
        rates.append(float((normal(500, 1000 + seed) > threshold).float().mean()))
    assert sum(rates) / len(rates) == pytest.approx(0.1, abs=0.01)


def test_the_source_threshold_is_fixed():
    thresholds = Thresholds(0.05, Normal.of(normal(500, 0)))
    before = thresholds.of(SOURCE)
    thresholds.observe([SOURCE] * 300, normal(300, 1, mean=-5))
    assert thresholds.of(SOURCE) == before == thresholds.of(NIGHT)


def test_a_shifted_domain_moves_its_threshold_along():
    thresholds = adapted(normal(WINDOW, 1, mean=-14))
    expected = 6 * WINDOW / (WINDOW + PRIOR)
    assert thresholds.of(NIGHT) - thresholds.of(SOURCE) == pytest.approx(expected, abs=0.3)
    assert float((normal(1000, 2, -14) > thresholds.of(NIGHT)).float().mean()) < 0.12


def test_a_single_frame_hardly_moves_it():
    thresholds = adapted(torch.tensor([-11.0]))
    assert thresholds.of(NIGHT) - thresholds.of(SOURCE) == pytest.approx(9 / (1 + PRIOR), abs=0.1)


def test_a_burst_of_unknown_frames_does_not_drag_it():
    thresholds = adapted(normal(200, 1, mean=-14))
    before = thresholds.of(NIGHT)
    burst = normal(60, 2, mean=0)
    thresholds.observe([NIGHT] * 60, burst)
    assert thresholds.of(NIGHT) - before < 1.5  # a tenth of the way to the strangers
    assert (burst > thresholds.of(NIGHT)).all()


def test_a_few_frames_that_are_alike_do_not_narrow_it():
    alike = torch.full((4,), -20.0)
    thresholds = adapted(alike)
    width = thresholds.of(SOURCE) + 20
    assert thresholds.of(NIGHT) + 20 > 0.8 * width


def test_scores_are_told_in_deviations_of_normal_frames():
    thresholds = Thresholds(0.05, Normal.of(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])))
    assert thresholds.standard(5.0) == 2.0
    assert math.isnan(Thresholds(0.05).standard(5.0))


def test_where_the_tail_is_shorter_the_domain_has_its_own_quantile():
    flat = -14 + torch.rand(WINDOW, generator=torch.Generator().manual_seed(3))
    assert float((flat > adapted(flat).of(NIGHT)).float().mean()) == pytest.approx(0.05, abs=0.01)


def test_unknown_frames_do_not_make_the_quantile_count():
    night = normal(600, 1, mean=-14)
    clean, mixed = adapted(night), adapted(night, normal(150, 2, mean=0))
    assert clean.of(NIGHT) - 0.3 < mixed.of(NIGHT) < clean.of(NIGHT) + 1.5


def test_domains_do_not_mix():
    thresholds = adapted(normal(100, 1, mean=-10))
    assert thresholds.of(2) == thresholds.of(SOURCE)


def test_what_is_forgotten_starts_anew():
    thresholds = adapted(normal(100, 1, mean=-10))
    thresholds.forget(NIGHT)
    thresholds.forget(99)
    assert thresholds.of(NIGHT) == thresholds.of(SOURCE)


def test_without_calibration_a_camera_at_rest_sets_nothing():
    thresholds = Thresholds(0.05)
    thresholds.observe([SOURCE] * 500, torch.full((500,), -20.0))
    assert thresholds.of(SOURCE) == math.inf


def test_without_calibration_the_source_follows_its_frames():
    thresholds = Thresholds(0.05)
    thresholds.observe([SOURCE] * WARM_UP, -20 + 0.01 * normal(WARM_UP, 0, mean=0))
    varied = normal(WINDOW, 1)
    thresholds.observe([SOURCE] * WINDOW, varied)
    assert float((varied > thresholds.of(SOURCE)).float().mean()) < 0.1


def test_without_calibration_the_first_frames_set_it():
    thresholds = Thresholds(0.05)
    thresholds.observe([SOURCE] * (WARM_UP - 1), normal(WARM_UP - 1, 0))
    assert thresholds.of(SOURCE) == math.inf
    thresholds.observe([SOURCE], normal(1, 1))
    both = torch.cat([normal(WARM_UP - 1, 0), normal(1, 1)])
    assert thresholds.of(SOURCE) == Normal.of(both).threshold(0.05)
