import pytest
import torch
import torch.nn.functional as F

from agent.adapt.prompt import MANY_LABELS, ContextPrompt, LowRankResidual, shifted, tunable
from agent.adapt.strategy import ZeroShot
from agent.testing import LABELS, tiny_encoder, tiny_zero_shot

PLAIN = "a photo of a {}"


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


def many_labels(n=MANY_LABELS):
    text = F.normalize(torch.randn(2, n, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    return ZeroShot(tuple(f"label {k}" for k in range(n)), text, 10.0)


def test_the_source_context_is_the_plain_template(encoder):
    prompt = ContextPrompt(encoder, LABELS)
    expected = encoder.encode_labels(LABELS, [PLAIN])[0]
    assert torch.allclose(prompt.text(prompt.source), expected, atol=1e-6)


def test_labels_of_different_length_end_where_they_end(encoder):
    labels = ("cat", "a very long label of many words", "fire engine")
    prompt = ContextPrompt(encoder, labels)
    expected = encoder.encode_labels(labels, [PLAIN])[0]
    assert torch.allclose(prompt.text(prompt.source), expected, atol=1e-6)


def test_truncated_prompts_are_those_of_the_whole_context_length(encoder):
    whole = encoder._model.encode_text(encoder._tokenizer(["a photo of a cat"]), normalize=True)
    assert torch.allclose(encoder.encode_labels(["cat"], [PLAIN])[0], whole, atol=1e-6)


def test_zero_drift_is_exactly_the_ensemble(encoder):
    zero_shot = tiny_zero_shot(encoder)
    prompt = tunable(encoder, zero_shot)
    drift = prompt.text(prompt.source.clone()) - prompt.text(prompt.source)
    assert torch.allclose(shifted(zero_shot.text_KD, drift), zero_shot.text_KD, atol=1e-7)


def test_the_context_has_one_vector_for_each_word(encoder):
    assert ContextPrompt(encoder, LABELS).source.shape == (4, 32)


@pytest.mark.parametrize("n", [4, MANY_LABELS])
def test_the_gradient_reaches_every_part_of_theta(encoder, n):
    prompt = tunable(encoder, tiny_zero_shot(encoder) if n == 4 else many_labels())
    theta = prompt.source.clone().requires_grad_(True)
    (prompt.text(theta) * torch.randn(n, 24)).sum().backward()
    assert torch.isfinite(theta.grad).all()
    assert (theta.grad.abs().sum(dim=-1) > 0).all()


def test_the_text_tower_is_tuned_for_few_labels_only(encoder):
    assert isinstance(tunable(encoder, tiny_zero_shot(encoder)), ContextPrompt)
    assert isinstance(tunable(encoder, many_labels()), LowRankResidual)


def test_a_residual_starts_at_nothing_and_stays_in_its_subspace():
    zero_shot = many_labels()
    residual = LowRankResidual(zero_shot.text_KD)
    assert float(residual.text(residual.source).abs().max()) == 0.0
    moved = residual.text(torch.randn(residual.source.shape))
    assert torch.linalg.matrix_rank(moved) == residual.source.shape[1]


def test_a_residual_keeps_lengths():
    residual = LowRankResidual(many_labels().text_KD)
    theta = torch.randn(residual.source.shape)
    assert torch.allclose(residual.text(theta).norm(dim=-1), theta.norm(dim=-1), atol=1e-4)


def test_shifted_features_are_unit_vectors_in_every_template(encoder):
    templates = tiny_zero_shot(encoder).templates_TKD
    moved = shifted(templates, torch.randn(4, 24))
    assert moved.shape == templates.shape
    assert torch.allclose(moved.norm(dim=-1), torch.ones(2, 4))
