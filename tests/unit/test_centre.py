import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from agent.adapt.centre import CentreConfig, Centring
from agent.adapt.continual import Continual
from agent.adapt.information import usual_variety
from agent.adapt.reference import Centre
from agent.adapt.strategy import Observation, ZeroShot
from agent.testing import pictures, tiny_encoder, tiny_reference, tiny_zero_shot

K, D = 8, 32
TEXT = F.normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(1)), dim=-1)
ZERO_SHOT = ZeroShot(tuple("abcdefgh"), TEXT[None], scale=20.0)
#: Leads to the first label, wherever one is.
SHIFT = 0.9 * TEXT[0]


def features(n, seed, labels=range(K), shift=0.0):
    """Unit features scattered about the labels' text features, all moved alike."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.tensor(list(labels))[torch.randint(len(list(labels)), (n,), generator=random)]
    scattered = TEXT[truth] + 0.1 * torch.randn(n, D, generator=random)
    return F.normalize(scattered + shift, dim=-1), truth


def normal():
    features_ND, labels = features(256, seed=0)
    centre = Centre(features_ND.mean(dim=0), len(features_ND))
    reference = tiny_reference(tiny_encoder())
    return replace(reference, centre=centre, variety=usual_variety(labels.tolist()))


def centring(**config):
    return Centring(ZERO_SHOT, normal(), CentreConfig(**config))


def show(centring, state, features_BD, novel=True):
    flags = [True] * len(features_BD)
    return centring.learn(
        state, features_BD, ZERO_SHOT.logits(features_BD), flags, [novel] * len(flags)
    )


def accuracy(centring, state, features_BD, truth):
    answers = ZERO_SHOT.logits(centring.centred(state, features_BD)).argmax(dim=-1)
    return float((answers == truth).float().mean())


def test_a_common_shift_is_taken_away():
    one = centring()
    state = one.domain()
    seen, truth = features(256, seed=2, shift=SHIFT)
    before = accuracy(one, state, seen, truth)
    assert show(one, state, seen)
    assert before < 0.9
    assert accuracy(one, state, seen, truth) > 0.95


def test_normal_features_are_left_alone():
    one = centring()
    state = one.domain()
    seen, _ = features(256, seed=2)
    assert not show(one, state, seen)
    assert torch.equal(one.centred(state, seen), seen)


@pytest.mark.parametrize("labels", [[3], [3, 5]])
def test_what_few_things_have_in_common_is_no_shift(labels):
    one = centring()
    state = one.domain()
    seen, truth = features(256, seed=2, labels=labels, shift=0.3 * SHIFT)
    assert not show(one, state, seen)
    assert accuracy(one, state, seen, truth) > 0.95


def test_centring_one_thing_would_ruin_it():
    one = centring()
    state = one.domain()
    seen, truth = features(256, seed=2, labels=[3])
    show(one, state, seen)
    state.pays = True  # which the rule refuses
    assert accuracy(one, state, seen, truth) < 0.2


def test_nothing_is_done_before_enough_was_seen():
    one = centring(least=64)
    state = one.domain()
    seen, _ = features(96, seed=2, shift=SHIFT)
    assert not show(one, state, seen[:48])
    assert show(one, state, seen[48:])


def test_frames_that_are_nothing_new_do_not_move_the_mean():
    one = centring()
    state = one.domain()
    show(one, state, features(64, seed=2)[0], novel=False)
    assert state.frames == 0
    assert state.windows == 4


def test_batches_of_one_come_to_the_same():
    one = centring()
    whole, single = one.domain(), one.domain()
    seen, _ = features(128, seed=2, shift=SHIFT)
    show(one, whole, seen)
    for row in range(len(seen)):
        show(one, single, seen[row : row + 1])
    assert torch.allclose(whole.mean_D, single.mean_D, atol=1e-5)
    assert whole.pays and single.pays


def test_a_few_frames_are_centred_less_than_chance_would_have_it():
    one = centring(least=1, margin=-math.inf, narrow=0.0)
    state = one.domain()
    seen, _ = features(16, seed=2)
    show(one, state, seen)
    state.pays = True
    moved = (one.centred(state, seen) - seen).norm(dim=-1).mean()
    assert moved < 0.5 * (state.mean_D - normal().centre.mean_D).norm()


def test_without_a_calibration_nothing_is_centred():
    one = Centring(ZERO_SHOT, None, CentreConfig())
    state = one.domain()
    seen, _ = features(256, seed=2, shift=SHIFT)
    assert not show(one, state, seen)
    assert torch.equal(one.centred(state, seen), seen)


def test_state_goes_on_where_it_was():
    one = centring()
    first, second = one.domain(), one.domain()
    show(one, first, features(72, seed=2, shift=SHIFT)[0])
    second.load(first.state())
    later, _ = features(40, seed=3, shift=SHIFT)
    assert show(one, first, later) == show(one, second, later)
    assert torch.equal(one.centred(first, later), one.centred(second, later))
    assert first.variety == second.variety


def live(strategy, seed=0):
    x = pictures(16, seed) * 0.9
    features = strategy.encode(x, [1] * 16)
    logits = strategy._zero_shot.logits(features)
    admitted = torch.ones(16, dtype=torch.bool)
    return logits, strategy.step(Observation(x, features, logits, [1] * 16, admitted))


def continual():
    encoder = tiny_encoder()
    return Continual(encoder, tiny_zero_shot(encoder), reference=tiny_reference(encoder))


def test_the_strategy_answers_with_centred_features(monkeypatch):
    strategy = continual()
    logits, answers = live(strategy)
    assert torch.equal(answers, logits)
    monkeypatch.setattr(strategy._centring, "_pays", lambda state: True)
    logits, answers = live(strategy, seed=1)
    assert not torch.allclose(answers, logits)


def test_features_that_are_encoded_otherwise_are_centred_anew():
    strategy = continual()
    live(strategy)
    state = strategy._domains[1]
    assert state.centre.frames == 16
    strategy._forget_features(state)
    assert state.centre.frames == 0


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mean", torch.full((D,), math.nan)),
        ("answers", torch.zeros(2, 1)),
        ("window", torch.zeros(3, 3, dtype=torch.int64)),
        ("counters", torch.tensor([-20, 1, 0])),
        ("variety", torch.tensor(1000.0)),
    ],
)
def test_a_state_that_cannot_be_is_refused(name, tensor):
    state = centring().domain()
    with pytest.raises(ValueError, match="centre"):
        state.load(state.state() | {name: tensor})
