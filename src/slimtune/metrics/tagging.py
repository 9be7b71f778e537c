"""How many tags and entities of each text are right, were named and are there: all scores are sums of these."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Entity(NamedTuple):
    """What some words together are: those from `start` up to before `end`."""

    kind: str
    start: int
    end: int


Words = tuple[list[str], list[str]]
Entities = tuple[set[Entity], set[Entity]]
ENTITY_F1, MACRO_F1 = "entity_f1", "macro_f1"


@dataclass(frozen=True)
class TagCounts:
    """Counts of N texts, along the last axis: right, named by the model, there.

    Attributes:
        tags: (N, tags, 3), over words.
        entities: (N, kinds, 3), over whole entities; None where the tags spell none.
        kinds: of entities, in their order.
    """

    tags: np.ndarray
    entities: np.ndarray | None
    kinds: list[str]

    @classmethod
    def of(cls, words: Sequence[Words], entities: Sequence[Entities] | None) -> TagCounts:
        """From the tags that the model gave each text and the true ones, and from the entities that they spell."""
        named = sorted({tag for predicted, expected in words for tag in (*predicted, *expected)})
        tags = np.zeros((len(words), len(named), 3), dtype=np.int64)
        for text, (predicted, expected) in enumerate(words):
            for ours, theirs in zip(predicted, expected, strict=True):
                tags[text, named.index(theirs), 0] += ours == theirs
                tags[text, named.index(ours), 1] += 1
                tags[text, named.index(theirs), 2] += 1
        if entities is None:
            return cls(tags, None, [])
        kinds = sorted({one.kind for both in entities for own in both for one in own})
        # Counts by text, not sums: the bootstrap draws texts again, and all its scores follow from sums over axis 0.
        counts = np.zeros((len(words), len(kinds), 3), dtype=np.int64)
        for text, (ours, theirs) in enumerate(entities):
            for place, chosen in enumerate((ours & theirs, ours, theirs)):
                for entity in chosen:
                    counts[text, kinds.index(entity.kind), place] += 1
        return cls(tags, counts, kinds)

    def scores(self, chosen: Any = slice(None)) -> dict[str, float]:
        """Of all texts, or of those of these numbers, in which some may recur."""
        tags_K3 = self.tags[chosen].sum(0)
        right, _, words = tags_K3.sum(0)
        accuracy = float(right / words)
        if self.entities is None:
            seen_K3 = tags_K3[tags_K3[:, 1:].sum(1) > 0]
            return {"accuracy": accuracy, MACRO_F1: float(np.mean([_f1(*counts) for counts in seen_K3]))}
        right, named, there = self.entities[chosen].sum((0, 1))
        return {"accuracy": accuracy} | _shares(right, named, there, ENTITY_F1)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Precision, recall and F1 of each kind of entity, and how many there are."""
        if self.entities is None:
            return {}
        sums = zip(self.kinds, self.entities.sum(0), strict=True)
        return {kind: _shares(right, named, n, "f1") | {"count": int(n)} for kind, (right, named, n) in sums}


def _shares(right: int, named: int, there: int, f1: str) -> dict[str, float]:
    precision, recall = float(right / max(1, named)), float(right / max(1, there))
    return {"precision": precision, "recall": recall, f1: _f1(right, named, there)}


def _f1(right: int, named: int, there: int) -> float:
    """2PR / (P + R) = 2 right / (named + there)."""
    return float(2 * right / max(1, named + there))


OUTSIDE = "O"


_PREFIXES = ("B", "I", "E", "S")


def has_entities(tags: Sequence[str]) -> bool:
    """Whether tags spell entities, as `B-PER` and `I-PER` do, and aren't for single words."""
    return all(tag == OUTSIDE or _parts(tag)[0] in _PREFIXES for tag in tags) and any(tag != OUTSIDE for tag in tags)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that tags spell in IOB1, IOB2 or IOBES, by the rule of CoNLL's evaluation.

    One begins at B or S, and at I or E where no entity of that kind goes on.
    """
    spelled: list[Entity] = []
    goes_on = False
    for position, written in enumerate(tags):
        if written == OUTSIDE:
            goes_on = False
            continue
        prefix, kind = _parts(written)
        # As conlleval: I-X behind B-X or I-X of the same kind goes on; behind anything else it begins an entity (IOB1).
        if goes_on and prefix in ("I", "E") and spelled[-1].kind == kind:
            spelled[-1] = spelled[-1]._replace(end=position + 1)
        else:
            spelled.append(Entity(kind, position, position + 1))
        # E and S close their entity: an I behind them begins another one.
        goes_on = prefix in ("B", "I")
    return spelled


def tag_scores(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy over words, and precision, recall and F1 = 2PR / (P + R) over whole entities of all texts.

    An entity is right if its kind, its first and its last word are. Tags that spell no entities have the macro F1 over
    words instead.
    """
    spells = has_entities(sorted({*itertools.chain(*predicted), *itertools.chain(*true)}))
    return tag_counts(predicted, true, spells).scores()


def tag_counts(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]], spells: bool) -> TagCounts:
    """What there is to count in each text, from which all scores follow; `spells` says whether tags spell entities."""
    words = [(list(tags), list(expected)) for tags, expected in zip(predicted, true, strict=True)]
    if not spells:
        return TagCounts.of(words, None)
    return TagCounts.of(words, [(set(entities(tags)), set(entities(expected))) for tags, expected in words])


def _parts(tag: str) -> tuple[str, str]:
    prefix, _, kind = tag.partition("-")
    return prefix, kind
