import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, LayerNormAct2d
from torch import nn

from agent.adapt.alignment import Alignment as PartialAlignment
from agent.adapt.moments import Moments, Sample
from agent.errors import ModelError
from agent.testing import pictures, tiny_encoder, tiny_reference


def Alignment(visual, reference=None):
    """One that undoes departures wholly, which is easier to reason about."""
    return PartialAlignment(visual, reference, strength=1.0)


class Tower(nn.Module):
    """A layer that is aligned, alone."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x)


def batch_norm(channels=3):
    norm = nn.BatchNorm2d(channels).eval()
    norm.running_mean += torch.tensor([1.0, -2.0, 0.5])
    norm.running_var *= torch.tensor([4.0, 0.25, 1.0])
    return norm


def shifted(n=8, seed=0):
    x = torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([0.5, 3.0, 1.0]).view(3, 1, 1) + 2


def alike(x):
    """Eight times the same image: what it differs by from the reference cannot be chance."""
    return x[:1].expand(8, -1, -1, -1)


def exactly(mean, variance, count):
    """Moments that chance had no part in."""
    nothing = torch.zeros_like(mean).bfloat16()
    return Moments(mean, variance, nothing, nothing, count)


def per_channel(x):
    return x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)


def measured(alignment, tower, x, prior=None, align=True):
    with alignment.measured(prior, align=align) as found:
        out = tower(x)
    moments = found[0].moments()
    return moments if prior is None else prior.merged(moments), out


def test_merged_moments_are_those_of_all_images_together():
    x = shifted(12)
    parts = [exactly(*per_channel(part), count=len(part)) for part in (x[:3], x[3:])]
    merged = parts[0].merged(parts[1])
    assert merged.count == 12
    for ours, direct in zip((merged.mean, merged.variance), per_channel(x), strict=True):
        assert torch.allclose(ours, direct, atol=1e-5)


def test_measuring_finds_mean_and_variance_of_each_channel():
    tower, x = Tower(batch_norm()), shifted()
    moments, _ = measured(Alignment(tower), tower, x)
    mean, variance = per_channel(x)
    assert torch.allclose(moments.mean, mean, atol=1e-5)
    assert torch.allclose(moments.variance, variance, atol=1e-4)
    assert moments.count == 8


def test_an_aligned_batch_norm_normalises_with_the_batchs_own_statistics():
    tower, x = Tower(batch_norm()), alike(shifted())
    alignment = Alignment(tower)
    moments, while_measuring = measured(alignment, tower, x)
    with alignment.applied(alignment.affine(moments)):
        aligned = tower(x)
    oracle = F.batch_norm(x, None, None, tower.norm.weight, tower.norm.bias, training=True)
    assert torch.allclose(aligned, oracle, atol=1e-4)
    assert torch.allclose(while_measuring, oracle, atol=1e-4)


def test_a_whole_tower_aligned_to_a_batch_is_the_tower_in_training_mode(monkeypatch):
    monkeypatch.setattr("agent.adapt.alignment._error", lambda spread, _: torch.zeros_like(spread))
    monkeypatch.setattr("agent.adapt.alignment._PLACES", 1000)
    encoder, x = tiny_encoder("batch_norm"), pictures(16, 1) * 0.5
    _, aligned = measured(Alignment(encoder.visual), encoder.encode_image, x)
    for module in encoder.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    assert torch.allclose(aligned, encoder.encode_image(x), atol=1e-3)


@pytest.mark.parametrize("architecture", ["batch_norm", "layer_norm"])
def test_what_was_measured_gives_the_same_when_applied(architecture):
    encoder = tiny_encoder(architecture)
    alignment = Alignment(encoder.visual, tiny_reference(encoder).moments)
    x = pictures(8, 1) * 0.4
    moments, while_measuring = measured(alignment, encoder.encode_image, x)
    with alignment.applied(alignment.affine(moments)):
        aligned = encoder.encode_image(x)
    assert torch.allclose(aligned, while_measuring, atol=1e-4)
    assert not torch.allclose(aligned, encoder.encode_image(x), atol=1e-2)


def test_a_layer_norm_maps_the_measured_moments_to_the_reference():
    tower = Tower(nn.LayerNorm(3))
    reference = exactly(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([4.0, 1.0, 0.25]), 9)
    x = torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1)
    _, out = measured(Alignment(tower, reference), tower, x)
    assert torch.allclose(out.mean(dim=(0, 1)), reference.mean, atol=1e-4)
    assert torch.allclose(out.var(dim=(0, 1), correction=0), reference.variance, atol=1e-3)


def test_a_layer_norm_over_channels_in_second_place_is_measured_there():
    tower = Tower(LayerNorm2d(3))
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    moments, out = measured(Alignment(tower), tower, x)
    assert torch.allclose(moments.mean, out.mean(dim=(0, 2, 3)), atol=1e-5)


def test_a_vision_transformer_is_measured_without_a_reference():
    encoder = tiny_encoder("layer_norm")
    alignment = Alignment(encoder.visual)
    moments, out = measured(alignment, encoder.encode_image, pictures(4, 1))
    seen = []
    encoder.visual.ln_post.register_forward_hook(lambda *a: seen.append(a[2]))
    assert torch.equal(out, encoder.encode_image(pictures(4, 1)))
    assert moments.count == 4
    assert torch.allclose(moments.mean[-32:], seen[0].flatten(0, -2).mean(dim=0), atol=1e-5)


def test_without_a_reference_a_vision_transformer_cannot_be_aligned():
    encoder = tiny_encoder("layer_norm")
    alignment = Alignment(encoder.visual)
    moments, _ = measured(alignment, encoder.encode_image, pictures(4, 1))
    with alignment.applied(alignment.affine(moments)):
        assert torch.equal(encoder.encode_image(pictures(4, 2)), _plain(encoder, pictures(4, 2)))


def _plain(encoder, x):
    return tiny_encoder(encoder.name.removeprefix("tiny-")).encode_image(x)


def test_rows_that_are_not_images_are_left_alone():
    tower = Tower(nn.LayerNorm(3))
    alignment = Alignment(tower, exactly(torch.ones(3), torch.ones(3), 9))
    images, queries = torch.randn(2, 4, 3), torch.randn(5, 3)
    with alignment.measured():
        tower(images)
        assert torch.equal(tower(queries), F.layer_norm(queries, (3,)))


def test_departures_are_undone_in_part_as_by_a_prior_of_half_as_many_images():
    """Schneider et al. 2020: the source's statistics count for 16 images beside 32."""
    tower, x = Tower(batch_norm()), alike(shifted())
    alignment = PartialAlignment(tower)
    _, partly = measured(alignment, tower, x)
    mean, variance = per_channel(x)
    norm = tower.norm
    mixed = F.batch_norm(
        x,
        norm.running_mean / 3 + mean * 2 / 3,
        norm.running_var / 3 + variance * 2 / 3,
        norm.weight,
        norm.bias,
    )
    assert torch.allclose(partly, mixed, atol=1e-3)


def test_a_sample_may_leave_images_out():
    x = shifted(12)
    sample = Sample(x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0))
    rows = torch.arange(12) % 3 == 0
    moments = sample.moments(rows)
    assert moments.count == 4
    for ours, direct in zip((moments.mean, moments.variance), per_channel(x[rows]), strict=True):
        assert torch.allclose(ours, direct, atol=1e-5)


def test_large_maps_are_measured_in_places():
    tower = Tower(batch_norm())
    x = torch.randn(4, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    moments, _ = measured(Alignment(tower), tower, x, align=False)
    mean, variance = per_channel(x[:, :, ::5, ::5])
    assert torch.allclose(moments.mean, mean, atol=1e-5)
    assert torch.allclose(moments.variance, variance, atol=1e-4)


def test_of_a_large_batch_every_other_image_is_measured():
    tower, x = Tower(batch_norm()), shifted(32)
    alignment = Alignment(tower)
    with alignment.measured(align=False) as found:
        tower(x)
    assert found[0].moments().count == 16
    odd = torch.arange(32) % 2 == 1  # which were not
    odd[:4] = True
    moments = found[0].moments(odd)
    assert moments.count == 2
    assert torch.allclose(moments.mean, x[:4:2].mean(dim=(0, 2, 3)), atol=1e-5)


def test_chance_is_not_taken_for_a_domain():
    """James and Stein, positive part: departures of as much energy as their error are nothing."""
    alignment = Alignment(
        Tower(nn.BatchNorm2d(1).eval()), exactly(torch.zeros(1), torch.ones(1), 0)
    )
    error = torch.tensor([0.04])  # of the mean, at 100 images
    for mean, kept in ((0.1, 0.0), (0.2, 0.0), (0.4, 0.75), (2.0, 0.99)):
        moments = Moments(torch.tensor([mean]), torch.ones(1), 100 * error, torch.zeros(1), 100)
        assert float(alignment.affine(moments).shift) == pytest.approx(-kept * mean, abs=1e-3)


def test_the_reference_may_err_too():
    tower = Tower(nn.BatchNorm2d(1).eval())
    zero, one = torch.zeros(1), torch.ones(1)
    alignment = Alignment(tower, Moments(zero, one, 2 * one, zero, 100))
    shift = alignment.affine(Moments(0.2 * one, one, 2 * one, zero, 100)).shift
    assert float(shift) == pytest.approx(0.0, abs=1e-4)


def test_nothing_is_applied_outside_even_after_an_error():
    tower, x = Tower(batch_norm()), shifted()
    alignment = Alignment(tower)
    before = tower(x)
    moments, _ = measured(alignment, tower, x)
    with pytest.raises(RuntimeError), alignment.applied(alignment.affine(moments)):
        raise RuntimeError
    assert torch.equal(tower(x), before)


@pytest.mark.parametrize("architecture", ["batch_norm", "layer_norm"])
def test_looking_changes_nothing(architecture):
    encoder = tiny_encoder(architecture)
    x = pictures(4, 1)
    before = encoder.encode_image(x)
    alignment = Alignment(encoder.visual, tiny_reference(encoder).moments)
    _, while_looking = measured(alignment, encoder.encode_image, x, align=False)
    assert torch.equal(while_looking, before)


@pytest.mark.parametrize("architecture", ["batch_norm", "layer_norm"])
def test_a_domain_like_the_reference_is_almost_the_identity(architecture):
    encoder = tiny_encoder(architecture)
    normal = pictures(64, 0)
    look = Alignment(encoder.visual)
    reference, before = measured(look, encoder.encode_image, normal, align=False)
    _, aligned = measured(Alignment(encoder.visual, reference), encoder.encode_image, normal)
    assert F.cosine_similarity(aligned, before).min() > 0.99


def test_older_statistics_count_by_their_images():
    tower, x = Tower(batch_norm()), shifted()
    alignment = Alignment(tower)
    prior = exactly(torch.zeros(3), torch.ones(3), count=24)
    both, _ = measured(alignment, tower, x, prior)
    assert both.count == 32
    assert torch.allclose(both.mean, per_channel(x)[0] * 8 / 32, atol=1e-5)


def test_a_batch_norm_without_running_statistics_is_refused():
    with pytest.raises(ModelError, match="running statistics"):
        Alignment(Tower(nn.BatchNorm2d(3, affine=True, track_running_stats=False)))


def test_layers_are_put_back_when_one_cannot_be_folded(monkeypatch):
    tower = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3))
    alignment = Alignment(tower, exactly(torch.ones(6), torch.ones(6), 9))
    affine = alignment.affine(exactly(torch.zeros(6), torch.ones(6), 9))
    monkeypatch.setattr(alignment._sites[1], "fold", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), alignment.applied(affine):
        pass
    assert torch.equal(tower[0].bias, torch.zeros(3))


def test_a_channel_that_a_domain_makes_constant_stays_finite():
    tower = Tower(nn.BatchNorm2d(1).eval())
    tower.norm.running_var.fill_(1e-4)
    alignment = Alignment(tower, exactly(torch.zeros(1), torch.full((1,), 3000.0), 0))
    with alignment.applied(alignment.affine(exactly(torch.zeros(1), torch.zeros(1), 0))):
        assert torch.isfinite(tower(torch.ones(2, 1, 3, 3))).all()


def test_an_activation_inside_a_layer_norm_is_left_alone():
    assert len(Alignment(Tower(LayerNormAct2d(3)))._sites) == 0


def test_the_spread_of_images_measured_one_by_one_is_that_of_all_together():
    x = shifted(24)
    x = x + torch.randn(24, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    sample = Sample(x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0))
    whole = sample.moments()
    one_by_one = Sample(sample.mean_NC[:1], sample.variance_NC[:1]).moments()
    for row in range(1, 24):
        rows = slice(row, row + 1)
        alone = Sample(sample.mean_NC[rows], sample.variance_NC[rows]).moments()
        one_by_one = one_by_one.merged(alone)
    ratio = one_by_one.mean_spread.float() / whole.mean_spread.float()
    assert torch.allclose(ratio, torch.ones(3), atol=0.15)
