import open_clip
import pytest

from agent.errors import MissingAsset
from agent.models import names
from agent.models.names import covered_classes, synsets

TABBY, SIAMESE, TERRIER = 0, 1, 2
#: offset: (words, offsets of its hypernyms)
NOUNS = {
    "00000001": (["tabby", "tabby_cat"], ["00000004"]),
    "00000002": (["Siamese"], ["00000004"]),
    "00000003": (["terrier"], ["00000005"]),
    "00000004": (["domestic_cat", "cat"], ["00000006"]),
    "00000005": (["dog"], ["00000006"]),
    "00000006": (["animal"], []),
    "00000007": (["dog", "firedog"], []),
    "00000008": (["tom"], ["00000004"]),
}
#: The senses of a word, the most frequent first; all others have one.
SENSES = {"dog": ["00000005", "00000007"], "cat": ["00000009", "00000004"]}


def data_line(offset, words, parents):
    listed = " ".join(f"{word} 0" for word in words)
    pointers = " ".join(["~ 00000099 n 0000", *(f"@ {parent} n 0000" for parent in parents)])
    return f"{offset} 05 n {len(words):02x} {listed} {len(parents) + 1:03d} {pointers} | a gloss"


def index_line(word, senses):
    return f"{word} n {len(senses)} 2 @ ~ {len(senses)} 1 {' '.join(senses)}"


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "synsets", lambda: ["n00000001", "n00000002", "n00000003"])
    lemmas = {"tabby cat": {TABBY}, "kitty": {TABBY, SIAMESE}, "terrier": {TABBY}}
    monkeypatch.setattr(names, "_lemmas", lambda: lemmas)
    licence = "  1 This software and database is being provided to you"
    data = [data_line(offset, *entry) for offset, entry in NOUNS.items()]
    words = {w.lower(): [o] for o, (ws, _) in reversed(NOUNS.items()) for w in ws} | SENSES
    index = [index_line(word, senses) for word, senses in words.items()]
    (tmp_path / "data.noun").write_text("\n".join([licence, *data]) + "\n")
    (tmp_path / "index.noun").write_text("\n".join([licence, *index]) + "\n")
    return tmp_path


def covered(wordnet, class_names=("tabby", "siamese cat", "terrier")):
    return covered_classes(list(class_names), wordnet)


def test_a_class_name_covers_its_class_alone(wordnet):
    assert covered(wordnet)["terrier"] == {TERRIER}


def test_a_name_given_twice_covers_both_classes(wordnet):
    assert covered(wordnet, ("cat", "cat", "terrier"))["cat"] == {TABBY, SIAMESE}


def test_a_lemma_covers_every_class_it_names(wordnet):
    assert covered(wordnet)["kitty"] == {TABBY, SIAMESE}


def test_a_hypernym_covers_all_below_it_with_spaces_for_underscores(wordnet):
    found = covered(wordnet)
    assert found["domestic cat"] == {TABBY, SIAMESE}
    assert found["animal"] == {TABBY, SIAMESE, TERRIER}


def test_a_word_stands_for_its_most_frequent_sense_only(wordnet):
    found = covered(wordnet)
    assert found["dog"] == {TERRIER}
    assert "cat" not in found
    assert "firedog" not in found


def test_what_covers_no_class_is_no_name(wordnet):
    assert "tom" not in covered(wordnet)


def test_what_covers_too_many_says_too_little(wordnet, monkeypatch):
    monkeypatch.setattr(names, "MAX_CLASSES_PER_NAME", 2)
    found = covered(wordnet)
    assert "animal" not in found
    assert "domestic cat" in found


def test_a_missing_wordnet_says_how_to_get_it(tmp_path):
    with pytest.raises(MissingAsset, match=r"data\.noun.*wordnet-base"):
        covered_classes(list(open_clip.IMAGENET_CLASSNAMES), tmp_path)


def test_there_is_a_synset_for_each_class():
    assert len(set(synsets())) == len(open_clip.IMAGENET_CLASSNAMES) == 1000
    assert synsets()[0] == "n01440764"
