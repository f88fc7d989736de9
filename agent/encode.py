"""The frozen dual encoder. Together with `models`, the only importer of open_clip."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from agent import text_tower
from agent.config import LOCAL_DIR, ModelConfig
from agent.errors import IncompatibleCheckpoint, MissingAsset, ModelError
from agent.models.vocabulary import CompactTokenizer, Tokenizer

OFFLINE = Path(__file__).parent / "models" / "offline"
#: How many prompts go through the text tower at once; bounds memory at thousands of labels.
TEXT_BATCH = 512

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Preprocess:
    """What the checkpoint expects of an image.

    `crop_ratio` is the share of the short side that the square crop keeps; `mean` and `std` are of
    RGB values scaled to [0, 1].
    """

    size: int
    crop_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The labels as sequences of token embeddings with places for context vectors.

    `embedded_KLW` holds start token, context vectors, the label's tokens and the end token;
    `context_MW` is what stands at positions 1 to M, "a photo of a".
    """

    embedded_KLW: Tensor
    end_K: Tensor
    context_MW: Tensor


class Encoder:
    """An open_clip model that is never trained, and what is needed to talk to it.

    Attributes:
        visual: the image tower, for strategies that look inside it.
        logit_scale: the factor from cosine similarity to logits, as the checkpoint has it.
        fingerprint: hash of weights and preprocessing, hexadecimal.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        *,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.name = name
        self.preprocess = preprocess
        self.device = device
        self.visual: torch.nn.Module = model.visual
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.fingerprint = _fingerprint(model, preprocess)
        self._model = model
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._mean_C = torch.tensor(preprocess.mean, device=device).view(1, 3, 1, 1)
        self._std_C = torch.tensor(preprocess.std, device=device).view(1, 3, 1, 1)

    def with_own_visual(self) -> Encoder:
        """The same encoder over a copy of the image tower, for methods that train its weights."""
        model = copy.copy(self._model)
        model._modules = dict(self._model._modules)
        model.visual = copy.deepcopy(self.visual)
        twin = copy.copy(self)
        twin._model = model
        twin.visual = model.visual
        return twin

    def to_device(self, pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Stack images of shape (H, W, 3) into (B, 3, H, W), floats in [0, 1], on the device."""
        batch_BHWC = torch.from_numpy(np.stack(pixels)).to(self.device)
        return batch_BHWC.permute(0, 3, 1, 2).to(torch.float32).div_(255)

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit features (B, D), float32, of images in [0, 1]."""
        standard_BCHW = ((pixels_BCHW - self._mean_C) / self._std_C).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            features_BD = self._model.encode_image(standard_BCHW)
        return F.normalize(features_BD.float(), dim=-1)

    @torch.no_grad()
    def encode_labels(
        self,
        labels: Sequence[str],
        templates: Sequence[str],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Tensor:
        """Unit text features (T, K, D) of every label in every template.

        `progress` is told how many prompts of how many are done.
        """
        # Not str.format: a stray brace in a template is text.
        texts = [template.replace("{}", label) for template in templates for label in labels]
        parts = []
        for start in range(0, len(texts), TEXT_BATCH):
            parts.append(self._encode_texts(texts[start : start + TEXT_BATCH]))
            progress(min(start + TEXT_BATCH, len(texts)), len(texts))
        return torch.cat(parts).view(len(templates), len(labels), -1)

    def unknown_labels(self, labels: Sequence[str]) -> list[str]:
        """Labels with words that the offline checkpoint was never taught; none for other models."""
        if isinstance(self._tokenizer, CompactTokenizer):
            return self._tokenizer.unknown(labels)
        return []

    @property
    def tunes_prompts(self) -> bool:
        """Whether the text tower is CLIP's own transformer, which runs from embeddings.

        Towers that look ahead (SigLIP, CLIPA, some MobileCLIP), that pool elsewhere than at the
        largest token id, or that append a class token (CoCa) only run from whole token sequences.
        """
        tower = self._text_tower
        pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
        causal = isinstance(getattr(tower, "attn_mask", None), Tensor)
        return causal and pool == "argmax" and getattr(tower, "cls_emb", None) is None

    @torch.no_grad()
    def prompts(self, labels: Sequence[str], context: str = "a photo of a") -> Prompts:
        """Embed the labels behind the words of `context`, whose vectors can then be tuned."""
        tokens_KL = self._tokenize([f"{context} {label}" for label in labels])
        tokens_KL = text_tower.truncate(tokens_KL)
        embedded_KLW = text_tower.embed(self._text_tower, tokens_KL).float()
        n_context = int(self._tokenize([context]).argmax(dim=1)) - 1
        return Prompts(
            embedded_KLW=embedded_KLW,
            end_K=tokens_KL.argmax(dim=1),
            context_MW=embedded_KLW[0, 1 : 1 + n_context].clone(),
        )

    def encode_prompts(self, prompts: Prompts, context_MW: Tensor) -> Tensor:
        """Unit text features (K, D) with `context_MW` in place; differentiable in it."""
        n_context = len(context_MW)
        embedded = prompts.embedded_KLW
        spliced = torch.cat(
            [
                embedded[:, :1],
                context_MW.expand(len(embedded), -1, -1),
                embedded[:, 1 + n_context :],
            ],
            dim=1,
        )
        return text_tower.run(self._text_tower, spliced, prompts.end_K).float()

    @property
    def _text_tower(self) -> Any:
        return getattr(self._model, "text", self._model)

    def _tokenize(self, texts: Sequence[str]) -> Tensor:
        return self._tokenizer(texts).to(self.device)

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        tokens_BL = self._tokenize(texts)
        if not self.tunes_prompts:
            return F.normalize(self._model.encode_text(tokens_BL).float(), dim=-1)
        tokens_BL = text_tower.truncate(tokens_BL)
        embedded = text_tower.embed(self._text_tower, tokens_BL)
        return text_tower.run(self._text_tower, embedded, tokens_BL.argmax(dim=1)).float()


def load(config: ModelConfig) -> Encoder:
    """Load the configured checkpoint, frozen and in evaluation mode.

    Raises:
        ModelError: there is no such device, architecture, tag or file, the hub cannot be reached,
            or the weights do not fit; the message says what to do.
    """
    device = _device(config)
    if config.name == "offline":
        model, preprocess, tokenizer = _load_folder(
            OFFLINE, "reinstall the package or run python -m agent.models.build"
        )
    elif config.name.startswith(LOCAL_DIR):
        model, preprocess, tokenizer = _load_folder(
            Path(config.name.removeprefix(LOCAL_DIR)), f"model.name is {LOCAL_DIR}FOLDER"
        )
    else:
        model, preprocess, tokenizer = _load_named(config.name, str(config.pretrained))
    model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return Encoder(
        model,
        tokenizer,
        preprocess,
        name=f"{config.name}/{config.pretrained}" if config.pretrained else config.name,
        device=device,
        dtype=_DTYPES[config.precision],
    )


def _device(config: ModelConfig) -> torch.device:
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda but no CUDA device is visible: use auto or cpu")
    if kind == "cpu" and config.precision == "fp16":
        raise ModelError("model.precision fp16 needs a CUDA device: use bf16 or fp32 on the CPU")
    return torch.device(kind)


def _load_folder(folder: Path, advice: str) -> tuple[Any, Preprocess, Tokenizer]:
    """A folder in open_clip's local-dir form; `vocabulary.json` marks a compact vocabulary."""
    if not (folder / "open_clip_config.json").is_file():
        raise MissingAsset(f"there is no open_clip_config.json in {folder}: {advice}")
    try:
        config = json.loads((folder / "open_clip_config.json").read_text())
        if not isinstance(config["model_cfg"], dict) or not isinstance(
            config["preprocess_cfg"], dict
        ):
            raise TypeError("model_cfg and preprocess_cfg are sections")
    except (ValueError, KeyError, TypeError) as error:
        raise IncompatibleCheckpoint(
            f"{folder}/open_clip_config.json is not open_clip's: {error!r}"
        ) from error
    name = f"{LOCAL_DIR}{folder}"
    model = _create(name)
    tokenizer = _tokenizer(name)
    vocabulary = folder / "vocabulary.json"
    if vocabulary.is_file():
        try:
            tokenizer = CompactTokenizer(tokenizer, json.loads(vocabulary.read_text()))
        except (ValueError, TypeError) as error:
            raise IncompatibleCheckpoint(f"{vocabulary} is no list of tokens: {error}") from error
    crop_ratio = config["preprocess_cfg"].get("crop_ratio", 1.0)
    return model, _preprocess(model, crop_ratio), tokenizer


def _load_named(name: str, pretrained: str) -> tuple[Any, Preprocess, Tokenizer]:
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.0)
        raise ModelError(
            f"model.name: open_clip has no architecture {name!r}; did you mean {', '.join(near)}?"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    is_tag = pretrained in tags
    if not is_tag and not Path(pretrained).is_file():
        raise MissingAsset(
            f"model.pretrained: {pretrained!r} is neither a file nor a tag of {name}; "
            f"its tags are {', '.join(tags) or 'none'}"
        )
    # A tag knows which activation it was trained with; open_clip only warns when it differs.
    quick_gelu = is_tag and bool(
        open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
    )
    model = _create(name, pretrained=pretrained, force_quick_gelu=quick_gelu)
    return model, _preprocess(model, 1.0), _tokenizer(name)


def _tokenizer(name: str) -> Tokenizer:
    try:
        tokenizer: Tokenizer = open_clip.get_tokenizer(name)
    except ImportError as error:
        raise MissingAsset(
            f"the tokenizer of {name} needs another package: pip install transformers sentencepiece"
        ) from error
    except Exception as error:  # transformers and the hub client have errors of their own
        raise ModelError(
            f"the tokenizer of {name} is not cached and cannot be fetched; run once where there is "
            f"a network, or use a model with CLIP's own tokenizer: {str(error)[:200]}"
        ) from error
    return tokenizer


def _create(name: str, **options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return open_clip.create_model(name, require_pretrained=True, **options)
    except RuntimeError as error:
        text = str(error)
        if "Error(s) in loading state_dict" in text:
            fault = text.splitlines()[1].strip() if "\n" in text else text
            raise IncompatibleCheckpoint(
                f"the weights do not fit {name}: {fault[:300]} - check that model.name is the "
                "architecture the checkpoint was saved from"
            ) from error
        if "download" in text:
            raise ModelError(
                f"the weights of {name} ({options.get('pretrained')}) are not cached and the hub "
                "cannot be reached: fetch the checkpoint where there is a network and give "
                "model.pretrained its path, or use model.name: offline"
            ) from error
        raise ModelError(f"open_clip cannot load {name}: {text[:300]}") from error
    except Exception as error:  # torch, safetensors and zipfile each have errors of their own
        raise IncompatibleCheckpoint(
            f"{options.get('pretrained', name)} cannot be read as weights of {name} "
            f"({str(error)[:200]}): check that model.name is the architecture it was saved from, "
            "and that it is safetensors or a state dict without code"
        ) from error


def _preprocess(model: Any, crop_ratio: float) -> Preprocess:
    config = model.visual.preprocess_cfg
    if len(config["mean"]) != 3 or len(config["std"]) != 3:
        raise IncompatibleCheckpoint("the checkpoint's mean and std are not of three colours")
    size = config["size"]
    return Preprocess(
        size=size if isinstance(size, int) else int(size[0]),
        crop_ratio=crop_ratio,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _fingerprint(model: Any, preprocess: Preprocess) -> str:
    """Hash of every tensor's name, shape and a sample of its values; milliseconds, not seconds."""
    digest = hashlib.sha256(repr(preprocess).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()[:16]
