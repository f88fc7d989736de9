import dataclasses

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from agent.calibration import MIN_FRAMES, Calibration, calibrate, fit_temperature, subject_of
from agent.config import ModelConfig
from agent.errors import InvalidConfig
from agent.score.confidence import ConfidenceModel
from agent.score.novelty import Score
from agent.score.ood import ablated_energy as energy
from agent.testing import pictures, tiny_encoder, tiny_words, tiny_zero_shot


def images(n, seed=0):
    return [(p.permute(1, 2, 0) * 255).to(torch.uint8).numpy() for p in pictures(n, seed)]


def make(architecture="batch_norm", n=40, **options):
    encoder = tiny_encoder(architecture)
    return calibrate(
        encoder, tiny_zero_shot(encoder), images(n), tiny_words(encoder), "subject", **options
    )


@pytest.fixture(scope="module")
def calibration():
    return make()


@pytest.fixture
def saved(calibration, tmp_path):
    path = tmp_path / "normal.safetensors"
    calibration.save(path)
    return path


def tensors(calibration):
    return [
        *(calibration.normal[score].sorted_N for score in Score),
        calibration.reference.style.mean,
        calibration.reference.style.whitening,
        calibration.drift.features_ND,
        calibration.drift.probabilities_NK,
        calibration.drift.styles_NS,
        calibration.drift.energies_N,
        calibration.reference.moments.mean,
        calibration.reference.moments.variance,
    ]


def test_what_is_saved_is_what_is_loaded(calibration, saved):
    loaded = Calibration.load(saved, "subject")
    assert all(map(torch.equal, tensors(loaded), tensors(calibration)))
    assert (loaded.temperature, loaded.frames) == (calibration.temperature, 40)
    assert (loaded.reference.moments.count, loaded.subject) == (40, "subject")
    assert list(saved.parent.iterdir()) == [saved]


def test_what_frames_are_worth_is_kept_too(calibration, saved):
    loaded = Calibration.load(saved, "subject")
    assert loaded.confidence == calibration.confidence != ConfidenceModel()
    assert torch.equal(loaded.negatives_MD, calibration.negatives_MD)
    assert set(loaded.normal) == set(Score)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("negatives", lambda t: t[:, :-1]),
        ("negatives", lambda t: t[:0]),
        ("negatives", lambda t: t * 2),
        ("novelty.neglabel", lambda t: t[:-1]),
        ("novelty.neglabel", lambda t: t.flip(0)),
        ("drift.probabilities", lambda t: -t),
        ("drift.features", lambda t: 9 * t),
        ("style.mean", lambda t: t[:3]),
        ("style.whitening", lambda t: t[:3, :3]),
        ("moments.variance", lambda t: -1 - t),
        ("confidence", lambda t: t[:, None]),
        ("confidence", lambda t: -t),
        ("confidence", lambda t: t * 1e300),
        ("confidence", lambda t: t[:1]),
        ("confidence", lambda t: torch.cat([t, t])),
    ],
)
def test_scores_of_a_wrong_shape_are_refused(saved, name, change):
    with safe_open(saved, framework="pt") as file:
        header, kept = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(kept | {name: change(kept[name]).contiguous()}, saved, metadata=header)
    with pytest.raises(InvalidConfig, match="cannot be read"):
        Calibration.load(saved, "subject")


def test_of_another_subject_it_is_refused(saved):
    with pytest.raises(InvalidConfig, match="another checkpoint"):
        Calibration.load(saved, "other")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-100], lambda b: b[:5], lambda b: b"", bytes.swapcase]
)
def test_a_damaged_file_is_refused(saved, damage):
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(InvalidConfig, match=r"normal\.safetensors"):
        Calibration.load(saved, "subject")


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_file({"weights": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidConfig, match="format"):
        Calibration.load(tmp_path / "model.safetensors", "subject")


def test_a_missing_file_is_refused_and_says_how_to_make_it(tmp_path):
    with pytest.raises(InvalidConfig, match="tta-agent calibrate"):
        Calibration.load(tmp_path / "none", "subject")


def test_too_few_images_are_refused():
    with pytest.raises(InvalidConfig, match=f"{MIN_FRAMES}.*got {MIN_FRAMES - 1}"):
        make(n=MIN_FRAMES - 1)


def test_the_subject_is_checkpoint_labels_and_templates():
    config = ModelConfig()
    encoders = [tiny_encoder(seed=0), tiny_encoder(seed=1)]
    assert subject_of(encoders[0], config) == subject_of(tiny_encoder(seed=0), config)
    others = [
        (encoders[1], config),
        (encoders[0], config.model_copy(update={"labels": ["x", "y"]})),
        (encoders[0], config.model_copy(update={"templates": ["a {}"]})),
    ]
    assert subject_of(encoders[0], config) not in [subject_of(*other) for other in others]


@pytest.mark.parametrize("architecture", ["batch_norm", "layer_norm"])
def test_moments_are_those_of_all_images_in_whatever_batches(architecture):
    encoder = tiny_encoder(architecture)
    seen = []
    last = [m for m in encoder.visual.modules() if type(m).__name__.startswith("LayerNorm")]
    if last:
        last[-1].register_forward_hook(lambda *a: seen.append(a[2].flatten(0, -2).mean(0)))
    calibration = calibrate(encoder, tiny_zero_shot(encoder), images(64), tiny_words(encoder), "s")
    assert calibration.reference.moments.count == 64
    assert float(calibration.reference.moments.variance.std()) > 0
    if seen:  # every second pass is of the other views, and the last four are aligned
        mean = torch.stack(seen[:8:2]).mean(dim=0)
        assert torch.allclose(calibration.reference.moments.mean[-len(mean) :], mean, atol=1e-5)


def test_energies_are_those_of_the_tempered_logits(calibration):
    encoder = tiny_encoder()
    labels = tiny_zero_shot(encoder)
    tempered = dataclasses.replace(labels, scale=labels.scale / calibration.temperature)
    expected = energy(tempered.logits(encoder.encode_image(encoder.to_device(images(40)))))
    found = calibration.normal[Score.ABLATED_ENERGY].sorted_N
    assert torch.allclose(found, expected.sort().values, atol=1e-3)


def test_progress_is_told_to_the_end():
    told = []
    make(progress=lambda done, total: told.append((done, total)))
    done, totals = zip(*told, strict=True)
    assert set(totals) == {200}  # plain, aligned, and spoilt in three ways
    assert list(done) == sorted(done)
    assert done[-1] == 200


def test_what_alignment_seems_to_gain_on_normal_frames_is_measured_and_kept(calibration, tmp_path):
    chance = calibration.reference.false_advantage
    assert abs(chance.mean) < 0.5
    assert 0 < chance.deviation < 0.5
    calibration.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors", calibration.subject)
    assert loaded.reference.false_advantage.mean == pytest.approx(chance.mean)
    assert loaded.reference.false_advantage.deviation == pytest.approx(chance.deviation)


def opinions(n, right, scale, seed=0):
    """Two views' logits; each is right with this probability and sure of itself by `scale`."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 10, n)
    views = []
    for _ in range(2):
        said = np.where(rng.random(n) < right, truth, rng.integers(0, 10, n))
        views.append(scale * torch.nn.functional.one_hot(torch.tensor(said), 10).float())
    return views


def test_overconfident_logits_are_cooled():
    assert fit_temperature(*opinions(1000, right=0.7, scale=30.0)) > 3


def test_underconfident_logits_are_sharpened():
    assert fit_temperature(*opinions(1000, right=0.95, scale=1.0)) < 0.5


def test_confidence_becomes_the_rate_of_agreement():
    first, second = opinions(2000, right=0.8, scale=12.0)
    temperature = fit_temperature(first, second)
    agreement = float((first.argmax(-1) == second.argmax(-1)).float().mean())
    confidence = float((first / temperature).softmax(-1).amax(-1).mean())
    assert confidence == pytest.approx(agreement, abs=0.02)


def test_views_that_always_agree_do_not_make_it_certain():
    first, second = opinions(50, right=1.0, scale=5.0)
    assert float((first / fit_temperature(first, second)).softmax(-1).amax()) < 0.999


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("centre.mean", torch.zeros(3)),
        ("centre.mean", torch.full((24,), 1e30)),
        ("drift.styles", torch.zeros(40, 19)),
        ("drift.styles", torch.zeros(39, 20)),
        ("drift.features", torch.zeros(39, 24)),
        ("drift.probabilities", torch.zeros(40)),
        ("novelty.ablated_energy", torch.zeros(39)),
        ("answers", torch.tensor([0.0, 1.0])),
        ("answers", torch.tensor([4.0, -1.0])),
    ],
)
def test_a_file_with_numbers_that_cannot_be_is_refused(saved, name, tensor):
    from safetensors import safe_open

    with safe_open(saved, framework="pt") as file:
        tensors = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
        header = file.metadata()
    save_file(tensors | {name: tensor}, saved, metadata=header)
    with pytest.raises(InvalidConfig, match="cannot be read"):
        Calibration.load(saved, "subject")
