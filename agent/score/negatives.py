"""Negative labels: words for what the operator's labels do not name.

The word list is that of the 21,841 synsets of ImageNet, some 37,000 nouns, which ships with timm.
"""

from __future__ import annotations

from importlib.resources import files

from torch import Tensor

#: Share of the words that are kept, those farthest from any label first. What is nearer may be a
#: kind of a label ("beagle" of "dog") or another name for it, and must not speak against it.
SHARE = 0.6


def words() -> list[str]:
    """The word list, each word once, in the order of WordNet."""
    table = (files("timm") / "data/_info/imagenet_synset_to_lemma.txt").read_text()
    lemmas = (line.partition("\t")[2] for line in table.splitlines())
    return list(dict.fromkeys(word.strip() for line in lemmas for word in line.split(",")))


def mine(words_VD: Tensor, labels_KD: Tensor) -> Tensor:
    """The words that are far from every label: unit text features (M, D) of (V, D).

    NegMining of Jiang et al. 2024 (§3.1) with two differences. A word's distance is that from its
    nearest label instead of a percentile over the labels: with many labels, a percentile forgives a
    word that means the same as one of them. And many more words are kept than a few farthest,
    since what is strange is mostly near.
    """
    nearest_V = (words_VD @ labels_KD.T).amax(dim=-1)
    kept_M = nearest_V.argsort()[: round(SHARE * len(words_VD))]
    return words_VD[kept_M]
