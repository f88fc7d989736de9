"""The model with one prompt a label: what it does before templates are averaged."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from agent.adapt.strategy import ZeroShot
from agent.encode import Encoder

#: The prompt of the source's figure 1.
TEMPLATE = "a photo of a {}."


class SinglePrompt:
    """Zero-shot classification with one template.

    Source: CLIP (Radford et al., Learning Transferable Visual Models From Natural Language
    Supervision, ICML 2021), section 3.1.4. `frozen` is the same with an ensemble of templates.
    """

    name: ClassVar[str] = "single_prompt"

    def __init__(self, encoder: Encoder, zero_shot: ZeroShot, *, seed: int = 0) -> None:
        """`seed` is every peer's; nothing here is random."""
        text_TKD = encoder.encode_labels(zero_shot.labels, [TEMPLATE])
        self._encoder = encoder
        self._zero_shot = ZeroShot(zero_shot.labels, text_TKD, zero_shot.scale)

    def predict(self, pixels_BCHW: Tensor) -> Tensor:
        """Zero-shot logits (B, K)."""
        return self._zero_shot.logits(self._encoder.encode_image(pixels_BCHW))
