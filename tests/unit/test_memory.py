import math

import torch

from agent.adapt.memory import MAX_LABELS, PER_LABEL, FeatureMemory

ORTHOGONAL = torch.eye(100)


def turned(degrees):
    """A unit vector at this angle from the first axis."""
    angle = math.radians(degrees)
    return torch.tensor([math.cos(angle), math.sin(angle)])


def test_a_repeat_of_the_newest_adds_nothing():
    memory = FeatureMemory()
    assert memory.add(turned(0), label=1)
    assert not memory.add(turned(5), label=1)  # cosine 0.996
    assert memory.add(turned(15), label=1)  # cosine 0.966
    assert len(memory) == 2


def test_labels_do_not_repeat_each_other():
    memory = FeatureMemory()
    assert memory.add(turned(0), label=1)
    assert memory.add(turned(0), label=2)


def test_the_oldest_of_a_label_falls_out():
    memory = FeatureMemory()
    for feature in ORTHOGONAL[: PER_LABEL + 2]:
        memory.add(feature, label=3)
    _, kept = memory.state()
    assert torch.equal(kept, ORTHOGONAL[2 : PER_LABEL + 2])


def test_the_label_refreshed_longest_ago_makes_room():
    memory = FeatureMemory()
    for label in range(MAX_LABELS):
        memory.add(ORTHOGONAL[0], label)
    memory.add(ORTHOGONAL[1], 0)
    memory.add(ORTHOGONAL[0], MAX_LABELS)
    labels, _ = memory.state()
    assert 0 in labels
    assert 1 not in labels


def test_every_label_is_drawn_equally_often():
    memory = FeatureMemory()
    for feature in ORTHOGONAL[1:9]:
        memory.add(feature, label=0)
    memory.add(ORTHOGONAL[0], label=1)
    drawn = memory.sample(4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 100)
    assert abs(float(drawn[:, 0].mean()) - 0.5) < 0.03


def test_the_same_seed_draws_the_same():
    memory = FeatureMemory()
    for row, feature in enumerate(ORTHOGONAL):
        memory.add(feature, label=row % 5)
    draws = [memory.sample(16, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


def test_state_put_back_is_the_same_memory():
    memory, again = FeatureMemory(), FeatureMemory()
    for row, feature in enumerate(ORTHOGONAL[:50]):
        memory.add(feature, label=row % 7)
    labels, features = memory.state()
    for label, feature in zip(labels, features, strict=True):
        assert again.add(feature, label)
    assert again.state()[0] == labels
    assert torch.equal(again.state()[1], features)


def test_an_empty_memory_has_no_state():
    memory = FeatureMemory()
    memory.add(turned(0), 1)
    memory.clear()
    assert (len(memory), memory.state()) == (0, ([], None))
