"""A CLIP text transformer run from token embeddings, which is what prompt tuning needs.

open_clip's own `encode_text` starts from token ids and always runs the full context length. Here
the sequence ends after the longest prompt, and any embedding may stand in it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embed(tower: Any, tokens_BL: Tensor) -> Tensor:
    """Token embeddings (B, L, W) of token ids (B, L)."""
    embedded: Tensor = tower.token_embedding(tokens_BL)
    return embedded


def truncate(tokens_BL: Tensor) -> Tensor:
    """Cut the columns behind the longest end-of-text token, which nothing attends to."""
    return tokens_BL[:, : int(tokens_BL.argmax(dim=1).max()) + 1]


def run(tower: Any, embedded_BLW: Tensor, end_B: Tensor) -> Tensor:
    """Unit text features (B, D) of embedded prompts whose end-of-text token stands at `end_B`."""
    length = embedded_BLW.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = embedded_BLW.to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    x = tower.ln_final(x)[torch.arange(len(x), device=x.device), end_B]
    projection = tower.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection
    return F.normalize(x, dim=-1)
