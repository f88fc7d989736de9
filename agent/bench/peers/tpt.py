"""TPT: the prompt tuned anew to the views of every image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from agent.adapt.strategy import ZeroShot, entropy
from agent.bench.peers.crops import random_resized_crops
from agent.encode import Encoder, Prompts
from agent.errors import ModelError

#: How many labels' prompts have their activations in memory at once.
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class TPTConfig:
    """Defaults of the repository: `tpt_classification.py` and `scripts/test_tpt.sh`."""

    views: int = 64
    """Views of an image, itself the first."""
    selected: float = 0.1
    """Share of the views, those of lowest entropy, whose mean prediction is made surer."""
    learning_rate: float = 5e-3
    """Of the one AdamW step, whose other settings are PyTorch's."""
    context: str = "a photo of a"
    """Words whose vectors are tuned."""
    min_area: float = 0.08
    """Smallest share of the image that a view shows; torchvision's default."""


class TPT:
    """Test-time prompt tuning.

    Shu et al., Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models,
    NeurIPS 2022; github azshue/TPT. The context vectors take one step that lowers the entropy of
    the mean prediction over the confident views of one image; the tuned prompt answers the image
    and is thrown away. Views are random resized crops, half of them mirrored, as for ImageNet and
    its variants; AugMix, which the repository adds for other sets, is off there.

    Interpretation: the repository crops the original photograph, here the image at the model's
    size is all there is. Its factor from cosines to logits is the checkpoint's own, here it is
    that of the zero-shot logits, in which a temperature may be calibrated. Prompts are "a photo
    of a cat." with the full stop of the repository, whatever templates the operator has.

    The gradient reaches the context through the text features in two exact steps, first of the
    loss in the text features and then of these in the context, label by label, so that memory
    does not grow with the labels.
    """

    name: ClassVar[str] = "tpt"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: TPTConfig = TPTConfig(),
        seed: int = 0,
    ) -> None:
        """Raises ModelError where the text tower cannot be run from embeddings."""
        if not encoder.tunes_prompts:
            raise ModelError(
                f"tpt tunes context vectors, and the text tower of {encoder.name} only runs from "
                "whole sentences: use a model with CLIP's own text transformer, such as ViT-B-16"
            )
        self._encoder = encoder
        self._scale = zero_shot.scale
        self._config = config
        self._rng = np.random.default_rng(seed)
        prompts = encoder.prompts([f"{label}." for label in zero_shot.labels], config.context)
        self._source_MW = prompts.context_MW
        self._chunks = [
            Prompts(embedded_KLW, end_K, prompts.context_MW)
            for embedded_KLW, end_K in zip(
                torch.split(prompts.embedded_KLW, _CHUNK),
                torch.split(prompts.end_K, _CHUNK),
                strict=True,
            )
        ]
        with torch.no_grad():
            self._source_KD = self._text(self._source_MW)

    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of each image under the prompt tuned to it."""
        return torch.stack([self._predict_one(image_CHW) for image_CHW in pixels_BCHW])

    def _predict_one(self, image_CHW: Tensor) -> Tensor:
        config = self._config
        crops = random_resized_crops(image_CHW, config.views - 1, config.min_area, self._rng)
        with torch.no_grad():
            features_VD = self._encoder.encode_image(torch.cat([image_CHW[None], crops]))
        context_MW = self._tuned(features_VD)
        with torch.no_grad():
            return self._scale * self._text(context_MW) @ features_VD[0]

    def _text(self, context_MW: Tensor) -> Tensor:
        return torch.cat(
            [self._encoder.encode_prompts(chunk, context_MW) for chunk in self._chunks]
        )

    def _tuned(self, features_VD: Tensor) -> Tensor:
        """The context after one step from the source."""
        text_KD = self._source_KD.clone().requires_grad_(True)
        context_MW = self._source_MW.clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([context_MW], lr=self._config.learning_rate)
        with torch.enable_grad():
            loss = self._marginal_entropy(self._scale * features_VD @ text_KD.T)
            (gradient_KD,) = torch.autograd.grad(loss, text_KD)
            for chunk, gradient in zip(self._chunks, torch.split(gradient_KD, _CHUNK), strict=True):
                text = self._encoder.encode_prompts(chunk, context_MW)
                torch.autograd.backward(text, gradient)
        optimizer.step()
        return context_MW.detach()

    def _marginal_entropy(self, logits_VK: Tensor) -> Tensor:
        """Entropy of the mean prediction of the views of lowest entropy."""
        n = max(1, int(len(logits_VK) * self._config.selected))
        confident = entropy(logits_VK.softmax(dim=-1)).topk(n, largest=False).indices
        # A probability may round to zero, where the entropy has no gradient; its logarithm has.
        log_p = logits_VK[confident].log_softmax(dim=-1)
        log_mean_K = log_p.logsumexp(dim=0) - math.log(n)
        return -(log_mean_K.exp() * log_mean_K).sum()
