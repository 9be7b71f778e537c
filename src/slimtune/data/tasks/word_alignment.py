"""Words with tags as ids: the first token of each word bears its tag, the others are ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.data.batches import IGNORED
from slimtune.errors import ConfigError, DataError, check_choice

OUTSIDE = "O"


@dataclass(frozen=True)
class Aligned:
    """One text as the tokenizer's ids, and where its words begin.

    Attributes:
        input: what the model takes.
        words: how many there are.
        firsts: the position of the first token of each word that has one.
    """

    input: dict[str, list[int]]
    words: int
    firsts: dict[int, int]

    def labelled(self, numbers: Sequence[int]) -> dict[str, list[int]]:
        """The input with the number of each word's tag at its first token."""
        labels = [IGNORED] * len(self.input["input_ids"])
        for word, position in self.firsts.items():
            labels[position] = numbers[word]
        return self.input | {"labels": labels}


@dataclass(frozen=True)
class AlignedTexts:
    """Texts as ids, and what happened to those that were too long."""

    texts: list[Aligned]
    kept: list[int]
    """Which of the rows they are."""
    truncated: int = 0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(text.input["input_ids"]) for text in self.texts)

    @property
    def without_token(self) -> int:
        """Words that no tag is learned for, because they were cut off or the tokenizer makes nothing of them."""
        return sum(text.words - len(text.firsts) for text in self.texts)


def tags_of(rows: Sequence[Sequence[str]]) -> list[str]:
    """All tags, `O` first and the others by kind; raises DataError if there is one only."""
    tags = {tag for row in rows for tag in row}
    if len(tags) < 2:
        raise DataError(f"all words have the tag {tags.pop()!r}, so there is nothing to tell apart; add other rows")
    if all(tag.isdecimal() for tag in tags):
        return sorted(tags, key=int)
    # B-PER and I-PER beside each other; the order is that of the head's outputs and of its config.
    return sorted(tags, key=lambda tag: (tag != OUTSIDE, tag.partition("-")[2], tag))


def align(rows: Sequence[Sequence[str]], tokenizer: Any, max_length: int, too_long: str = "error") -> AlignedTexts:
    """The ids of texts that are given as words; raises DataError if some are too long, or if none is left."""
    check_choice("too_long", too_long, ("error", "drop", "truncate"))
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} can't tell which word its tokens come from; load the fast tokenizer of the "
            "model (tokenizer.json)"
        )
    everything = [_aligned(words, tokenizer) for words in rows]
    over = [len(text.input["input_ids"]) for text in everything if len(text.input["input_ids"]) > max_length]
    if over and too_long == "error":
        raise DataError(
            f"{len(over)} of {len(everything)} texts are longer than {max_length} tokens (the longest has "
            f"{max(over)}); raise max_length where the model has the positions, or choose too_long drop or truncate"
        )
    kept = [i for i, text in enumerate(everything) if len(text.input["input_ids"]) <= max_length]
    if too_long == "truncate":
        everything = [_aligned(words, tokenizer, max_length) for words in rows]
        kept = list(range(len(rows)))
    if not kept:
        raise DataError(f"none of {len(everything)} texts is within {max_length} tokens; raise max_length")
    return AlignedTexts([everything[i] for i in kept], kept, truncated=len(over) if too_long == "truncate" else 0)


def _aligned(words: Sequence[str], tokenizer: Any, max_length: int | None = None) -> Aligned:
    # Words between spaces, not words split beforehand: byte-level tokenizers refuse those, or read them another way.
    text = " ".join(words)
    # By character: which word each place of the joined text is in, the space behind counted with its word.
    word_at = [number for number, word in enumerate(words) for _ in f"{word} "]
    shorten = {"truncation": True, "max_length": max_length} if max_length else {"verbose": False}
    encoded = tokenizer(text, return_offsets_mapping=True, return_attention_mask=True, **shorten)
    firsts: dict[int, int] = {}
    for position, (start, end) in enumerate(encoded.pop("offset_mapping")):
        # A token may begin with the space in front of its word.
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if start < end:
            firsts.setdefault(word_at[start], position)
    return Aligned(dict(encoded), len(words), firsts)


def tag(model: Any, tokenizer: Any, texts: Sequence[Aligned], batch_size: int = 32) -> list[list[str]]:
    """The likeliest tag of each word, `O` for a word of which the model sees no token; in the order of the texts."""
    logits_WK = word_logits(model, tokenizer, texts, batch_size)
    return [tags_from(model, text, own_WK) for text, own_WK in zip(texts, logits_WK, strict=True)]


def tags_from(model: Any, text: Aligned, logits_WK: Tensor) -> list[str]:
    """The likeliest tags of a text, by the logits of those of its words that have a token."""
    tags = [OUTSIDE] * text.words
    for word, number in zip(text.firsts, logits_WK.argmax(-1).tolist(), strict=True):
        tags[word] = model.config.id2label[number]
    return tags


def word_logits(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Aligned],
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Tensor]:
    """Of each text the logits of the tags, for each word that has a token: (words, tags) in float32.

    Args:
        on_batch: called with the number of texts of each batch.
    """
    was_training = model.training
    model.eval()
    logits: dict[int, Tensor] = {}
    for chosen in _by_length(texts, batch_size):
        batch = tokenizer.pad([texts[index].input for index in chosen], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            logits_NTK = model(**batch).logits.float().cpu()
        for index, logits_TK, mask_T in zip(chosen, logits_NTK, batch["attention_mask"].bool().cpu(), strict=True):
            # By the mask first: positions count from a row's first real token, on whichever side the pads are.
            logits[index] = logits_TK[mask_T][list(texts[index].firsts.values())]
        on_batch(len(chosen))
    model.train(was_training)
    return [logits[index] for index in range(len(texts))]


def _by_length(texts: Sequence[Aligned], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].input["input_ids"]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
