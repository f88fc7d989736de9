import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from agent.config import ModelConfig
from agent.encode import load
from agent.errors import MissingAsset
from agent.models import build_vit

COLOURS = {"dark": 40, "grey": 120, "light": 210}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes that a few steps tell apart."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, level in COLOURS.items():
        (folder / name).mkdir()
        for number in range(24):
            pixels = np.clip(level + rng.normal(0, 10, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def built(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("vit")
    build_vit.main(pictures, out, test=pictures, epochs=40.0, seed=0)
    return out


def test_it_learns(built):
    assert json.loads((built / "manifest.json").read_text())["top1"] > 60


def test_the_agent_loads_what_was_built(built):
    config = ModelConfig(name=f"local-dir:{built}", labels=list(COLOURS), device="cpu")
    encoder = load(config)
    assert encoder.preprocess.size == 224
    assert encoder.tunes_prompts
    assert any(isinstance(m, torch.nn.LayerNorm) for m in encoder.visual.modules())
    assert encoder.encode_labels(config.labels, ["a {}"]).shape == (1, 3, 128)


def test_the_saved_model_sees_enlarged_pictures_as_it_was_trained(built):
    encoder = load(ModelConfig(name=f"local-dir:{built}", labels=["a", "b"], device="cpu"))
    small = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    large = Image.fromarray(small).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(large)).permute(2, 0, 1)[None].float() / 255
    seen = pixels.mul(2).sub(1).unflatten(2, (32, 7)).unflatten(4, (32, 7)).mean(dim=(3, 5))
    trained_on = build_vit.standard(
        torch.from_numpy(small).permute(2, 0, 1)[None], build_vit.there_and_back()
    )
    # Enlarging rounds and clips to eight bits.
    assert (seen - trained_on).abs().mean() < 0.01
    embedding = encoder.visual.conv1.weight
    blocks = embedding.unflatten(2, (4, 7)).unflatten(4, (4, 7))
    assert torch.equal(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks))


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(MissingAsset, match="holds no images"):
        build_vit.read(tmp_path, Console(quiet=True))


def test_the_test_images_must_be_of_the_same_classes(pictures, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "other" / "0.png")
    with pytest.raises(MissingAsset, match="other classes"):
        build_vit.main(pictures, tmp_path / "out", test=tmp_path, epochs=0.01)
