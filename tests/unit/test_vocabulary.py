import open_clip
import pytest
import torch

from agent.models.vocabulary import PAD_ROW, UNKNOWN_ROW, CompactTokenizer

CLIP = open_clip.SimpleTokenizer(context_length=8)


def kept(*texts):
    return sorted(set(CLIP(list(texts)).flatten().tolist()) - {0})


@pytest.fixture
def tokenizer():
    return CompactTokenizer(CLIP, kept("a dog", "a truck"))


def test_rows_are_numbered_in_the_order_of_ids():
    tokenizer = CompactTokenizer(lambda texts: torch.tensor([[9, 5, 7, 0]]), [5, 7, 9])
    assert tokenizer(["any"]).tolist() == [[4, 2, 3, PAD_ROW]]


def test_the_end_of_text_keeps_the_largest_id(tokenizer):
    rows = tokenizer(["a dog", "a truck", "truck"])
    assert rows.argmax(dim=1).tolist() == CLIP(["a dog", "a truck", "truck"]).argmax(dim=1).tolist()
    assert int(rows.max()) == 1 + len(kept("a dog", "a truck"))


def test_a_strange_token_is_the_unknown_row(tokenizer):
    rows = tokenizer(["a zebra"])[0].tolist()
    assert rows.count(UNKNOWN_ROW) == 1
    assert rows[0] == tokenizer(["a dog"])[0, 0]  # the start of text is known


def test_what_follows_the_end_is_padding(tokenizer):
    assert tokenizer(["a dog"])[0, 4:].tolist() == [PAD_ROW] * 4


def test_unknown_names_texts_with_a_strange_token(tokenizer):
    assert tokenizer.unknown(["truck", "zebra", "dog", "a zebra dog"]) == ["zebra", "a zebra dog"]
