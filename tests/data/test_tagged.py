"""Each word's tag stands at its first token, whatever the tokenizer makes of the word."""

from __future__ import annotations

from typing import Any

import pytest

from slimtune.data.batches import IGNORED
from slimtune.data.tasks.word_alignment import align, tags_of
from slimtune.errors import DataError
from small_encoder import encoder_tokenizer
from small_text_model import tiny_tokenizer

WORDS = ["Maria", "wants", "a", "xyzzy-latte", "!"]


def first_pieces(tokenizer: Any, words: list[str]) -> dict[int, str]:
    (text,) = align([words], tokenizer, 64).texts
    ids = text.input["input_ids"]
    return {word: tokenizer.decode([ids[position]]) for word, position in text.firsts.items()}


def test_the_first_token_of_a_word_of_several_bears_the_tag() -> None:
    tokenizer = tiny_tokenizer()
    found = first_pieces(tokenizer, WORDS)
    assert list(found) == [0, 1, 2, 3, 4]
    assert all(WORDS[word].startswith(piece.strip()) for word, piece in found.items())
    (text,) = align([WORDS], tokenizer, 64).texts
    labels = text.labelled([7, 0, 0, 8, 0])["labels"]
    assert len(labels) == len(text.input["input_ids"]) > len(WORDS)
    assert [label for label in labels if label != IGNORED] == [7, 0, 0, 8, 0]


def test_the_tokenizers_own_marks_bear_none() -> None:
    (text,) = align([["the", "film", "was", "good"]], encoder_tokenizer(), 32).texts
    assert text.labelled([1, 2, 3, 4])["labels"] == [IGNORED, 1, 2, 3, 4, IGNORED]


def test_a_word_of_which_nothing_is_left_is_counted() -> None:
    found = align([["good", " ", "film"]], encoder_tokenizer(), 32)
    assert found.texts[0].firsts == {0: 1, 2: 2}
    assert found.without_token == 1


def test_long_texts_are_refused_dropped_or_cut() -> None:
    tokenizer, rows = encoder_tokenizer(), [["good"] * 10, ["bad"] * 3]
    with pytest.raises(DataError, match=r"1 of 2 texts are longer than 8 tokens \(the longest has 12\)"):
        align(rows, tokenizer, 8)
    assert align(rows, tokenizer, 8, "drop").kept == [1]
    cut = align(rows, tokenizer, 8, "truncate")
    assert (cut.kept, cut.truncated, cut.without_token) == ([0, 1], 1, 4)
    assert len(cut.texts[0].input["input_ids"]) == 8
    with pytest.raises(DataError, match="none of 2 texts is within 4 tokens"):
        align(rows, tokenizer, 4, "drop")


def test_tags_are_ordered_with_outside_first_and_kinds_together() -> None:
    assert tags_of([["I-PER", "O"], ["B-PER", "B-LOC"]]) == ["O", "B-LOC", "B-PER", "I-PER"]
    assert tags_of([["10", "2"]]) == ["2", "10"]
    with pytest.raises(DataError, match="all words have the tag 'O'"):
        tags_of([["O", "O"]])
