import functools
import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from agent import encode
from agent.config import ModelConfig
from agent.encode import Encoder, load
from agent.errors import IncompatibleCheckpoint, MissingAsset, ModelError
from agent.testing import LABELS, pictures, tiny_encoder

NAME = "tiny-vit"
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
WIDER = ARCHITECTURE | {"embed_dim": 24}
LOOKS_AHEAD = ARCHITECTURE | {
    "text_cfg": ARCHITECTURE["text_cfg"] | {"no_causal_mask": True, "pool_type": "last"},
    "custom_text": True,
}
POOLS_LAST = ARCHITECTURE | {
    "text_cfg": ARCHITECTURE["text_cfg"] | {"pool_type": "last"},
    "custom_text": True,
}
APPENDS_A_CLASS = ARCHITECTURE | {
    "text_cfg": ARCHITECTURE["text_cfg"] | {"context_length": 76, "embed_cls": True},
    "custom_text": True,
}


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    """Small architectures beside open_clip's own; one has a tag on the hub."""
    configs = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setitem(configs, NAME, ARCHITECTURE)
    monkeypatch.setitem(configs, "tiny-wide", WIDER)
    monkeypatch.setitem(configs, "tiny-ahead", LOOKS_AHEAD)
    monkeypatch.setitem(configs, "tiny-last", POOLS_LAST)
    monkeypatch.setitem(configs, "tiny-class", APPENDS_A_CLASS)
    tags = {"hub": open_clip.pretrained._pcfg(hf_hub="somebody/tiny/", quick_gelu=True)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, tags)


def config(name=NAME, pretrained="hub", **options):
    return ModelConfig(name=name, pretrained=str(pretrained), device="cpu", **options)


@functools.cache
def weights(name=NAME):
    torch.manual_seed(0)
    return open_clip.create_model(name).state_dict()


@pytest.fixture
def checkpoint(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def gelus(encoder):
    kinds = {type(module) for module in encoder.visual.modules()}
    return kinds & {torch.nn.GELU, open_clip.transformer.QuickGELU}


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state, "epoch": 3}])
def test_a_local_state_dict_is_loaded(tmp_path, checkpoint, wrap):
    torch.save(wrap(weights()), tmp_path / "model.pt")
    encoder = load(config(pretrained=tmp_path / "model.pt"))
    features = encoder.encode_image(pictures(3, 1))
    assert torch.allclose(features.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert torch.equal(features, load(config(pretrained=checkpoint)).encode_image(pictures(3, 1)))


def test_an_architecture_of_open_clip_loads_from_a_file(tmp_path):
    save_file(weights("ViT-S-32"), tmp_path / "small.safetensors")
    encoder = load(config("ViT-S-32", tmp_path / "small.safetensors"))
    features = encoder.encode_image(torch.rand(1, 3, 224, 224))
    assert encoder.preprocess.size == 224
    assert features.norm().item() == pytest.approx(1, abs=1e-5)


def test_what_is_loaded_is_frozen(checkpoint):
    encoder = load(config(pretrained=checkpoint))
    assert not any(parameter.requires_grad for parameter in encoder.visual.parameters())
    assert not encoder.visual.training


def test_an_unknown_architecture_suggests_others():
    with pytest.raises(ModelError, match=r"did you mean.*ViT-B-16"):
        load(config("VIT-B16"))
    with pytest.raises(ModelError, match=r"did you mean \w"):
        load(config("!"))


def test_a_missing_file_names_the_tags():
    with pytest.raises(MissingAsset, match=r"neither a file nor a tag.*hub"):
        load(config(pretrained="/nowhere/model.pt"))


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint):
    with pytest.raises(IncompatibleCheckpoint, match=r"do not fit tiny-wide.*model\.name"):
        load(config("tiny-wide", checkpoint))


class Code:
    """What a pickle may run when it is read."""

    def __reduce__(self):
        return (pytest.fail, ("the checkpoint's code was run",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"weights": Code()}, tmp_path / "model.pt")
    with pytest.raises(IncompatibleCheckpoint, match="without code"):
        load(config(pretrained=tmp_path / "model.pt"))


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError):
        load(config(pretrained=tmp_path / name))


def test_half_precision_on_the_cpu_is_refused(checkpoint):
    with pytest.raises(ModelError, match="bf16 or fp32"):
        load(config(pretrained=checkpoint, precision="fp16"))


def test_cuda_without_a_device_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no CUDA device"):
        load(ModelConfig(name=NAME, pretrained=str(checkpoint), device="cuda"))
    auto = load(ModelConfig(name=NAME, pretrained=str(checkpoint), device="auto"))
    assert auto.device.type == "cpu"


def unreachable(*args, **kwargs):
    raise ConnectionError("name resolution failed")


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", unreachable)
    with pytest.raises(ModelError, match=r"cannot be reached.*model\.pretrained its path.*offline"):
        load(config())


def test_an_offline_hub_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot be reached"):
        load(config())


def test_a_tag_comes_with_its_activation(monkeypatch, checkpoint):
    here = functools.partial(str, checkpoint)
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", lambda *a, **k: here())
    assert gelus(load(config())) == {open_clip.transformer.QuickGELU}
    assert gelus(load(config(pretrained=checkpoint))) == {torch.nn.GELU}


def test_a_tokenizer_that_needs_another_package_says_so(monkeypatch, checkpoint):
    def missing(name):
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr(open_clip, "get_tokenizer", missing)
    with pytest.raises(MissingAsset, match="pip install transformers"):
        load(config(pretrained=checkpoint))


def test_a_tokenizer_that_cannot_be_fetched_says_so(monkeypatch, checkpoint):
    monkeypatch.setattr(open_clip, "get_tokenizer", unreachable)
    with pytest.raises(ModelError, match=r"tokenizer.*network"):
        load(config(pretrained=checkpoint))


def test_a_missing_offline_checkpoint_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(encode, "OFFLINE", tmp_path)
    with pytest.raises(MissingAsset, match=r"agent\.models\.build"):
        load(ModelConfig(device="cpu"))


def test_bfloat16_is_close_to_float32(checkpoint):
    exact, rough = (
        load(config(pretrained=checkpoint, precision=precision)).encode_image(pictures(8, 1))
        for precision in ("fp32", "bf16")
    )
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert (exact * rough).sum(dim=-1).min() > 0.995


def test_pixels_are_scaled_and_turned():
    image = torch.arange(32 * 32 * 3).remainder(256).to(torch.uint8).view(32, 32, 3)
    pixels = tiny_encoder().to_device([image.numpy()] * 2)
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels[1, 2, 5, 7] * 255 == pytest.approx(float(image[5, 7, 2]))


def test_the_image_tower_sees_standardised_pixels(checkpoint):
    encoder = load(config(pretrained=checkpoint))
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (encoder.preprocess.mean, encoder.preprocess.std)
    )
    expected = encoder._model.encode_image((pictures(2, 1) - mean) / std, normalize=True)
    assert torch.allclose(encoder.encode_image(pictures(2, 1)), expected, atol=1e-6)


def test_the_fingerprint_is_of_the_weights():
    assert tiny_encoder(seed=0).fingerprint == tiny_encoder(seed=0).fingerprint
    assert tiny_encoder(seed=0).fingerprint != tiny_encoder(seed=1).fingerprint


def test_labels_are_encoded_in_every_template_and_told_of():
    told = []
    text = tiny_encoder().encode_labels(LABELS, ["a {}.", "{}!"], lambda *n: told.append(n))
    assert text.shape == (2, 4, 24)
    assert torch.allclose(
        text[1, 2], tiny_encoder().encode_labels(["truck"], ["{}!"])[0, 0], atol=1e-6
    )
    assert told == [(8, 8)]


def test_braces_in_a_template_or_a_label_are_text():
    assert tiny_encoder().encode_labels(["a {0} b"], ["a {} :}"]).shape == (1, 1, 24)


@pytest.mark.parametrize("name", [NAME, "tiny-ahead", "tiny-last", "tiny-class"])
def test_labels_are_encoded_as_open_clip_does(tmp_path, name):
    save_file(weights(name), tmp_path / "model.safetensors")
    encoder: Encoder = load(config(name, tmp_path / "model.safetensors"))
    tokens = open_clip.get_tokenizer(name)([f"a {label}" for label in LABELS])
    expected = encoder._model.encode_text(tokens, normalize=True)
    assert torch.allclose(encoder.encode_labels(LABELS, ["a {}"])[0], expected, atol=1e-5)
    assert encoder.tunes_prompts == (name == NAME)


def folder(tmp_path, name=NAME, text=None):
    """A checkpoint as open_clip saves it in a folder."""
    described = {"model_cfg": ARCHITECTURE, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(text or json.dumps(described))
    save_file(weights(name), tmp_path / "open_clip_model.safetensors")
    return ModelConfig(name=f"local-dir:{tmp_path}", device="cpu")


def test_a_folder_is_a_checkpoint(tmp_path, checkpoint):
    from_folder = load(folder(tmp_path))
    from_file = load(config(pretrained=checkpoint))
    features = from_folder.encode_image(pictures(2, 0))
    assert features.shape == (2, 16)
    assert torch.equal(
        from_folder.encode_labels(LABELS, ["a {}"]), from_file.encode_labels(LABELS, ["a {}"])
    )


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(MissingAsset, match=r"no open_clip_config\.json in .*local-dir:FOLDER"):
        load(ModelConfig(name=f"local-dir:{tmp_path}", device="cpu"))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": {}}', '{"model_cfg": 1, "x": 2}'])
def test_a_folder_whose_description_is_broken_is_refused(tmp_path, text):
    with pytest.raises(IncompatibleCheckpoint, match="is not open_clip's"):
        load(folder(tmp_path, text=text))


def test_a_folder_whose_colours_are_not_three_is_refused(tmp_path):
    described = {"model_cfg": ARCHITECTURE, "preprocess_cfg": {"mean": [0.5], "std": [0.5] * 3}}
    with pytest.raises(IncompatibleCheckpoint, match="three colours"):
        load(folder(tmp_path, text=json.dumps(described)))


def test_a_folder_whose_vocabulary_is_broken_is_refused(tmp_path):
    (tmp_path / "vocabulary.json").write_text("{")
    with pytest.raises(IncompatibleCheckpoint, match="no list of tokens"):
        load(folder(tmp_path))


def test_a_folder_whose_weights_do_not_fit_is_refused(tmp_path):
    with pytest.raises(IncompatibleCheckpoint):
        load(folder(tmp_path, name="tiny-wide"))


def test_a_folder_needs_no_pretrained(tmp_path):
    with pytest.raises(ValueError, match="has its own weights"):
        ModelConfig(name=f"local-dir:{tmp_path}", pretrained="openai")
