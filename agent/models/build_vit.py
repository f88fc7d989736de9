"""Train a small CLIP with a vision transformer: ``python -m agent.models.build_vit FOLDER``.

The offline checkpoint's image tower normalises by BatchNorm; most CLIP models are transformers that
normalise by LayerNorm. This makes one of those to measure the agent on, from small labelled images
such as CIFAR-10's (one folder a class). It is not shipped.

The transformer is trained on 32 x 32 pixels and saved as a model for 224 x 224, whose patch
embedding averages over blocks of 7 x 7: it sees then what it was trained on, and whatever befalls a
picture of the usual size befalls its input. Half of the patches are left out in training, which
makes it twice as fast (FLIP, Li et al. 2023).
"""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from agent.bench.photos import IMAGE_SUFFIXES, label_of
from agent.errors import MissingAsset

SIZE, PATCH = 32, 4
#: How much larger the pictures are that the saved model takes.
ENLARGED = 7
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": SIZE,
        "patch_size": PATCH,
        "width": 128,
        "layers": 6,
        "head_width": 32,
        "mlp_ratio": 4.0,
        "patch_dropout": 0.5,
    },
    "text_cfg": {"context_length": 32, "width": 128, "heads": 4, "layers": 2, "vocab_size": 49408},
}
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
#: Share of the steps in which the learning rate rises.
WARMUP = 0.05


def main(
    images: Annotated[Path, typer.Argument(help="Training images, one folder a class.")],
    out: Annotated[Path, typer.Option(help="Folder to write, for model.name: local-dir:OUT.")],
    test: Annotated[
        Path | None, typer.Option(help="Images to measure accuracy on, likewise.")
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the images.")] = 25.0,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
) -> None:
    """Train both towers from scratch and write OUT."""
    console = Console(stderr=True)
    random.seed(seed)
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels_NCHW, labels_N, names = read(images, console)
    held_out = None if test is None else read(test, console)
    if held_out is not None and held_out[2] != names:
        raise MissingAsset(f"{test} has other classes than {images}")
    model = open_clip.model.CLIP(**MODEL_CFG).to(device)
    steps = max(1, round(epochs * len(pixels_NCHW) / BATCH_SIZE))
    started = time.monotonic()
    train(model, pixels_NCHW, labels_N, names, steps, console)
    manifest: dict[str, Any] = {
        "images": len(pixels_NCHW),
        "classes": names,
        "steps": steps,
        "seed": seed,
        "build_minutes": round((time.monotonic() - started) / 60, 1),
    }
    if held_out is not None:
        manifest["top1"] = measure(model, held_out[0], held_out[1], names)
    save(model, out)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    console.print_json(data=manifest)


def read(folder: Path, console: Console) -> tuple[Tensor, Tensor, list[str]]:
    """Pictures (N, 3, 32, 32) as uint8, the class of each, and the names of the classes.

    Raises:
        MissingAsset: there are none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise MissingAsset(f"{folder} holds no images")
    names = sorted({label_of(path, folder) for path in paths})
    labels = [names.index(label_of(path, folder)) for path in paths]
    pixels = np.empty((len(paths), 3, SIZE, SIZE), np.uint8)
    with Progress(console=console, transient=True) as progress:
        for place, path in enumerate(progress.track(paths, description=f"reading {folder}")):
            with Image.open(path) as image:
                small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            pixels[place] = np.asarray(small).transpose(2, 0, 1)
    return torch.from_numpy(pixels), torch.tensor(labels), names


def there_and_back() -> Tensor:
    """What enlarging (bicubic, as the agent does it) and averaging over blocks do to a row."""
    unit = np.eye(SIZE, dtype=np.float32)
    columns = [
        np.asarray(
            Image.fromarray(row[None]).resize((SIZE * ENLARGED, 1), Image.Resampling.BICUBIC)
        )
        for row in unit
    ]
    enlarging = torch.from_numpy(np.concatenate(columns))  # (small, large)
    return enlarging.view(SIZE, SIZE, ENLARGED).mean(dim=-1).T.contiguous()


def standard(pixels_BCHW: Tensor, smoothing: Tensor) -> Tensor:
    """Training pictures as the saved model's patch embedding will see them, around zero."""
    standard_BCHW = pixels_BCHW.float().div(127.5).sub(1)
    return smoothing @ standard_BCHW @ smoothing.T


def augmented(pixels_BCHW: Tensor) -> Tensor:
    """Shifted by up to four pixels and mirrored, one shift for the batch and a coin an image."""
    down, right = random.randrange(9), random.randrange(9)
    padded = F.pad(pixels_BCHW.float(), (4, 4, 4, 4), mode="reflect")
    moved = padded[..., down : down + SIZE, right : right + SIZE]
    mirror = torch.rand(len(moved), 1, 1, 1, device=moved.device) < 0.5
    return torch.where(mirror, moved.flip(-1), moved)


def train(
    model: Any,
    pixels_NCHW: Tensor,
    labels_N: Tensor,
    names: list[str],
    steps: int,
    console: Console,
) -> None:
    """Cross-entropy of each image over the classes' prompts, in a template drawn anew each step.

    That is CLIP's loss where many images of a batch share a caption (UniCL, Yang et al. 2022).
    """
    device = model.logit_scale.device
    smoothing = there_and_back().to(device)
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL_CFG["text_cfg"]["context_length"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=WARMUP
    )
    model.train()
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    recent = math.nan
    order = torch.empty(0, dtype=torch.long)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss=recent)
        for _ in range(steps):
            if len(order) < BATCH_SIZE:
                order = torch.randperm(len(pixels_NCHW))
            rows, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
            inputs = standard(augmented(pixels_NCHW[rows].to(device)), smoothing)
            template = random.choice(open_clip.OPENAI_IMAGENET_TEMPLATES)
            tokens = tokenizer([template(name) for name in names]).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                image_BD, text_KD, scale = model(inputs, tokens)
                logits_BK = scale * image_BD @ text_KD.T
            loss = F.cross_entropy(
                logits_BK.float(), labels_N[rows].to(device), label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            recent = loss.item() if math.isnan(recent) else 0.98 * recent + 0.02 * loss.item()
            progress.update(task, advance=1, loss=recent)
    model.eval()


@torch.no_grad()
def measure(model: Any, pixels_NCHW: Tensor, truth_N: Tensor, names: list[str]) -> float:
    """Top-1 in percent, with the ensemble of all templates."""
    device = model.logit_scale.device
    smoothing = there_and_back().to(device)
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL_CFG["text_cfg"]["context_length"])
    text_KD = torch.stack(
        [
            model.encode_text(
                tokenizer([t(name) for t in open_clip.OPENAI_IMAGENET_TEMPLATES]).to(device),
                normalize=True,
            ).mean(dim=0)
            for name in names
        ]
    )
    text_KD = F.normalize(text_KD, dim=-1)
    right = 0
    for rows in torch.split(torch.arange(len(pixels_NCHW)), BATCH_SIZE):
        inputs = standard(pixels_NCHW[rows].to(device), smoothing)
        predicted = (model.encode_image(inputs) @ text_KD.T).argmax(dim=-1).cpu()
        right += int((predicted == truth_N[rows]).sum())
    return round(100 * right / len(pixels_NCHW), 2)


def save(model: Any, out: Path) -> None:
    """The model for enlarged pictures, as a folder that open_clip loads by itself."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    embedding = state["visual.conv1.weight"]
    enlarged = embedding.repeat_interleave(ENLARGED, dim=2).repeat_interleave(ENLARGED, dim=3)
    state["visual.conv1.weight"] = enlarged / ENLARGED**2
    vision_cfg = MODEL_CFG["vision_cfg"] | {
        "image_size": SIZE * ENLARGED,
        "patch_size": PATCH * ENLARGED,
    }
    del vision_cfg["patch_dropout"]  # it was for training
    config = {
        "model_cfg": MODEL_CFG | {"vision_cfg": vision_cfg},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / "open_clip_model.safetensors")
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
