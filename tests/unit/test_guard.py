import pytest
import torch
import torch.nn.functional as F

from agent.adapt.guard import Guard, GuardConfig, Reason

K = 4


def probabilities(labels):
    """Rows that are sure of their label."""
    return F.one_hot(torch.tensor(labels), K) * 0.96 + 0.01


def watched(adapted, frozen, batches=40, domain=1):
    guard = Guard(GuardConfig())
    for _ in range(batches):
        guard.observe([domain] * len(adapted), probabilities(adapted), probabilities(frozen))
    return guard


def test_agreeing_predictions_are_left_alone():
    guard = watched([0, 1, 2, 3], [0, 1, 2, 3])
    assert guard.verdict(1, distance=0.1) is None
    assert guard.agreement(1) == 1.0


def test_one_label_for_everything_is_a_collapse():
    assert watched([0, 0, 0, 0], [0, 0, 1, 2], 200).verdict(1, 0.0) is Reason.COLLAPSE


def test_one_label_is_no_collapse_where_frozen_says_so_too():
    assert watched([2, 2, 2, 2], [2, 2, 2, 2]).verdict(1, 0.0) is None


def test_other_labels_than_frozen_are_a_disagreement():
    guard = watched([1, 2, 3, 0], [0, 1, 2, 3])
    assert guard.verdict(1, 0.0) is Reason.DISAGREEMENT
    assert guard.agreement(1) < 0.5


def test_distance_is_judged_beyond_its_bound():
    guard = watched([0, 1, 2, 3], [0, 1, 2, 3])
    assert guard.verdict(1, 1.0) is None
    assert guard.verdict(1, 1.01) is Reason.DISTANCE


def test_nothing_is_judged_before_the_horizon():
    guard = watched([1, 2, 3, 0], [0, 1, 2, 3], batches=15)  # 60 frames of 64
    assert guard.verdict(1, 9.0) is None
    assert guard.verdict(2, 9.0) is None


def test_agreement_fades_with_the_horizon():
    guard = Guard(GuardConfig(frames=64))
    guard.observe([1] * 64, probabilities([0] * 64), probabilities([1] * 64))
    assert guard.agreement(1) == pytest.approx((1 - 1 / 64) ** 64)


def test_frames_count_the_same_in_one_batch_or_in_many():
    one, many = Guard(GuardConfig()), Guard(GuardConfig())
    one.observe([1] * 32, probabilities([0] * 32), probabilities([1] * 32))
    for _ in range(32):
        many.observe([1], probabilities([0]), probabilities([1]))
    assert one.agreement(1) == pytest.approx(many.agreement(1))


def test_domains_are_judged_apart():
    guard = Guard(GuardConfig())
    for _ in range(100):
        guard.observe([1, 2], probabilities([0, 1]), probabilities([0, 0]))
    assert (guard.agreement(1), guard.agreement(3)) == (1.0, 1.0)
    assert guard.verdict(1, 0.0) is None
    assert guard.verdict(2, 0.0) is Reason.DISAGREEMENT


def test_after_a_reset_everything_is_new():
    guard = watched([1, 2, 3, 0], [0, 1, 2, 3])
    guard.forget(1)
    assert guard.verdict(1, 9.0) is None
    assert guard.agreement(1) == 1.0
