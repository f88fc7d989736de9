"""Logits less their running mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.encode import Encoder


@dataclass(frozen=True, slots=True)
class LogitCenteringConfig:
    """Defaults of the source."""

    momentum: float = 0.9
    """How much of the centre each batch keeps; `center_momentum` of DINO."""


class LogitCentering:
    """Takes from labels that are favoured whatever the image shows their head start.

    Source: the centring of the teacher's logits in DINO (Caron et al., Emerging Properties in
    Self-Supervised Vision Transformers, ICCV 2021; github facebookresearch/dino, `DINOLoss`): a
    centre that starts at zero is taken from the logits, and is then moved towards their mean over
    the batch. Nothing is trained.

    Interpretation: DINO centres the prototypes' logits that a student is trained towards, before
    it sharpens them; here the zero-shot logits are centred at test time and that is the answer.
    As in DINO a batch is centred before it moves the centre, so that the first batch is answered
    as by the zero-shot model; and the momentum counts batches, however large.
    """

    name: ClassVar[str] = "logit_centering"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: LogitCenteringConfig = LogitCenteringConfig(),
        seed: int = 0,
    ) -> None:
        """`seed` is every peer's; nothing here is random."""
        self._encoder = encoder
        self._zero_shot = zero_shot
        self._config = config
        self._centre_K = torch.zeros(len(zero_shot.labels), device=encoder.device)

    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Centred logits (B, K)."""
        logits_BK = self._zero_shot.logits(self._encoder.encode_image(pixels_BCHW))
        centred_BK = logits_BK - self._centre_K
        self._centre_K = torch.lerp(logits_BK.mean(dim=0), self._centre_K, self._config.momentum)
        return centred_BK
