"""Repair and alignment of a domain, as `continual` uses them."""

from dataclasses import replace

import pytest
import torch

from agent.adapt.continual import Continual, ContinualConfig
from agent.adapt.correction import CorrectionConfig
from agent.adapt.information import Advantage, FalseAdvantage
from agent.adapt.moments import Moments
from agent.adapt.restore import Restoration
from agent.adapt.strategy import Observation, Outcome, entropy
from agent.testing import ARCHITECTURES, pictures, tiny_encoder, tiny_reference, tiny_zero_shot

DIM = 0.8
NONE, EQUALISED = Restoration.NONE, Restoration.EQUALISED


def build(architecture="batch_norm", **config):
    encoder = tiny_encoder(architecture)
    return Continual(
        encoder,
        tiny_zero_shot(encoder),
        reference=tiny_reference(encoder),
        config=ContinualConfig(correction=CorrectionConfig(**config)),
    )


@pytest.fixture(params=ARCHITECTURES)
def strategy(request):
    return build(request.param)


def show(strategy, x, domain=1, admitted=True):
    domains = [domain] * len(x)
    features = strategy.encode(x, domains)
    logits = strategy._zero_shot.logits(features)
    passed = torch.full((len(x),), admitted)
    strategy.step(Observation(x, features, logits, domains, passed))
    return features


def correction_of(strategy, domain=1):
    return strategy._domains[domain].correction


def learn(strategy, rounds=2, first=0):
    """Show pictures until so many galleries were judged."""
    for seed in range(first, first + 40):
        show(strategy, pictures(16, seed) * DIM)
        rounds -= strategy.learn() in (Outcome.ALIGNED, Outcome.DECLINED)
        if not rounds:
            return correction_of(strategy)
    raise AssertionError("no gallery was judged")


def corrected(strategy, how=Restoration.MEDIAN_EQUALISED):
    """Force a correction, whatever the judge thinks of it."""
    state = learn(strategy)
    state.moments.setdefault(how, next(iter(state.moments.values())))
    state.chosen, state.affine, state.unmeasured = how, None, 32
    return state


@pytest.mark.parametrize("normal", Restoration)
def test_the_first_gallery_tries_the_most_normal_repair_and_the_next_alignment_alone(
    strategy, normal, monkeypatch
):
    strangeness = lambda state, how, pixels: float(how is not normal)  # noqa: E731
    monkeypatch.setattr(strategy._corrector, "_strangeness", strangeness)
    assert set(learn(strategy, 1).advantages) == {normal}
    assert set(learn(strategy, 1, first=50).advantages) == {NONE, normal}


def test_darkness_is_repaired_by_what_gives_light_back():
    state = learn(build(), 1)
    strangeness = {
        how: build()._corrector._strangeness(state, how, pictures(16, 9) * 0.3)
        for how in (NONE, EQUALISED)
    }
    assert strangeness[EQUALISED] < strangeness[NONE]


def test_a_correction_is_used_while_it_has_an_advantage_beyond_the_margin(strategy):
    state = learn(strategy)
    choose = strategy._corrector._choose
    state.advantages = {NONE: Advantage(0.03, 1.0), EQUALISED: Advantage(0.5, 1.0)}
    state.moments.setdefault(EQUALISED, state.moments[NONE])
    choose(state)
    assert (state.chosen, state.encoding) == (EQUALISED, 2)
    state.advantages = {NONE: Advantage(0.49, 1.0), EQUALISED: Advantage(0.5, 1.0)}
    choose(state)  # the simpler of two that are as good
    assert state.chosen is NONE
    state.advantages = {NONE: Advantage(0.03, 1.0), EQUALISED: Advantage(-0.5, 1.0)}
    choose(state)
    assert state.chosen is NONE
    state.advantages[NONE] = Advantage(0.01, 1.0)
    choose(state)
    assert (state.chosen, state.encoding) == (None, 0)


def test_what_a_correction_seems_to_gain_on_normal_frames_does_not_count(strategy):
    state = learn(strategy)
    corrector = strategy._corrector
    chance = FalseAdvantage(mean=0.04, deviation=0.03)
    corrector._reference = replace(corrector._reference, false_advantage=chance)
    for mean, galleries, chosen in ((0.11, 1, None), (0.13, 1, NONE), (0.10, 4, NONE)):
        state.advantages = {NONE: Advantage(mean, float(galleries))}
        corrector._choose(state)
        assert state.chosen is chosen


def test_the_plainer_a_verdict_and_the_older_a_domain_the_longer_the_pause(strategy):
    state = learn(strategy, 1)
    corrector = strategy._corrector
    needed = corrector._needed(Advantage(0.0, 1.0))
    for offered, distance, every in (
        (16, 0.0, 1),
        (16, 0.021, 2),
        (16, -0.041, 3),
        (16, 9.0, 8),
        (64, 0.0, 4),
        (64, 0.021, 8),
    ):
        state.offered = offered
        state.advantages = {NONE: Advantage(needed + distance, 1.0)}
        assert corrector._pause(state) == every


def test_however_old_a_domain_is_galleries_go_on(strategy):
    state = learn(strategy, 1)
    state.offered = 10**9
    assert strategy._corrector._pause(state) == 512


def broken(moments):
    wrong = {name: tensor * float("nan") for name, tensor in moments.tensors().items()}
    return Moments(**wrong, count=16)


def test_a_correction_that_broke_features_is_not_chosen_again_untried(strategy):
    state = corrected(strategy, EQUALISED)
    state.advantages = {EQUALISED: Advantage(0.9, 1.0)}
    state.moments = {EQUALISED: broken(state.moments[EQUALISED])}
    show(strategy, pictures(4, 3))
    assert (state.chosen, state.advantages, state.moments) == (None, {}, {})
    state.every = 1
    learn(strategy, 1, first=50)
    assert state.chosen in {*state.moments, None}


def test_a_gallery_that_breaks_leaves_nothing_to_choose(strategy, monkeypatch):
    state = corrected(strategy, NONE)
    state.advantages, state.every = {NONE: Advantage(0.9, 1.0)}, 1
    monkeypatch.setattr("agent.adapt.correction._is_finite", lambda moments: False)
    for seed in range(70, 100):
        show(strategy, pictures(4, seed) * DIM)
        if strategy.learn() is Outcome.NON_FINITE:
            break
    assert state.chosen is None
    assert NONE not in {**state.advantages, **state.moments}


def test_a_domain_that_nothing_is_known_of_is_judged_before_one_that_goes_on():
    strategy = build()
    corrected(strategy, NONE)
    strategy.begin(2, 1)
    for seed in range(200, 220):
        x = pictures(16, seed) * DIM
        for domain in (2, 3):
            show(strategy, x, domain)
    strategy.learn(thrifty=True)
    assert (correction_of(strategy, 2).rounds, correction_of(strategy, 3).rounds) == (0, 1)


def answered(strategy, vagueness, frames=16, seed=0):
    """Show new pictures that are answered as surely as is said, in nats."""
    x = pictures(frames, seed) * DIM
    sure = torch.linspace(0.0, 30.0, 3000)
    logits = torch.stack([sure, *[torch.zeros_like(sure)] * 3], dim=1)
    row = (entropy(logits.softmax(-1)) - vagueness).abs().argmin()
    noise = 0.05 * torch.randn(frames, 4, generator=torch.Generator().manual_seed(seed))
    features = strategy.encode(x, [1] * frames)
    passed = torch.ones(frames, dtype=torch.bool)
    strategy.step(Observation(x, features, logits[row] + noise, [1] * frames, passed))


def test_when_answers_are_no_longer_as_sure_a_correction_is_judged_anew(strategy):
    state = corrected(strategy, NONE)
    state.unmeasured = 0
    for seed in range(8):
        answered(strategy, 0.3, seed=seed)
    assert (state.rounds, state.unmeasured) == (2, 0)
    for seed in range(8, 12):
        answered(strategy, 0.9, seed=seed)
    assert (state.rounds, state.chosen) == (0, NONE)  # and goes on meanwhile
    assert state.moments[NONE].count <= 16 + 4 * 16
    assert not state.advantages


def test_a_change_of_a_known_domain_begins_with_its_correction(strategy):
    corrected(strategy, NONE)
    x = pictures(4, 3) * DIM
    strategy.begin(2, 1)
    assert torch.equal(strategy.encode(x, [2] * 4), strategy.encode(x, [1] * 4))
    state = correction_of(strategy, 2)
    assert (state.rounds, state.moments[NONE].count) == (0, 16)
    for seed in range(60, 80):
        show(strategy, pictures(16, seed) * DIM, domain=2)
        strategy.learn()
    assert state.rounds >= 1
    assert NONE in state.advantages


@pytest.mark.parametrize("kin", [None, 7, 1])
def test_without_kin_a_domain_begins_with_nothing(strategy, kin):
    corrected(strategy, NONE)
    strategy.begin(1, kin)  # 7 is not known, and 1 is what it was itself
    assert strategy.encoding(1) == 0


def test_what_can_wait_is_left_while_thrifty():
    strategy = build(patience=0.1)
    for seed in range(10):
        show(strategy, pictures(16, seed) * DIM)
    assert strategy.learn(thrifty=True) in (Outcome.ALIGNED, Outcome.DECLINED)
    for seed in range(10, 20):
        show(strategy, pictures(16, seed) * DIM)
    assert strategy.learn(thrifty=True) is None
    assert strategy.learn() in (Outcome.ALIGNED, Outcome.DECLINED)


def test_a_correction_brings_features_back(strategy):
    x = pictures(16, 99)
    plain = show(strategy, x, domain=0)
    corrected(strategy, EQUALISED)
    before = torch.cosine_similarity(strategy._encoder.encode_image(x * DIM), plain).mean()
    after = torch.cosine_similarity(strategy.encode(x * DIM, [1] * 16), plain).mean()
    assert after > before


def test_each_frame_of_a_batch_gets_its_own_domains_correction(strategy):
    corrected(strategy)
    x = pictures(6, 3) * DIM
    mixed = strategy.encode(x, [0, 1, 5, 1, 0, 1])
    for row, domain in enumerate([0, 1, 5, 1, 0, 1]):
        alone = strategy.encode(x[row : row + 1], [domain])[0]
        assert torch.allclose(mixed[row], alone, atol=1e-4)


def test_answering_measures_a_young_domain(strategy):
    state = corrected(strategy, NONE)
    before = state.moments[NONE]
    show(strategy, pictures(16, 77) * DIM)
    after = state.moments[NONE]
    assert after.count == before.count + 16
    assert not torch.equal(after.mean, before.mean)
    version = strategy.version(1)
    show(strategy, pictures(16, 78) * DIM)
    assert strategy.version(1) == version + 1


def test_frames_that_come_one_by_one_are_measured_on_galleries():
    strategy = build(patience=0.1, margin=-1.0)
    state = learn(strategy, 1)
    how, seed = state.chosen, 0
    known = state.moments[how]
    while state.rounds < 2:
        show(strategy, pictures(2, 500 + seed) * DIM)
        assert state.moments[how] is known
        strategy.learn()
        seed += 1
    assert state.moments[how].count == known.count + 16


def test_a_domain_that_was_measured_well_is_no_longer_measured():
    strategy = build(measured=32)
    state = corrected(strategy, NONE)
    for seed in range(70, 72):
        show(strategy, pictures(16, seed) * DIM)
    settled = state.moments[NONE]
    show(strategy, pictures(16, 72) * DIM)
    assert state.moments[NONE] is settled


@pytest.mark.parametrize("admitted", [True, False])
def test_only_new_frames_that_were_admitted_are_learned_from(admitted):
    strategy = build()
    state = corrected(strategy, NONE)
    known = state.moments[NONE]
    x = pictures(16, 70) * DIM
    show(strategy, x, admitted=admitted)
    assert (state.moments[NONE].count > known.count) == admitted
    known = state.moments[NONE]
    show(strategy, x[-1:].expand(16, -1, -1, -1), admitted=admitted)  # a camera at rest
    assert state.moments[NONE].count <= known.count + 1


def test_frames_of_a_batch_are_aligned_by_what_they_share_with_the_domain():
    strategy = build()
    state = corrected(strategy, NONE)
    x = pictures(16, 70) * DIM
    alignment = strategy._corrector._alignment
    with alignment.measured(state.moments[NONE]):
        expected = strategy._encoder.encode_image(x)
    assert torch.equal(strategy.encode(x, [1] * 16), expected)
    with alignment.applied(alignment.affine(state.moments[NONE])):
        expected = strategy._encoder.encode_image(x[:4])
    assert torch.equal(strategy.encode(x[:4], [1] * 4), expected)


def test_a_correction_survives_a_snapshot(strategy):
    state = corrected(strategy)
    x = pictures(4, 3) * DIM
    before = strategy.encode(x, [1] * 4)
    kept = strategy.state_dict()
    strategy.reset()
    strategy.load_state_dict(kept)
    assert correction_of(strategy).chosen == state.chosen
    assert torch.equal(strategy.encode(x, [1] * 4), before)


@pytest.mark.parametrize("lost", ["spectrum.1.count", "moments.3.count", "counters"])
def test_a_snapshot_that_lacks_a_part_is_refused(strategy, lost):
    corrected(strategy)
    kept = strategy.state_dict()
    del kept[f"1/correction.{lost}"]
    with pytest.raises((KeyError, RuntimeError)):
        strategy.load_state_dict(kept)


def test_a_correction_that_breaks_features_is_withdrawn(strategy):
    state = corrected(strategy, NONE)
    state.moments[NONE] = broken(state.moments[NONE])
    x = pictures(4, 3)
    assert torch.equal(strategy.encode(x, [1] * 4), strategy.encode(x, [0] * 4))
    assert state.chosen is None


def test_without_a_reference_nothing_is_corrected():
    encoder = tiny_encoder()
    strategy = Continual(encoder, tiny_zero_shot(encoder))
    for seed in range(8):
        show(strategy, pictures(16, seed) * DIM)
        strategy.learn()
    assert strategy.encoding(1) == 0


def test_a_reference_follows_the_model_to_its_device():
    elsewhere = tiny_reference(tiny_encoder()).to(torch.device("meta"))
    moved = [*elsewhere.moments.tensors().values(), elsewhere.spectrum.energy_OA]
    assert {tensor.device.type for tensor in [*moved, elsewhere.style.mean]} == {"meta"}


def test_without_a_margin_the_best_is_used_even_if_it_is_worse_than_nothing():
    strategy = build(margin=-float("inf"))
    state = learn(strategy)
    state.advantages = {NONE: Advantage(-0.9, 1.0), EQUALISED: Advantage(-0.5, 1.0)}
    state.moments.setdefault(EQUALISED, state.moments[NONE])
    strategy._corrector._choose(state)
    assert state.chosen is EQUALISED


@pytest.mark.parametrize("key", ["0/theta", "x/theta"])
def test_a_snapshot_of_a_domain_that_cannot_be_is_refused(strategy, key):
    learn(strategy)
    kept = strategy.state_dict()
    with pytest.raises((KeyError, RuntimeError)):
        strategy.load_state_dict(kept | {key: kept["1/theta"]})


def test_a_gallery_of_few_labels_is_thinned_and_filled_from_further_apart(strategy, monkeypatch):
    monkeypatch.setattr(strategy._corrector, "_is_narrow", lambda features_BD: True)
    frames = 0
    for seed in range(40):
        show(strategy, pictures(16, seed) * DIM)
        frames += 16
        if strategy.learn() in (Outcome.ALIGNED, Outcome.DECLINED):
            break
    # 16, then 8 more of every 2nd, and of every 4th.
    assert frames == 16 + 8 * (2 + 4)
    assert correction_of(strategy).rounds == 1
    assert correction_of(strategy).thinned == 0


def test_a_gallery_of_few_labels_counts_for_surer_answers_only(strategy, monkeypatch):
    corrector = strategy._corrector
    monkeypatch.setattr(corrector, "_is_narrow", lambda features_BD: True)
    monkeypatch.setattr(corrector, "_likely", lambda state, pixels: NONE)
    for usual, vagueness, chosen in ((0.6, 0.9, None), (0.6, 0.4, NONE), (0.4, 0.9, NONE)):
        strategy.reset()
        corrector._reference = replace(corrector._reference, vagueness=usual)
        says = iter([(0.1, 0.5)] + 2 * [(1.0, vagueness)])
        monkeypatch.setattr(corrector, "_says", lambda features_BD, says=says: next(says))
        assert learn(strategy, 1).chosen is chosen


def test_narrow_is_what_shows_far_fewer_labels_than_normal(strategy):
    corrector = strategy._corrector
    text_KD = strategy._zero_shot.text_KD
    assert corrector._is_narrow(text_KD[[1] * 16])
    assert not corrector._is_narrow(text_KD[[0, 1, 2, 3] * 4])


def test_a_snapshot_amid_thinning_begins_a_gallery_anew(strategy):
    state = learn(strategy, 1)
    state.thinned = 2
    restored = strategy._corrector.domain()
    restored.load(state.state())
    assert restored.thinned == 0
