import pytest

from agent.adapt.budget import BURST_S, Budget
from agent.testing import FakeClock


def spend(budget, clock, seconds):
    with budget.spending():
        clock.advance(seconds)


def test_it_starts_with_a_full_purse_and_then_stops():
    clock = FakeClock()
    budget = Budget(0.1, clock)
    spend(budget, clock, BURST_S - 1)
    assert budget.allows
    spend(budget, clock, 2)
    assert not budget.allows


def test_inference_earns_its_share():
    clock = FakeClock()
    budget = Budget(0.1, clock)
    spend(budget, clock, BURST_S + 1)
    budget.earn(9.9)
    assert not budget.allows
    budget.earn(0.2)
    assert budget.allows


def test_no_more_than_the_burst_is_saved():
    clock = FakeClock()
    budget = Budget(0.5, clock)
    budget.earn(1000)
    spend(budget, clock, BURST_S)
    assert not budget.allows


def test_over_a_long_run_the_share_is_kept():
    clock = FakeClock()
    budget = Budget(0.1, clock)
    for _ in range(20_000):
        budget.earn(1.0)
        if budget.allows:
            spend(budget, clock, 0.7)
    assert budget.used == pytest.approx(0.1, abs=BURST_S / 20_000 + 1e-3)


def test_a_share_of_zero_allows_nothing():
    budget = Budget(0.0, FakeClock())
    budget.earn(1000)
    assert not budget.allows


def test_used_is_adaptation_over_inference():
    clock = FakeClock()
    budget = Budget(0.1, clock)
    assert budget.used == 0.0
    spend(budget, clock, 3)
    budget.earn(12)
    assert budget.used == pytest.approx(0.25)


def test_what_can_wait_waits_while_less_than_half_a_purse_is_left():
    clock = FakeClock()
    budget = Budget(0.1, clock)
    spend(budget, clock, BURST_S / 2 - 1)
    assert budget.is_ample
    spend(budget, clock, 1)
    assert budget.allows
    assert not budget.is_ample


def test_what_fails_was_spent_too():
    clock = FakeClock()
    budget = Budget(0.1, clock)
    with pytest.raises(RuntimeError), budget.spending():
        clock.advance(BURST_S)
        raise RuntimeError
    assert not budget.allows
