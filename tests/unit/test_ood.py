import math

import pytest
import torch

from agent.score import negatives, ood
from agent.score.novelty import MEMBERS, Normal, Novelty, Score
from agent.testing import tiny_encoder, tiny_words, tiny_zero_shot

KNOWN, UNKNOWN = [30.0, 10.0, 9.0], [11.0, 10.0, 9.0]
ENCODER = tiny_encoder()
ZERO_SHOT = tiny_zero_shot(ENCODER)


def novelty(negatives_MD=None):
    words = tiny_words(ENCODER) if negatives_MD is None else negatives_MD
    normal = {m: Normal.of(torch.tensor([1.0, 2.0, 4.0])) for m in MEMBERS}
    return Novelty(ZERO_SHOT, 2.0, words, normal)


def test_energy_is_minus_the_log_of_the_summed_exponentials():
    logits = torch.tensor([[math.log(1), math.log(2), math.log(5)]])
    assert ood.ablated_energy(logits).tolist() == pytest.approx([-math.log(8)])


def test_energy_is_in_the_units_of_the_logits_before_the_temperature_divided_them():
    logits = torch.tensor([[8.0, -40.0]])
    assert ood.energy(logits / 4, temperature=4.0).tolist() == pytest.approx([-8.0], abs=1e-4)


def test_max_logit_is_minus_the_largest():
    assert ood.max_logit(torch.tensor([KNOWN, UNKNOWN])).tolist() == [-30.0, -11.0]


def test_concept_matching_is_minus_the_largest_share():
    cosines = torch.tensor([[0.3, 0.1]])
    assert ood.mcm(cosines).tolist() == pytest.approx([-1 / (1 + math.exp(-0.2))])


def test_negative_labels_are_weighed_against_the_labels():
    logits, against = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 2.0]])
    share = (2 * math.exp(2)) / (math.exp(3) + math.exp(1))
    assert ood.neglabel(logits, against).tolist() == pytest.approx([math.log(share)], abs=1e-6)


@pytest.mark.parametrize(
    "score",
    [
        ood.energy,
        ood.ablated_energy,
        ood.max_logit,
        ood.mcm,
        lambda logits: ood.neglabel(logits, torch.tensor([[9.0], [9.0]])),
    ],
)
def test_a_frame_that_nothing_matches_is_stranger(score):
    known, unknown = score(torch.tensor([KNOWN, UNKNOWN])).tolist()
    assert unknown > known


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[500.0, 0.0]])
    assert ood.ablated_energy(logits).tolist() == [-500.0]
    assert ood.neglabel(logits, torch.tensor([[700.0]])).tolist() == [200.0]


@pytest.mark.parametrize("score", Score)
def test_each_score_has_one_value_a_frame_and_depends_on_no_other_frame(score):
    features = torch.nn.functional.normalize(torch.randn(5, 24), dim=-1)
    logits = ZERO_SHOT.logits(features)
    together = novelty().score(score, features, logits)
    alone = novelty().score(score, features[2:3], logits[2:3])
    assert together.shape == (5,)
    assert together[2].item() == pytest.approx(alone.item(), abs=1e-4)


def test_the_ensemble_is_the_mean_of_its_members_in_deviations():
    features = torch.nn.functional.normalize(torch.randn(3, 24), dim=-1)
    logits = ZERO_SHOT.logits(features)
    members = torch.stack([novelty().score(m, features, logits) for m in MEMBERS])
    expected = ((members - 2) / 1).mean(0)  # the median is 2, the median absolute deviation 1
    assert torch.allclose(novelty().score(Score.ENSEMBLE, features, logits), expected, atol=1e-5)


def test_a_frame_of_a_negative_label_is_stranger_than_one_of_a_label():
    words = tiny_words(ENCODER)[:5]
    features = torch.stack([words[1], ZERO_SHOT.text_KD[1]])
    strange, known = novelty(words).score(Score.NEGLABEL, features, ZERO_SHOT.logits(features))
    assert strange > known


def test_words_that_mean_a_label_are_not_mined():
    labels = torch.eye(3)[:2]
    near, far = torch.tensor([0.9, 0.1, 0.42]), torch.tensor([0.1, 0.1, 0.99])
    words = torch.stack([labels[0], near / near.norm(), labels[1], far / far.norm(), -labels[0]])
    mined = negatives.mine(words, labels)
    assert len(mined) == round(0.6 * 5)
    assert {tuple(row) for row in mined.tolist()} >= {
        tuple(words[3].tolist()),
        tuple(words[4].tolist()),
    }
    assert tuple(labels[0].tolist()) not in {tuple(row) for row in mined.tolist()}


def test_the_word_list_names_many_things_once():
    words = negatives.words()
    assert len(words) == len(set(words)) > 30_000
    assert {"beagle", "traffic light", "spoon"} <= set(words)
    assert all(word == word.strip() != "" for word in words)
