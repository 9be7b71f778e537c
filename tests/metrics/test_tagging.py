"""Entities are read from tags by CoNLL's rule, and scored whole."""

from __future__ import annotations

import numpy as np
import pytest

from slimtune.metrics.tagging import Entity, entities, has_entities, tag_counts, tag_scores

SPELLED = [
    ("IOB2", "B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
    ("two beside one another", "B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
    ("IOB1", "I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
    ("the kind changes inside", "B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
    ("IOBES", "S-LOC B-PER I-PER E-PER I-PER", [("LOC", 0, 1), ("PER", 1, 4), ("PER", 4, 5)]),
    ("a kind with a dash", "B-date-time I-date-time", [("date-time", 0, 2)]),
    ("none", "O O", []),
]


@pytest.mark.parametrize(("tags", "found"), [case[1:] for case in SPELLED], ids=[case[0] for case in SPELLED])
def test_entities_are_those_that_the_tags_spell(tags: str, found: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == [Entity(*entity) for entity in found]


def test_an_entity_is_right_as_a_whole_or_not_at_all() -> None:
    true = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "O", "B-PER", "O"]]
    said = [["B-PER", "O", "O", "O"], ["B-LOC", "O", "B-PER", "B-LOC"]]
    # Of four that were named two are right, of three that there are two were found.
    assert tag_scores(said, true) == {
        "accuracy": 6 / 8, "precision": 2 / 4, "recall": 2 / 3, "entity_f1": pytest.approx(4 / 7)
    }  # fmt: skip
    assert tag_scores(true, true)["entity_f1"] == 1
    nothing = [["O", "O", "O", "O"]] * 2
    assert tag_scores(nothing, true)["entity_f1"] == 0


def test_tags_of_single_words_are_scored_as_classes() -> None:
    assert not has_entities(["NOUN", "VERB", "O"])
    assert not has_entities(["O"])
    found = tag_scores([["NOUN", "VERB"]], [["NOUN", "NOUN"]])
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3)}


def test_the_scores_of_a_choice_of_texts_are_those_of_these_texts() -> None:
    """A bootstrap draws texts with replacement."""
    true = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "B-PER"], ["O", "O", "S-LOC"]]
    said = [["B-PER", "O", "O"], ["B-LOC", "O", "B-LOC"], ["O", "O", "S-LOC"]]
    chosen = [0, 1, 1]
    counts = tag_counts(said, true, spells=True)
    assert counts.scores(np.array(chosen)) == tag_scores([said[i] for i in chosen], [true[i] for i in chosen])
    assert counts.by_kind()["LOC"] == {"precision": 2 / 3, "recall": 1, "f1": pytest.approx(4 / 5), "count": 2}
    numbers = [["1", "2"], ["3", "1"]], [["1", "1"], ["3", "2"]]
    assert tag_counts(*numbers, spells=False).scores(np.array([1, 1])) == tag_scores([["3", "1"]] * 2, [["3", "2"]] * 2)


def test_texts_without_an_entity_are_scored_by_entities_all_the_same() -> None:
    assert tag_counts([["O", "B-PER"]], [["O", "O"]], spells=True).scores()["precision"] == 0
    assert tag_counts([["O"]], [["O"]], spells=True).scores()["entity_f1"] == 0
