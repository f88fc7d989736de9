"""The offline checkpoint's small vocabulary.

CLIP's byte-pair vocabulary has 49,408 entries; the words this checkpoint was taught use some
3,000 of them. Only those rows are stored. Row 0 pads, row 1 stands for any unknown token, and the
end-of-text token keeps the largest id because open_clip pools at the arg-max of the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

PAD_ROW = 0
UNKNOWN_ROW = 1
FULL_VOCABULARY = 49408

Tokenizer = Callable[[Sequence[str]], Tensor]


class CompactTokenizer:
    """CLIP's tokenizer followed by a map from its ids to the rows that are stored."""

    def __init__(self, tokenizer: Tokenizer, kept_ids: Sequence[int]) -> None:
        """`kept_ids` are CLIP token ids in ascending order; id 0 is CLIP's padding."""
        self._tokenizer = tokenizer
        self._row_of = torch.full((FULL_VOCABULARY,), UNKNOWN_ROW)
        self._row_of[torch.tensor(kept_ids)] = torch.arange(2, 2 + len(kept_ids))
        self._row_of[0] = PAD_ROW

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token rows of shape (N, context length), dtype int64."""
        return self._row_of[self._tokenizer(texts)]

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """Those of `texts` that hold a token the checkpoint was never taught."""
        texts = list(texts)
        hits = (self(texts) == UNKNOWN_ROW).any(dim=1)
        return [text for text, hit in zip(texts, hits.tolist(), strict=True) if hit]
