"""Published methods that train the image tower, each against a computation of its own."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn
from torch.func import functional_call

from agent.bench.peers import published
from agent.bench.peers.bn import BN, BNConfig
from agent.bench.peers.cotta import CoTTA, CoTTAConfig
from agent.bench.peers.losses import softmax_entropy
from agent.bench.peers.norms import TrainedNorms, use_batch_statistics
from agent.bench.peers.rdumb import RDumb, RDumbConfig
from agent.bench.peers.roid import ROID, ROIDConfig, prior_corrected, soft_likelihood_ratio
from agent.bench.peers.sar import SAR, SARConfig, top_layers
from agent.bench.peers.tent import Tent, TentConfig
from agent.bench.peers.views import RandomView, moved
from agent.errors import ModelError
from agent.testing import ARCHITECTURES, LABELS, pictures, tiny_encoder, tiny_zero_shot

PEERS = (BN, Tent, CoTTA, SAR, RDumb, ROID)
NORMS = (nn.BatchNorm2d, nn.LayerNorm)
CPU = torch.device("cpu")
LN_K = math.log(len(LABELS))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def encoder(request):
    return tiny_encoder(request.param)


@pytest.fixture(scope="module")
def zero_shot(encoder):
    return tiny_zero_shot(encoder)


def peer_of(kind, encoder, zero_shot):
    """At its defaults, but for CoTTA's 32 views, which take long."""
    options = {"config": CoTTAConfig(n_views=3)} if kind is CoTTA else {}
    return kind(encoder, zero_shot, seed=3, **options)


class Oracle:
    """The tower as a function of its weights, with PyTorch's own batch statistics."""

    def __init__(self, encoder, zero_shot):
        self.tower = copy.deepcopy(encoder.visual)
        self.zero_shot = zero_shot
        for module in self.tower.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = module.running_var = None
        self.all = {name: p.detach().clone() for name, p in self.tower.named_parameters()}
        norms = [name for name, m in self.tower.named_modules() if isinstance(m, NORMS)]
        self.affine = {n: p for n, p in self.all.items() if n.rpartition(".")[0] in norms}

    def logits(self, pixels, weights=None):
        features = functional_call(self.tower, weights or self.affine, (2 * pixels - 1,))
        text = F.normalize(self.zero_shot.templates_TKD.mean(0), dim=-1)
        return self.zero_shot.scale * F.normalize(features, dim=-1) @ text.T

    def slopes(self, weights, loss):
        """Gradients of `loss(weights)`, by name."""
        at = {name: w.clone().requires_grad_(True) for name, w in weights.items()}
        found = torch.autograd.grad(loss(at), list(at.values()))
        return dict(zip(at, found, strict=True))


@pytest.fixture(scope="module")
def oracle(encoder, zero_shot):
    return Oracle(encoder, zero_shot)


def entropy_of(logits):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def cross_entropy_of(logits, targets):
    return -(targets.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def along(weights, slopes, by):
    return {name: weights[name] + by * slopes[name] for name in weights}


def trained(peer):
    return dict(peer._norms._encoder.visual.named_parameters())


def assert_moved(actual, expected, source):
    """The weights went where they should have, measured by how far that is."""
    wanted = torch.cat([(expected[n] - source[n]).flatten() for n in expected])
    went = torch.cat([(actual[n].detach() - source[n]).flatten() for n in expected])
    assert wanted.norm() > 0
    assert (went - wanted).norm() < 2e-3 * wanted.norm()


# -- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PEERS)
def test_a_seeded_run_repeats_itself_whatever_the_caller_records(encoder, zero_shot, kind):
    runs = []
    for off in (torch.no_grad, torch.inference_mode):
        peer = peer_of(kind, encoder, zero_shot)
        with off():
            runs.append([peer.predict(pictures(n, n)) for n in (6, 1, 6)])
    assert [tuple(logits.shape) for logits in runs[0]] == [(6, 4), (1, 4), (6, 4)]
    assert all(torch.isfinite(logits).all() and not logits.requires_grad for logits in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", PEERS)
def test_the_encoder_that_was_handed_in_does_not_change(encoder, zero_shot, kind):
    before = copy.deepcopy(encoder.visual.state_dict())
    features = encoder.encode_image(pictures(4, 0))
    peer_of(kind, encoder, zero_shot).predict(pictures(4, 1))
    after = encoder.visual.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(encoder.encode_image(pictures(4, 0)), features)
    assert not any(p.requires_grad for p in encoder.visual.parameters())


@pytest.mark.parametrize("kind", PEERS)
def test_peers_name_themselves_as_their_file(kind):
    assert kind.__module__ == f"agent.bench.peers.{kind.name}"


def test_thresholds_are_those_of_the_nearest_number_of_labels():
    table = {10: 0.9, 100: 0.7, 1000: 0.1}
    assert [published.for_labels(table, n) for n in (2, 31, 32, 310, 9999)] == [
        0.9, 0.9, 0.7, 0.7, 0.1,
    ]  # fmt: skip


# -- batch statistics -------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0, 16])
def test_batch_statistics_are_mixed_as_if_the_source_were_n_images(prior):
    layer = nn.BatchNorm2d(3).eval()
    layer.running_mean.copy_(torch.tensor([0.1, -0.4, 2.0]))
    layer.running_var.copy_(torch.tensor([0.5, 1.0, 3.0]))
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) + 1
    mean = (prior * layer.running_mean.numpy() + 4 * x.numpy().mean((0, 2, 3))) / (prior + 4)
    variance = (prior * layer.running_var.numpy() + 4 * x.numpy().var((0, 2, 3))) / (prior + 4)
    use_batch_statistics(layer, prior)
    expected = (x.numpy() - mean[:, None, None]) / np.sqrt(variance[:, None, None] + layer.eps)
    assert np.allclose(layer(x).detach().numpy(), expected, atol=1e-5)


def test_a_channel_seen_once_keeps_the_source_statistics():
    layer = nn.BatchNorm2d(3).eval()
    plain = layer(torch.ones(1, 3, 1, 1))
    use_batch_statistics(layer)
    assert torch.equal(layer(torch.ones(1, 3, 1, 1)), plain)


def test_bn_without_a_prior_is_batch_norm_on_the_batch(encoder, zero_shot, oracle):
    peer = BN(encoder, zero_shot, config=BNConfig(prior=0))
    assert torch.allclose(peer.predict(pictures(8, 1)), oracle.logits(pictures(8, 1)), atol=1e-3)


def test_bn_is_the_frozen_model_without_batch_norm_only(encoder, zero_shot):
    frozen = zero_shot.logits(encoder.encode_image(pictures(8, 1)))
    has_none = not any(isinstance(m, nn.BatchNorm2d) for m in encoder.visual.modules())
    assert torch.equal(BN(encoder, zero_shot).predict(pictures(8, 1)), frozen) == has_none


def test_the_scales_and_shifts_of_every_kind_of_norm_are_trained():
    encoder = tiny_encoder("layer_norm")
    zero_shot = tiny_zero_shot(encoder)
    encoder.visual = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3), nn.LayerNorm(3, bias=False))
    norms = TrainedNorms(encoder, zero_shot, learning_rate=0.1, momentum=0.9)
    assert [tuple(p.shape) for p in norms.parameters] == [(3,), (3,), (3,)]
    encoder.visual = nn.Linear(3, 3)
    with pytest.raises(ModelError, match="no normalisation layer"):
        TrainedNorms(encoder, zero_shot, learning_rate=0.1, momentum=0.9)


# -- tent -------------------------------------------------------------------------------------


def test_tent_takes_momentum_steps_on_the_mean_entropy(encoder, zero_shot, oracle):
    peer = Tent(encoder, zero_shot, config=TentConfig(learning_rate=0.01, momentum=0.9))
    weights, speed = oracle.affine, dict.fromkeys(oracle.affine, 0.0)
    for seed in (1, 2):
        pixels = pictures(8, seed)
        assert torch.allclose(peer.predict(pixels), oracle.logits(pixels, weights), atol=1e-2)
        slopes = oracle.slopes(weights, lambda w, x=pixels: entropy_of(oracle.logits(x, w)).mean())
        speed = along(slopes, speed, 0.9)
        weights = along(weights, speed, -0.01)
    assert_moved(trained(peer), weights, oracle.affine)
    rest = [name for name in oracle.all if name not in oracle.affine]
    assert all(torch.equal(trained(peer)[name], oracle.all[name]) for name in rest)


def test_entropy_has_a_slope_where_a_probability_underflows():
    logits = torch.tensor([[0.0, -500.0, 0.5]], requires_grad=True)
    (slope,) = torch.autograd.grad(softmax_entropy(logits).sum(), logits)
    (expected,) = torch.autograd.grad(entropy_of(logits).sum(), logits)
    assert torch.allclose(slope, expected, atol=1e-6)


# -- cotta ------------------------------------------------------------------------------------


def cotta(encoder, zero_shot, **config):
    return CoTTA(encoder, zero_shot, config=CoTTAConfig(**config))


def test_cotta_steps_all_weights_and_the_teacher_follows(encoder, zero_shot, oracle):
    peer = cotta(encoder, zero_shot, learning_rate=0.001, restore=0.0, threshold=0.0)
    target = oracle.logits(pictures(8, 1)).detach()

    def loss(weights):
        logits = oracle.logits(pictures(8, 1), weights)
        return (cross_entropy_of(logits, target) + cross_entropy_of(target, logits)).mean() / 2

    # The first step of Nesterov's momentum 0.9 is 1.9 of the gradient.
    student = along(oracle.all, oracle.slopes(oracle.all, loss), -0.0019)
    assert torch.allclose(peer.predict(pictures(8, 1)), target, atol=1e-3)
    assert_moved(dict(peer._student.visual.named_parameters()), student, oracle.all)
    teacher = {n: 0.999 * w + 0.001 * student[n] for n, w in oracle.all.items()}
    for name, weight in peer._teacher.visual.named_parameters():
        assert torch.allclose(weight, teacher[name], atol=1e-7)


@pytest.mark.parametrize(("share", "views"), [(0.99, 0), (1.01, 32)])
def test_cotta_averages_views_where_the_source_is_unsure(encoder, zero_shot, oracle, share, views):
    pixels = pictures(8, 1)
    confidence = oracle.logits(pixels).softmax(-1).max(-1).values.mean()
    peer = cotta(encoder, zero_shot, threshold=share * float(confidence))
    shades = iter(range(1, views + 1))
    peer._view = lambda x: x * (next(shades) / 32)
    means = [oracle.logits(pixels * (shade / 32)) for shade in range(1, views + 1)]
    expected = sum(means) / views if views else oracle.logits(pixels)
    assert torch.allclose(peer.predict(pixels), expected, atol=1e-2)
    assert next(shades, None) is None


def test_cotta_returns_a_share_of_the_student_to_the_source(encoder, zero_shot, oracle):
    free, bound = (cotta(encoder, zero_shot, restore=p, threshold=0.0) for p in (0.0, 0.3))
    for peer in (free, bound):
        peer.predict(pictures(8, 1))
    source, far, near = (
        nn.utils.parameters_to_vector(tower.visual.parameters())
        for tower in (encoder, free._student, bound._student)
    )
    went = far != source
    assert float((near == source)[went].float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(near[near != source], far[near != source])


# -- sar --------------------------------------------------------------------------------------

TINY_TOP = ("layer4", "resblocks.1.ln_2", "ln_post")


def test_sar_steps_by_the_slope_found_uphill(encoder, zero_shot, oracle):
    margin, radius, pixels = 0.8, 0.05, pictures(8, 4)
    config = SARConfig(
        learning_rate=0.04, layer_norm_learning_rate=0.08, margin=margin, reset_below=0
    )
    peer = SAR(encoder, zero_shot, config=config)
    source = {n: w for n, w in oracle.affine.items() if not any(top in n for top in TINY_TOP)}
    sure = entropy_of(oracle.logits(pixels, source)) < margin * LN_K
    uphill = oracle.slopes(source, lambda w: entropy_of(oracle.logits(pixels, w))[sure].mean())
    length = torch.cat([slope.flatten() for slope in uphill.values()]).norm()
    summit = along(source, uphill, radius / float(length))
    still = sure & (entropy_of(oracle.logits(pixels, summit)) < margin * LN_K)
    assert 0 < int(still.sum()) < int(sure.sum()) < 8
    slopes = oracle.slopes(summit, lambda w: entropy_of(oracle.logits(pixels, w))[still].mean())
    peer.predict(pixels)
    # Both rates come to 0.01 at a batch of eight: a quarter of 0.04, an eighth of 0.08.
    assert_moved(trained(peer), along(source, slopes, -0.01), source)
    rest = [name for name in oracle.all if name not in source]
    assert all(torch.equal(trained(peer)[name], oracle.all[name]) for name in rest)


def test_sar_leaves_the_last_three_blocks_of_a_vit_alone():
    blocks = [f"transformer.resblocks.{i}.ln_{j}" for i in range(12) for j in (1, 2)]
    assert top_layers(["ln_pre", *blocks, "ln_post"]) == [*blocks[-6:], "ln_post"]


def test_sar_follows_the_loss_and_resets_below_the_threshold(encoder, zero_shot, oracle):
    still = {"learning_rate": 0.0, "layer_norm_learning_rate": 0.0, "radius": 0.0, "margin": 1.0}
    first, second = (float(entropy_of(oracle.logits(pictures(8, s))).mean()) for s in (1, 2))
    peer = SAR(encoder, zero_shot, config=SARConfig(**still, reset_below=0.0))
    peer.predict(pictures(8, 1))
    peer.predict(pictures(8, 2))
    assert peer._loss == pytest.approx(0.9 * first + 0.1 * second, abs=1e-3)
    peer = SAR(encoder, zero_shot, config=SARConfig(margin=1.0, reset_below=2.0))
    peer.predict(pictures(8, 1))
    assert peer._loss is None
    assert all(torch.equal(trained(peer)[name], oracle.all[name]) for name in oracle.all)


@pytest.mark.parametrize(("batch", "share"), [(1, 1 / 32), (16, 0.5), (64, 1.0)])
def test_sar_learns_slower_from_small_batches(encoder, zero_shot, batch, share):
    peer = SAR(encoder, zero_shot)
    is_vit = encoder.name == "tiny-layer_norm"
    expected = 0.001 * batch / 64 if is_vit else 0.00025 * share
    assert peer._learning_rate(batch) == pytest.approx(expected)


def test_nothing_is_learned_from_unsure_predictions(encoder, zero_shot, oracle):
    for peer in (
        SAR(encoder, zero_shot, config=SARConfig(margin=0.0)),
        RDumb(encoder, zero_shot, config=RDumbConfig(margin=0.0)),
    ):
        peer.predict(pictures(8, 1))
        assert all(torch.equal(trained(peer)[name], oracle.all[name]) for name in oracle.all)


# -- rdumb ------------------------------------------------------------------------------------


def test_rdumb_learns_from_sure_then_from_unusual_predictions(encoder, zero_shot, oracle):
    margin, cosine = 0.8, 0.9
    config = RDumbConfig(learning_rate=1e-3, momentum=0.0, margin=margin, cosine=cosine)
    peer = RDumb(encoder, zero_shot, config=config)
    weights, mean = oracle.affine, None
    for seed in (1, 2, 4):
        pixels = pictures(8, seed)
        logits = oracle.logits(pixels, weights).detach()
        p, h = logits.softmax(-1).numpy(), entropy_of(logits).numpy()
        teaches = h < margin * LN_K
        if mean is not None:
            teaches &= p @ mean / np.linalg.norm(p, axis=1) / np.linalg.norm(mean) < cosine
        assert 0 < teaches.sum() < 8
        weight = torch.from_numpy(np.where(teaches, np.exp(margin * LN_K - h), 0)).float()
        slopes = oracle.slopes(
            weights,
            lambda w, x=pixels, v=weight: (
                (v * entropy_of(oracle.logits(x, w))).sum() / (v > 0).sum()
            ),
        )
        weights = along(weights, slopes, -1e-3)
        mean = p[teaches].mean(0) if mean is None else 0.9 * mean + 0.1 * p[teaches].mean(0)
        peer.predict(pixels)
    assert_moved(trained(peer), weights, oracle.affine)
    assert np.allclose(peer._mean_K.numpy(), mean, atol=1e-4)


def test_rdumb_forgets_everything_after_its_steps(encoder, zero_shot, oracle):
    config = RDumbConfig(learning_rate=0.01, margin=1.0, cosine=1.1, reset_every=2)
    peer = RDumb(encoder, zero_shot, config=config)
    runs = [(peer.predict(pictures(8, 1)), peer._mean_K) for _ in range(4)]
    for first, second, after, later in zip(*runs, strict=True):
        assert not torch.allclose(second, first, atol=1e-4)
        assert torch.equal(after, first)
        assert torch.equal(later, second)


# -- roid -------------------------------------------------------------------------------------


def scaled(values):
    return (values - values.min()) / (values.max() - values.min())


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def roid_weights(logits, mean):
    p = softmax(logits)
    diversity = scaled(1 - p @ mean / np.linalg.norm(p, axis=1) / np.linalg.norm(mean))
    certainty = scaled((p * np.log(p)).sum(1))
    kept = diversity >= diversity.mean()
    return np.where(kept, np.exp(3 * diversity * certainty), 0)


def test_roid_weighs_its_losses_and_returns_towards_the_source(encoder, zero_shot, oracle):
    pixels = pictures(8, 1)
    peer = ROID(encoder, zero_shot, config=ROIDConfig(learning_rate=0.01))
    peer._view = lambda x: x * 0.8
    logits = oracle.logits(pixels).detach()
    weight = torch.from_numpy(roid_weights(logits.numpy(), np.full(4, 0.25)))
    kept = weight > 0

    def loss(weights):
        z = oracle.logits(pixels, weights)
        p = z.softmax(-1).clamp(max=0.99)
        ratio = -(p * (p / (1 - p) + 1e-5).log()).sum(-1)[kept]
        seen = oracle.logits(pixels[kept] * 0.8, weights)
        agree = cross_entropy_of(seen, z[kept]) + cross_entropy_of(z[kept], seen)
        return (weight[kept] * (ratio + agree / 2)).sum() / 8

    # Nesterov's first step, of which the ensemble with the source keeps 0.99.
    expected = along(oracle.affine, oracle.slopes(oracle.affine, loss), -0.01 * 1.9 * 0.99)
    peer.predict(pixels)
    assert_moved(trained(peer), expected, oracle.affine)
    mean = 0.9 * 0.25 + 0.1 * softmax(logits.numpy()).mean(0)
    assert np.allclose(peer._mean_K.numpy(), mean, atol=1e-4)


def test_roid_corrects_probabilities_by_the_smoothed_prior():
    logits = torch.tensor([[2.0, 0.0, -1.0], [1.5, 1.0, 0.0]])
    p = softmax(logits.numpy())
    prior = p.mean(0)
    smoothing = (1 / 2) / prior.max()
    posterior = p * (prior + smoothing) / (1 + 3 * smoothing)
    posterior /= posterior.sum(1, keepdims=True)
    assert np.allclose(prior_corrected(logits).softmax(-1).numpy(), posterior, atol=1e-6)
    assert torch.allclose(
        prior_corrected(logits + 50).softmax(-1), prior_corrected(logits).softmax(-1)
    )


def test_the_likelihood_ratio_keeps_its_slope_until_a_prediction_is_certain():
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0], [9.0, 0.0]], requires_grad=True)
    p = np.minimum(softmax(logits.detach().numpy()), 0.99)
    expected = -(p * np.log(p / (1 - p) + 1e-5)).sum(1)
    loss = soft_likelihood_ratio(logits)
    assert np.allclose(loss.detach().numpy(), expected, atol=1e-5)
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isfinite(slope).all() and float(slope[1].abs().sum()) > 0


def test_roid_weighs_a_batch_of_equals_equally(encoder, zero_shot):
    peer = ROID(encoder, zero_shot)
    assert torch.equal(peer._weights(torch.tensor([[1.0, 2.0, 0.0, 0.0]])), torch.ones(1))


# -- views ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [
        (0.0, 1.0, 0.0, 0.0),
        (15.0, 1.0, 0.0, 0.0),
        (0.0, 1.1, 0.0, 0.0),
        (0.0, 1.0, 0.125, -0.0625),
        (-9.0, 0.9, 0.125, 0.0),
    ],
)
def test_a_moved_image_is_padded_turned_and_cropped(at):
    degrees, scale, right, down = at
    image = pictures(2, 0)
    shift = [round(right * 32), round(down * 32)]
    padded = TF.affine(
        TF.pad(image, [16], padding_mode="edge"), degrees, shift, scale, [0.0, 0.0],
        interpolation=TF.InterpolationMode.BILINEAR,
    )  # fmt: skip
    view = moved(image, degrees=degrees, scale=scale, right=right, down=down, edge="border")
    assert torch.allclose(view, TF.center_crop(padded, [32]), atol=1e-4)


@pytest.mark.parametrize("edge", ["border", "reflection"])
def test_views_have_nothing_in_them_that_the_image_has_not(edge):
    view = RandomView(0, CPU, edge=edge, blur_and_noise=False)
    grey = torch.full((2, 3, 32, 32), 0.5)
    spread = [float(view(grey).std(dim=(-2, -1)).max()) for _ in range(20)]
    assert max(spread) < 1e-5


def test_views_differ_and_repeat_under_their_seed():
    first, again = (RandomView(7, CPU, edge="border", blur_and_noise=True) for _ in range(2))
    views = [first(pictures(2, 0)) for _ in range(4)]
    assert all(torch.equal(view, again(pictures(2, 0))) for view in views)
    assert all(not torch.equal(a, b) for a, b in pairwise(views))
    assert all(float(view.min()) >= 0 and float(view.max()) <= 1 for view in views)


def test_noise_is_added_where_it_was_published():
    grey = torch.full((2, 3, 32, 32), 0.5)
    view = RandomView(0, CPU, edge="border", blur_and_noise=True)(grey)
    assert float(view.std(dim=(-2, -1)).mean()) == pytest.approx(0.005, rel=0.1)
