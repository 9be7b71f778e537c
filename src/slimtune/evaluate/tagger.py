"""The score of a model that gives words tags, on texts whose tags are known."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimtune.console.progress import Watch
from slimtune.data.reading import read_rows
from slimtune.data.rows import Tagged
from slimtune.data.settings import Source
from slimtune.data.tasks.word_alignment import Aligned, align, tag, tags_from, word_logits
from slimtune.data.texts import longest_input
from slimtune.errors import DataError, listing
from slimtune.evaluate.answers import AnswerFile
from slimtune.evaluate.likelihood import refuse_no_number
from slimtune.evaluate.result import Evaluation
from slimtune.evaluate.scorers import EvaluationSettings
from slimtune.metrics.intervals import interval_of_share
from slimtune.metrics.tagging import ENTITY_F1, entities, has_entities, tag_counts
from slimtune.models.load import LoadOptions, load_model

TASK = "token-classification"


@dataclass(frozen=True)
class TaggedText:
    """One text with the tags that the model gave it.

    Attributes:
        scores: the share of its words whose tag is right; F1 is of all texts together.
        loss: of the true tags in nats, -sum log p(tag), over the words of which the model sees a token.
        with_entities: whether tags spell entities.
    """

    tokens: list[str]
    tags: list[str]
    expected: list[str]
    scores: dict[str, float]
    loss: float
    with_entities: bool

    def to_dict(self) -> dict[str, Any]:
        """One line of the answers' file; where entities are wrong, which were missed and which are too many."""
        line = {"question": self.tokens, "answer": self.tags, "expected": self.expected}
        line |= {"score": self.scores["accuracy"], "scores": self.scores, "loss": self.loss}
        if not self.with_entities:
            return line
        ours, theirs = entities(self.tags), entities(self.expected)
        return line | {
            "missed": [self._spelled(one) for one in theirs if one not in ours],
            "wrong": [self._spelled(one) for one in ours if one not in theirs],
        }

    def _spelled(self, entity: Any) -> dict[str, Any]:
        return entity._asdict() | {"text": " ".join(self.tokens[entity.start : entity.end])}


def read_tagged(source: str | Path | Source, limit: int | None = None) -> list[Tagged]:
    """The texts of a file, from the first on; raises DataError."""
    return read_rows(source, TASK)[:limit]


def evaluate_tagger(
    source: str,
    rows: Sequence[Tagged],
    settings: EvaluationSettings,
    options: LoadOptions,
    answers: AnswerFile | None = None,
    watch: Watch = Watch(),  # noqa: B008 - it has no state
) -> Evaluation:
    """F1, precision and recall over whole entities and accuracy over words, with intervals over the texts.

    Tags that spell no entities have accuracy and macro F1 over words.

    Raises:
        ConfigError: the model gives no tags.
        DataError: tags that the model doesn't know, or texts that are too long for it.
    """
    began = time.monotonic()
    model, tokenizer = load_model(source, TASK, options)
    _check_tags(source, rows, list(model.config.id2label.values()))
    limit = longest_input(model, tokenizer, None)
    aligned = align([row.tokens for row in rows], tokenizer, limit, settings.too_long)
    watch.start("tagging texts", len(aligned.texts))
    logits = word_logits(model, tokenizer, aligned.texts, settings.batch_size, watch.step)
    kept = [rows[number] for number in aligned.kept]
    tags = [tags_from(model, text, own) for text, own in zip(aligned.texts, logits, strict=True)]
    losses = [_loss(model, row, text, own) for row, text, own in zip(kept, aligned.texts, logits, strict=True)]
    refuse_no_number(losses)
    spells = has_entities(list(model.config.id2label.values()))
    scored = [_scored(row, predicted, loss, spells) for row, predicted, loss in zip(kept, tags, losses, strict=True)]
    facts = {"dropped": len(rows) - len(kept), "without_token": aligned.without_token}
    read = sum(len(text.firsts) for text in aligned.texts)
    evaluation = _summarised(scored, spells, read, time.monotonic() - began, facts)
    if answers:
        answers.finish(evaluation.answers)
    return evaluation


def _summarised(
    scored: list[TaggedText], spells: bool, words: int, seconds: float, facts: dict[str, Any]
) -> Evaluation:
    """Scores over all texts, the main one first; `words` are those that the loss is over."""
    counts = tag_counts([text.tags for text in scored], [text.expected for text in scored], spells)
    scores = counts.scores()
    metric = ENTITY_F1 if spells else "accuracy"
    # The main one first: a dict keeps the place of a key's first mention.
    scores = {metric: scores[metric], **scores}
    intervals = {
        # `n=name` binds the name now; the lambda would see the last one of the loop. Counts by text make each draw a
        # sum.
        name: interval_of_share(lambda chosen, n=name: counts.scores(chosen)[n], len(scored))
        for name in scores
    }
    # Every word may lie behind the cut, or be of characters that the tokenizer drops.
    loss = sum(text.loss for text in scored) / max(1, words)
    facts |= {"by_kind": counts.by_kind()}
    return Evaluation(metric, scores, intervals, loss, None, scored, seconds, facts, unit="texts", loss_of="word")


def _check_tags(source: str, rows: Sequence[Tagged], known: list[str]) -> None:
    unknown = {*itertools.chain(*(row.tags for row in rows))} - set(known)
    if unknown:
        raise DataError(f"the texts have tags that {source} doesn't know: {listing(unknown)}; it has {listing(known)}")


def _loss(model: Any, row: Tagged, text: Aligned, logits_WK: torch.Tensor) -> float:
    numbers = {tag: int(number) for number, tag in model.config.id2label.items()}
    # (words with a token,): the others have no logits, and are tagged O, which counts in the scores alone.
    true_W = torch.tensor([numbers[row.tags[word]] for word in text.firsts], dtype=torch.long)
    return float(torch.nn.functional.cross_entropy(logits_WK, true_W, reduction="sum"))


def _scored(row: Tagged, tags: list[str], loss: float, spells: bool) -> TaggedText:
    right = sum(ours == theirs for ours, theirs in zip(tags, row.tags, strict=True))
    return TaggedText(row.tokens, tags, row.tags, {"accuracy": right / len(tags)}, loss, spells)


def tag_words(
    source: str,
    texts: Sequence[Sequence[str]],
    options: LoadOptions,
    batch_size: int = 32,
    too_long: str = "error",
) -> list[list[str]]:
    """The tags of each word of texts, by a model that was trained on texts with tags.

    Args:
        too_long: "error", or "truncate", where words behind the cut are tagged `O`.
    """
    model, tokenizer = load_model(source, TASK, options)
    aligned = align(texts, tokenizer, longest_input(model, tokenizer, None), too_long)
    return tag(model, tokenizer, aligned.texts, batch_size)
