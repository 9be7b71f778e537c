"""Tags for the words of texts, the entities that they spell, and how often these are right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from slimtune.evaluate.tag_counts import TagCounts

if TYPE_CHECKING:
    from torch import Tensor

    from slimtune.data.tagged import Aligned

OUTSIDE = "O"
_PREFIXES = ("B", "I", "E", "S")


class Entity(NamedTuple):
    """What some words together are: those from `start` up to before `end`."""

    kind: str
    start: int
    end: int


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
        on_batch: told how many texts were read.
    """
    was_training = model.training
    model.eval()
    found: dict[int, Tensor] = {}
    for chosen in _by_length(texts, batch_size):
        batch = tokenizer.pad([texts[index].input for index in chosen], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            logits_NTK = model(**batch).logits.float().cpu()
        for index, logits_TK, mask_T in zip(chosen, logits_NTK, batch["attention_mask"].bool().cpu(), strict=True):
            found[index] = logits_TK[mask_T][list(texts[index].firsts.values())]
        on_batch(len(chosen))
    model.train(was_training)
    return [found[index] for index in range(len(texts))]


def _by_length(texts: Sequence[Aligned], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].input["input_ids"]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def tag_words(
    source: str, texts: Sequence[Sequence[str]], batch_size: int = 32, too_long: str = "error",
    quantize: str | None = None, options: tuple[Any, ...] = (),
) -> list[list[str]]:  # fmt: skip
    """The tags of the words of texts by a folder that was trained on such.

    Args:
        too_long: "error", or "truncate", where words behind the cut are tagged `O`.
        options: dtype, device and trust_remote_code, as `load` takes them.
    """
    from slimtune.data.labelled import longest_input
    from slimtune.data.tagged import align
    from slimtune.loading import load_trained_tagger

    model, tokenizer = load_trained_tagger(source, *options, quantize=quantize)
    aligned = align(texts, tokenizer, longest_input(model, tokenizer, None), too_long)
    return tag(model, tokenizer, aligned.texts, batch_size)


def has_entities(tags: Sequence[str]) -> bool:
    """Whether tags spell entities, as `B-PER` and `I-PER` do, and aren't for single words."""
    return all(tag == OUTSIDE or _parts(tag)[0] in _PREFIXES for tag in tags) and any(tag != OUTSIDE for tag in tags)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that tags spell in IOB1, IOB2 or IOBES, by the rule of CoNLL's evaluation.

    One begins at B or S, and at I or E where no entity of that kind goes on.
    """
    found: list[Entity] = []
    goes_on = False
    for position, written in enumerate(tags):
        if written == OUTSIDE:
            goes_on = False
            continue
        prefix, kind = _parts(written)
        if goes_on and prefix in ("I", "E") and found[-1].kind == kind:
            found[-1] = found[-1]._replace(end=position + 1)
        else:
            found.append(Entity(kind, position, position + 1))
        goes_on = prefix in ("B", "I")
    return found


def tag_scores(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy over words, and precision, recall and F1 = 2PR / (P + R) over whole entities of all texts.

    An entity is right if its kind, its first and its last word are. Tags that spell no entities have the macro F1 over
    words instead.
    """
    spells = has_entities(sorted({*itertools.chain(*predicted), *itertools.chain(*true)}))
    return tag_counts(predicted, true, spells).scores()


def tag_counts(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]], spells: bool) -> TagCounts:
    """What there is to count in each text, from which all scores follow; `spells` says whether tags spell entities."""
    words = [(list(said), list(expected)) for said, expected in zip(predicted, true, strict=True)]
    if not spells:
        return TagCounts.of(words, None)
    return TagCounts.of(words, [(set(entities(said)), set(entities(expected))) for said, expected in words])


def _parts(tag: str) -> tuple[str, str]:
    prefix, _, kind = tag.partition("-")
    return prefix, kind
