"""What is particular to `continual`; what it shares with others is in the contract tests."""

import pytest
import torch

from agent.adapt.alignment import Moments
from agent.adapt.continual import PLAIN, Continual, Correction
from agent.adapt.restore import Restoration
from agent.adapt.strategy import Observation, Outcome
from agent.testing import pictures, tiny_encoder, tiny_reference, tiny_zero_shot

DIM = 0.8


@pytest.fixture(params=["batch_norm", "layer_norm"])
def strategy(request):
    encoder = tiny_encoder(request.param)
    return Continual(encoder, tiny_zero_shot(encoder), reference=tiny_reference(encoder))


def show(strategy, x, domain=1):
    domains = [domain] * len(x)
    features = strategy.encode(x, domains)
    logits = strategy._zero_shot.logits(features)
    admitted = torch.ones(len(x), dtype=torch.bool)
    strategy.step(Observation(x, features, logits, domains, admitted))
    return features


def learn(strategy, rounds=2, first=0):
    """Show pictures until so many galleries were judged."""
    for seed in range(first, first + 40):
        show(strategy, pictures(16, seed) * DIM)
        rounds -= strategy.learn() in (Outcome.ALIGNED, Outcome.DECLINED)
        if not rounds:
            return


def corrected(strategy, restoration=Restoration.MEDIAN_EQUALISED, aligned=True):
    """Force a correction, whatever the judge thinks of it."""
    learn(strategy)
    state = strategy._domains[1]
    state.moments.setdefault(restoration, next(iter(state.moments.values())))
    state.correction = Correction(restoration, aligned)
    state.affine = strategy._affine(state, state.correction)
    return state


def test_the_first_gallery_tries_repairs_and_the_second_alignment(strategy):
    learn(strategy, 1)
    tried = set(strategy._domains[1].advantages)
    assert {c.restoration for c in tried} >= {Restoration.NONE, Restoration.EQUALISED}
    assert not any(correction.aligned for correction in tried)
    learn(strategy, 1, first=50)
    assert sum(correction.aligned for correction in strategy._domains[1].advantages) == 1


def test_a_correction_brings_features_back(strategy):
    x = pictures(16, 99)
    plain = show(strategy, x, domain=0)
    corrected(strategy, Restoration.EQUALISED, aligned=False)
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


def test_a_correction_survives_a_snapshot(strategy):
    state = corrected(strategy)
    x = pictures(4, 3) * DIM
    before = strategy.encode(x, [1] * 4)
    kept = strategy.state_dict()
    strategy.reset()
    strategy.load_state_dict(kept)
    assert strategy._domains[1].correction == state.correction
    assert torch.equal(strategy.encode(x, [1] * 4), before)


@pytest.mark.parametrize("lost", ["1/spectrum.1.count", "1/moments.3.count", "1/counters"])
def test_a_snapshot_that_lacks_a_part_is_refused(strategy, lost):
    corrected(strategy)
    kept = strategy.state_dict()
    del kept[lost]
    with pytest.raises((KeyError, RuntimeError)):
        strategy.load_state_dict(kept)


def test_a_correction_that_breaks_features_is_withdrawn(strategy):
    state = corrected(strategy, Restoration.NONE)
    broken = {
        name: t * float("nan") for name, t in state.moments[Restoration.NONE].tensors().items()
    }
    state.moments[Restoration.NONE] = Moments(**broken, count=16)
    state.affine = strategy._affine(state, state.correction)
    x = pictures(4, 3)
    assert torch.equal(strategy.encode(x, [1] * 4), strategy.encode(x, [0] * 4))
    assert state.correction == PLAIN


def test_without_a_reference_nothing_is_corrected():
    encoder = tiny_encoder()
    strategy = Continual(encoder, tiny_zero_shot(encoder))
    learn(strategy)
    assert strategy.encoding(1) == 0


def test_a_reference_follows_the_model_to_its_device():
    elsewhere = tiny_reference(tiny_encoder()).to(torch.device("meta"))
    moved = [*elsewhere.moments.tensors().values(), elsewhere.spectrum.energy_OA]
    assert {tensor.device.type for tensor in moved} == {"meta"}
