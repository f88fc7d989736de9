"""The words the offline checkpoint is taught, each with the ImageNet classes it covers.

Three sources, from specific to general: open_clip's class names, timm's lemmas (synonyms of the
same class) and WordNet's hypernyms ("dog" covers every breed), so that an operator's own label
need not be one of the thousand.
"""

from __future__ import annotations

from collections import defaultdict
from importlib.resources import files
from pathlib import Path

from agent.errors import MissingAsset

#: A hypernym over more classes than this ("artifact", "entity") says too little to be a label.
MAX_CLASSES_PER_NAME = 250

_HYPERNYM_POINTERS = {"@", "@i"}


def synsets() -> list[str]:
    """The 1000 WordNet ids (``n01440764``) in the order of the classifier's outputs."""
    return (files("timm") / "data/_info/imagenet_synsets.txt").read_text().split()


def covered_classes(class_names: list[str], wordnet: Path) -> dict[str, frozenset[int]]:
    """Map every name to the class indices it covers.

    Args:
        class_names: the 1000 names in the order of `synsets`; a name given twice covers both.
        wordnet: a folder with WordNet 3.0's ``data.noun`` and ``index.noun``.

    Raises:
        MissingAsset: the WordNet files are not there.
    """
    names: dict[str, set[int]] = defaultdict(set)
    for index, name in enumerate(class_names):
        names[name].add(index)
    fixed = set(names)  # the class names keep exactly their own classes
    for lemma, classes in _lemmas().items():
        if lemma not in fixed:
            names[lemma] |= classes
    fixed = set(names)
    for word, classes in _hypernyms(wordnet).items():
        if word not in fixed:
            names[word] |= classes
    return {name: frozenset(classes) for name, classes in names.items()}


def _lemmas() -> dict[str, set[int]]:
    index_of = {synset: index for index, synset in enumerate(synsets())}
    lemmas: dict[str, set[int]] = defaultdict(set)
    table = (files("timm") / "data/_info/imagenet_synset_to_lemma.txt").read_text()
    for line in table.splitlines():
        synset, _, words = line.partition("\t")
        if synset in index_of:
            for word in words.split(","):
                lemmas[word.strip()].add(index_of[synset])
    return lemmas


def _hypernyms(wordnet: Path) -> dict[str, set[int]]:
    """Words for the ancestors of the classes; a word stands only for its most frequent noun sense.

    Without that rule "dog" would also be the fireside andiron.
    """
    parents: dict[str, list[str]] = {}
    words: dict[str, list[str]] = {}
    for line in _lines(wordnet / "data.noun"):
        fields = line.split(" ")
        offset, n_words = fields[0], int(fields[3], 16)
        words[offset] = [fields[4 + 2 * i] for i in range(n_words)]
        rest = fields[4 + 2 * n_words :]
        pointers = [rest[1 + 4 * i : 5 + 4 * i] for i in range(int(rest[0]))]
        parents[offset] = [p[1] for p in pointers if p[0] in _HYPERNYM_POINTERS and p[2] == "n"]
    first_sense: dict[str, str] = {}
    for line in _lines(wordnet / "index.noun"):
        fields = line.split()
        first_sense[fields[0]] = fields[6 + int(fields[3])]

    covered: dict[str, set[int]] = defaultdict(set)
    for index, synset in enumerate(synsets()):
        seen: set[str] = set()
        todo = [synset.removeprefix("n")]
        while todo:
            offset = todo.pop()
            if offset not in seen:
                seen.add(offset)
                covered[offset].add(index)
                todo.extend(parents[offset])

    names: dict[str, set[int]] = defaultdict(set)
    for offset, classes in covered.items():
        if len(classes) <= MAX_CLASSES_PER_NAME:
            for word in words[offset]:
                if first_sense.get(word.lower()) == offset:
                    names[word.replace("_", " ")] |= classes
    return names


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise MissingAsset(
            f"{path} is missing: install WordNet 3.0 (Debian: apt-get install wordnet-base) "
            "or name its folder with --wordnet"
        )
    # The licence text at the head of each WordNet file is indented; records are not.
    return [line for line in path.read_text().splitlines() if not line.startswith(" ")]
