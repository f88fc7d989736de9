"""One behavioural suite over every strategy and both kinds of tower."""

from collections.abc import Callable

import pytest
import torch

from agent.adapt.build import STRATEGIES
from agent.adapt.continual import ContinualConfig
from agent.adapt.strategy import Observation, Outcome, Strategy
from agent.testing import ARCHITECTURES, pictures, tiny_encoder, tiny_reference, tiny_zero_shot

Make = Callable[[int], Strategy]


@pytest.fixture(params=[(a, s) for a in ARCHITECTURES for s in STRATEGIES], ids="-".join)
def setup(request):
    architecture, name = request.param
    encoder = tiny_encoder(architecture)
    labels = tiny_zero_shot(encoder)
    reference = tiny_reference(encoder)
    return (
        encoder,
        labels,
        lambda seed=0: STRATEGIES[name](encoder, labels, reference, seed, ContinualConfig()),
    )


def pixels(seed: int, n: int = 16) -> torch.Tensor:
    return pictures(n, seed) * 0.9  # a little darker than normal


def feed(strategy, labels, seed, n=16, domain=1, admitted=True):
    x = pixels(seed, n)
    features = strategy.encode(x, [domain] * n)
    seen = Observation(
        x, features, labels.logits(features), [domain] * n, torch.full((n,), admitted)
    )
    return strategy.step(seen).detach()


def live(strategy, labels, batches, start=0):
    out = []
    for seed in range(start, start + batches):
        out.append(feed(strategy, labels, seed))
        while strategy.learn() is not None:
            pass
    return torch.stack(out)


def live_to_an_empty_gallery(strategy, labels):
    """Pictures on their way into a gallery are not part of the state."""
    for seed in range(40):
        feed(strategy, labels, seed)
        outcomes = set(iter(strategy.learn, None))
        if seed >= 7 and outcomes & {Outcome.ALIGNED, Outcome.DECLINED}:
            return


def test_before_learning_it_answers_with_the_zero_shot_ensemble(setup):
    encoder, labels, make = setup
    expected = labels.logits(encoder.encode_image(pixels(1)))
    assert torch.allclose(feed(make(), labels, 1), expected, atol=1e-5)


def test_the_source_domain_is_left_alone(setup):
    _, labels, make = setup
    strategy = make()
    live(strategy, labels, 6)
    assert torch.equal(feed(strategy, labels, 3, domain=0), feed(make(), labels, 3, domain=0))


def test_reset_is_exact(setup):
    _, labels, make = setup
    strategy = make()
    live(strategy, labels, 8)
    strategy.reset()
    assert torch.equal(feed(strategy, labels, 99), feed(make(), labels, 99))
    assert strategy.distance(1) == 0


def test_same_seed_same_stream_same_answers(setup):
    _, labels, make = setup
    assert torch.equal(live(make(7), labels, 8), live(make(7), labels, 8))


def test_restored_state_goes_on_as_if_nothing_happened(setup):
    _, labels, make = setup
    original = make()
    live_to_an_empty_gallery(original, labels)
    restored = make(seed=5)
    restored.load_state_dict({k: v.clone() for k, v in original.state_dict().items()})
    assert torch.equal(live(original, labels, 4, start=50), live(restored, labels, 4, start=50))
    assert restored.version(1) == original.version(1)


def test_state_of_another_strategy_is_refused_and_changes_nothing(setup):
    _, labels, make = setup
    strategy = make()
    if not strategy.state_dict():
        pytest.skip("keeps no state")
    live(strategy, labels, 4)
    before = strategy.state_dict()
    with pytest.raises((KeyError, RuntimeError)):
        strategy.load_state_dict({"1/theta": torch.zeros(3), "generator": torch.zeros(1)})
    after = strategy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_inputs_are_not_changed(setup):
    _, labels, make = setup
    strategy = make()
    live(strategy, labels, 4)
    x = pixels(3)
    features = strategy.encode(x, [1] * 16)
    logits = labels.logits(features)
    copies = [t.clone() for t in (x, features, logits)]
    strategy.step(Observation(x, features, logits, [1] * 16, torch.ones(16, dtype=torch.bool)))
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, features, logits), strict=True))


def test_a_batch_of_one_is_a_batch(setup):
    _, labels, make = setup
    strategy = make()
    for seed in range(40):
        assert feed(strategy, labels, seed, n=1).shape == (1, 4)
        strategy.learn()


def test_flagged_frames_teach_nothing(setup):
    _, labels, make = setup
    strategy = make()
    for seed in range(8):
        feed(strategy, labels, seed, admitted=False)
        assert strategy.learn() is None
    assert strategy.version(1) == 0


def test_non_finite_features_teach_nothing(setup):
    _, labels, make = setup
    strategy = make()
    x = pixels(1)
    features = torch.full((16, 24), float("nan"))
    for _ in range(4):
        strategy.step(
            Observation(x, features, features[:, :4], [1] * 16, torch.ones(16, dtype=torch.bool))
        )
        strategy.learn()
    assert torch.isfinite(feed(strategy, labels, 2)).all()


def test_domains_do_not_touch_each_other(setup):
    _, labels, make = setup
    strategy = make()
    before = feed(strategy, labels, 5, n=8, domain=2)  # too few to learn from
    live(strategy, labels, 8)
    assert torch.equal(feed(strategy, labels, 5, n=8, domain=2), before)
