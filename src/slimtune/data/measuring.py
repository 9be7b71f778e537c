"""How long the rows of each task are in a model's tokens, where a row is more than one text that is learned."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from slimtune.data.labelled import tokenize
from slimtune.data.preferred import lengths_of
from slimtune.data.seq2seq import encode_pair, refuse_conversations
from slimtune.data.tagged import align


def measured(task: str, rows: Sequence[Any], tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of each row that have to fit at once, and how many of all of them are learned; raises DataError.

    Of prompt and completion the longer one counts, of a pair of answers the longer one with its prompt.
    """
    if task == "classification":
        ids = tokenize([row.texts for row in rows], tokenizer, sys.maxsize).rows
        return [len(row["input_ids"]) for row in ids], len(rows)
    if task == "token-classification":
        texts = align([row.tokens for row in rows], tokenizer, sys.maxsize).texts
        return [len(text.input["input_ids"]) for text in texts], sum(len(text.firsts) for text in texts)
    if task == "seq2seq":
        refuse_conversations(rows, "the data")
        pairs = [encode_pair(row, tokenizer) for row in rows]
        return [pair.longer for pair in pairs], sum(len(pair.labels) for pair in pairs)
    found = [lengths_of(row, tokenizer) for row in rows]
    return [max(each) for each in found], sum(max(each) - each[0] for each in found)
