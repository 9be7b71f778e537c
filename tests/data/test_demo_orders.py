"""The demo's task: repeatable, held-out sentences apart, and a score that only the right answer gets."""

from __future__ import annotations

import json

import pytest

from slimtune.data.demo_orders import PHRASINGS, Example, Order, few_shot, make_orders


def test_the_same_seed_makes_the_same_orders() -> None:
    assert make_orders(50, 10, seed=3) == make_orders(50, 10, seed=3)
    assert make_orders(50, 10, seed=3) != make_orders(50, 10, seed=4)


def test_no_held_out_sentence_occurs_in_training() -> None:
    train, held_out = make_orders(640, 100)
    sentences = [example.sentence for example in train + held_out]
    assert (len(train), len(held_out)) == (640, 100)
    assert len(set(sentences)) == 740


def test_the_phrasing_is_varied() -> None:
    train, _ = make_orders(640, 1)
    assert len(PHRASINGS) >= 16
    assert len({example.order.quantity for example in train}) == 9
    assert {example.order.size for example in train} == {"small", "medium", "large"}


RIGHT = Order("Maria", "latte", "large", 2)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (RIGHT.to_json(), True),
        ('{"quantity": 2, "size": "large", "item": "latte", "name": "Maria"}', True),
        ('{"name": "Maria", "item": "latte", "size": "large", "quantity": 3}', False),
        ('{"name": "Maria", "item": "latte", "size": "large", "quantity": "2"}', False),
        ('{"name": "maria", "item": "latte", "size": "large", "quantity": 2}', False),
        ('{"name": "Maria", "item": "latte", "size": "large"}', False),
        ('{"name": "Maria", "item": "latte", "size": "large", "quantity": 2, "x": 1}', False),
        (f"Here you are: {RIGHT.to_json()}", False),
        ("", False),
        ("[]", False),
        ("2", False),
    ],
)
def test_only_the_whole_order_is_right(answer: str, is_right: bool) -> None:
    assert Example("two large lattes for maria", RIGHT).is_answered_by(answer) == is_right


def test_a_quantity_of_true_is_not_one() -> None:
    one = Order("Maria", "latte", "large", 1)
    assert not Example("x", one).is_answered_by(one.to_json().replace("1", "true"))


def test_few_shot_puts_answered_examples_in_front() -> None:
    train, held_out = make_orders(4, 1)
    turns = few_shot(held_out[0], train)
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 4, "user"]
    assert turns[-1]["content"] == held_out[0].sentence
    assert json.loads(turns[2]["content"])["name"] == train[0].order.name
