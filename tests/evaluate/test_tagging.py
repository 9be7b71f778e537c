"""Entities are read from tags by CoNLL's rule, and scored whole."""

from __future__ import annotations

import pytest

from slimtune.evaluate.tagging import Entity, entities, has_entities, tag_scores

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
