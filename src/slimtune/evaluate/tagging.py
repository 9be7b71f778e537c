"""Tags for the words of texts, the entities that they spell, and how often these are right."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from slimtune.evaluate.classification import scores as class_scores

if TYPE_CHECKING:
    from slimtune.data.tagged import Aligned

OUTSIDE = "O"
_PREFIXES = ("B", "I", "E", "S")


class Entity(NamedTuple):
    """What some words together are: those from `start` up to before `end`."""

    kind: str
    start: int
    end: int


@torch.inference_mode()
def tag(model: Any, tokenizer: Any, texts: Sequence[Aligned], batch_size: int = 32) -> list[list[str]]:
    """The likeliest tag of each word, `O` for a word of which the model sees no token; in the order of the texts."""
    was_training = model.training
    model.eval()
    found: list[list[str]] = [[OUTSIDE] * text.words for text in texts]
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index].input["input_ids"]))
    for start in range(0, len(texts), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = tokenizer.pad([texts[index].input for index in chosen], return_tensors="pt").to(model.device)
        likeliest_NT = model(**batch).logits.argmax(-1)
        for index, row_T, mask_T in zip(chosen, likeliest_NT, batch["attention_mask"], strict=True):
            numbers = row_T[mask_T.bool()].tolist()
            for word, position in texts[index].firsts.items():
                found[index][word] = model.config.id2label[numbers[position]]
    model.train(was_training)
    return found


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
    words = class_scores(list(itertools.chain(*predicted)), list(itertools.chain(*true)))
    if not has_entities(sorted({*itertools.chain(*predicted), *itertools.chain(*true)})):
        return words
    named = [set(entities(tags)) for tags in predicted]
    there = [set(entities(tags)) for tags in true]
    right = sum(len(ours & theirs) for ours, theirs in zip(named, there, strict=True))
    precision = right / max(1, sum(map(len, named)))
    recall = right / max(1, sum(map(len, there)))
    f1 = 2 * right / max(1, sum(map(len, named)) + sum(map(len, there)))
    return {"accuracy": words["accuracy"], "precision": precision, "recall": recall, "entity_f1": f1}


def _parts(tag: str) -> tuple[str, str]:
    prefix, _, kind = tag.partition("-")
    return prefix, kind
