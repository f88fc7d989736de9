import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from agent.models.build import TEXT_CFG, absorb_scale, conv_norm_pairs, pack, to_int8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_each_channel_uses_the_whole_range():
    weight = torch.tensor([[0.5, -1.0], [100.0, 50.0]])
    integers, scale = to_int8(weight, per_channel=True)
    assert integers.tolist() == [[64, -127], [127, 64]]
    assert scale.tolist() == pytest.approx([1 / 127, 100 / 127])


def test_one_scale_serves_the_whole_tensor():
    integers, scale = to_int8(torch.tensor([[0.5, -1.0], [100.0, 50.0]]), per_channel=False)
    assert integers.tolist() == [[1, -1], [127, 64]]
    assert scale.tolist() == pytest.approx([100 / 127])


def test_rounding_is_off_by_half_a_step_at_most():
    weight = torch.randn(8, 3, 3, 3)
    integers, scale = to_int8(weight, per_channel=True)
    restored = integers * scale.view(-1, 1, 1, 1)
    assert ((restored - weight).abs() <= scale.view(-1, 1, 1, 1) * 0.501).all()


def test_a_channel_of_zeros_stays_zero():
    integers, scale = to_int8(torch.zeros(2, 4), per_channel=True)
    assert integers.abs().sum() == 0
    assert (scale > 0).all()


def batch_norm(channels):
    norm = nn.BatchNorm2d(channels, eps=1e-3).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("size", [0.01, 1.0, 1000.0])
@torch.no_grad()
def test_integers_behind_an_absorbed_scale_are_the_same_function(size):
    conv, norm = nn.Conv2d(3, 8, 3, bias=False), batch_norm(8)
    conv.weight *= size
    norm.running_var *= size**2
    x = torch.randn(4, 3, 9, 9)
    expected = norm(conv(x))
    state = {f"bn.{name}": value.clone() for name, value in norm.state_dict().items()}
    integers, scale = to_int8(conv.weight, per_channel=True)
    conv.weight.copy_(integers)
    absorb_scale(state, "bn", scale, norm.eps)
    norm.load_state_dict({name.removeprefix("bn."): value for name, value in state.items()})
    assert (norm(conv(x)) - expected).abs().max() < 0.02 * expected.abs().max()


def test_each_convolution_is_paired_with_the_norm_behind_it():
    trunk = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    assert conv_norm_pairs(trunk) == [("0", "1"), ("3", "4")]


def test_a_convolution_without_a_norm_is_refused():
    with pytest.raises(ValueError, match="zip"):
        conv_norm_pairs(nn.Sequential(nn.Conv2d(3, 4, 1)))


@torch.no_grad()
def test_the_packed_checkpoint_is_the_same_model():
    trunk = {"timm_model_name": "tf_efficientnet_lite0", "timm_model_pretrained": False}
    vision = trunk | {"timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    text = TEXT_CFG | {"vocab_size": 50}
    model = open_clip.model.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text).eval()
    images, tokens = (
        torch.randn(4, 3, 64, 64),
        torch.randint(1, 50, (6, TEXT_CFG["context_length"])),
    )
    before = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    packed = pack(model)
    model.load_state_dict(packed)
    after = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    assert packed["token_embedding.weight"].dtype == torch.int8
    for one, other in zip(before, after, strict=True):
        assert F.cosine_similarity(one, other).min() > 0.99
