"""Examples in the prompt: which, in which form, and that none of them is the question."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slimtune.data.demo_orders import few_shot
from slimtune.errors import ConfigError, DataError
from slimtune.evaluate.in_context import Shots, draw_shots
from slimtune.evaluate.run import evaluate, prepare
from slimtune.evaluate.scorers import EvaluationSettings
from slimtune.evaluate.tasks import Question, Task, answered, conversation, prompt, read_task, with_labels
from small_text_model import CHATML, orders, tiny_model, tiny_tokenizer, write_lines

REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def said(text: str, expected: str) -> Question:
    return Question([{"role": "user", "content": text}], expected, f"{text}\n", text=text)


def labelled(*pairs: tuple[str, str], source: str = "task") -> Task:
    labels = sorted({label for _, label in pairs})
    return with_labels(Task(source, [said(*pair) for pair in pairs], labels), labels)


TASK = labelled(("the plot is thin", "bad"), ("a fine film", "good"))
POOL = labelled(*((f"example {n}", "good" if n % 5 == 0 else "bad") for n in range(40)), source="pool")


def test_examples_are_former_turns_as_the_demo_has_them() -> None:
    examples = orders(5)
    questions = [Question(e.question(), e.order.to_json(), "") for e in examples]
    assert conversation(questions[0], questions[1:]) == few_shot(examples[0], examples[1:])


def test_a_model_without_a_template_reads_text() -> None:
    pairs = [Question([{"role": "user", "content": f"Q{n}: "}], f"A{n}", f"Q{n}: ") for n in range(3)]
    tokenizer = tiny_tokenizer(None)
    assert prompt(tokenizer, pairs[0], pairs[1:], "Answer.") == "Answer.\n\nQ1: A1\n\nQ2: A2\n\nQ0: "
    whole, begin = answered(tokenizer, pairs[0], pairs[1:], "", "A0")
    assert (whole[:begin], whole[begin:]) == ("Q1: A1\n\nQ2: A2\n\nQ0: ", "A0")


def test_a_template_without_system_messages_gets_the_instruction_in_the_first_turn() -> None:
    tokenizer = tiny_tokenizer(REFUSES_SYSTEM)
    shown = prompt(tokenizer, said("b", "2"), [said("a", "1")], "Count.")
    assert shown == "<user>Count.\n\na<|im_end|><assistant>1<|im_end|><user>b<|im_end|><assistant>"


def test_tools_are_shown_to_the_model(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("{% if tools %}tools:{{ tools[0].name }} {% endif %}" + CHATML)
    turns = [{"role": "user", "content": "wet?"}, {"role": "assistant", "content": "yes"}]
    (question,) = read_task(write_lines(tmp_path / "t.jsonl", {"messages": turns, "tools": [{"name": "w"}]})).questions
    shown = prompt(tokenizer, question)
    assert shown.startswith("tools:w <|im_start|>user\nwet?")
    assert answered(tokenizer, question, [], "", "yes") == (f"{shown}yes<|im_end|>", len(shown))


def test_random_examples_are_balanced_and_the_same_for_all_questions() -> None:
    found = draw_shots(TASK, TASK.questions, POOL, Shots(6, seed=1))
    assert Counter(shot.expected for shot in found.shots[0]) == {"good": 3, "bad": 3}
    assert found.shots[0] == found.shots[1] == draw_shots(TASK, TASK.questions, POOL, Shots(6, seed=1)).shots[0]
    assert found.shots[0] != draw_shots(TASK, TASK.questions, POOL, Shots(6, seed=2)).shots[0]
    assert (
        abs(Counter(s.expected for s in draw_shots(TASK, TASK.questions, POOL, Shots(5)).shots[0])["good"] - 2.5) == 0.5
    )
    # Of the rare label there are eight.
    assert Counter(s.expected for s in draw_shots(TASK, TASK.questions, POOL, Shots(20)).shots[0])["good"] == 8


@pytest.mark.parametrize("encoder_is_there", [True, False])
def test_similar_examples_are_the_most_alike_with_the_nearest_last(
    encoder_is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not encoder_is_there:
        monkeypatch.setattr("importlib.metadata.distribution", _not_installed)
    task = Task("task", [said("two large pizzas for maria", "x"), said("is it raining in oslo", "y")])
    pool = Task(
        "pool", [said(t, t) for t in ("weather in oslo", "one large pizza", "a poem on the sea", "raining cats")]
    )
    found = draw_shots(task, task.questions, pool, Shots(2, "similar"))
    assert found.shots[0][-1].user_text == "one large pizza"
    assert {shot.user_text for shot in found.shots[1]} == {"weather in oslo", "raining cats"}
    assert ("TF-IDF" in found.by) is not encoder_is_there


def _not_installed(name: str) -> Any:
    import importlib.metadata

    raise importlib.metadata.PackageNotFoundError(name)


def test_the_question_is_never_among_its_examples() -> None:
    pool = labelled(
        *((q.user_text, q.expected) for q in POOL.questions), ("a fine film", "good"), (" the plot is thin ", "bad")
    )
    for pick in ("random", "similar"):
        found = draw_shots(TASK, TASK.questions[:1], pool, Shots(40, pick))
        assert found.leaked == 2
        assert not {shot.user_text for shot in found.shots[0]} & {question.user_text for question in TASK.questions}


def test_random_labels_are_drawn_without_regard_to_the_text() -> None:
    plain = draw_shots(TASK, TASK.questions, POOL, Shots(40))
    mixed = draw_shots(TASK, TASK.questions, POOL, Shots(40, random_labels=True))
    true = {shot.user_text: shot.expected for shot in plain.shots[0]}
    kept = sum(shot.expected == true[shot.user_text] for shot in mixed.shots[0])
    assert {shot.user_text for shot in mixed.shots[0]} == set(true)
    assert 10 <= kept <= 30
    assert mixed.shots == draw_shots(TASK, TASK.questions, POOL, Shots(40, random_labels=True)).shots


def test_random_answers_are_those_of_other_examples() -> None:
    task = Task("task", [said("q", "x")])
    pool = Task("pool", [said(f"q{n}", f"a{n}") for n in range(9)])
    (shots,) = draw_shots(task, task.questions, pool, Shots(9, random_labels=True)).shots
    assert sorted(shot.expected for shot in shots) == [f"a{n}" for n in range(9)]
    assert all(shot.user_text[1:] != shot.expected[1:] for shot in shots)


def test_what_does_not_fit_is_left_out_and_counted(tmp_path: Path) -> None:
    task = read_task(write_lines(tmp_path / "t.jsonl", *({"messages": e.messages()} for e in orders(3))))
    pool = Task(
        "pool",
        read_task(write_lines(tmp_path / "p.jsonl", *({"messages": e.messages()} for e in orders(9)[3:]))).questions,
    )
    model, tokenizer = tiny_model(max_position_embeddings=200), tiny_tokenizer()
    found = evaluate(model, tokenizer, prepare(task, EvaluationSettings(max_new_tokens=8), Shots(6), pool))
    assert found.facts["examples"]["shortened"] == 3
    assert all(0 < answer.shots < 6 for answer in found.answers)
    with pytest.raises(DataError, match=r"3 of 3 questions don't fit.*8 for the answer.*40"):
        evaluate(tiny_model(max_position_embeddings=40), tokenizer, prepare(task, EvaluationSettings(max_new_tokens=8)))


@pytest.mark.parametrize(
    ("shots", "pool", "said"),
    [
        (Shots(2), None, "no examples were given"),
        (Shots(41), POOL, "ask for 40 at most"),
        (Shots(2), TASK, "2 are left out as questions"),
        (
            Shots(2, random_labels=True),
            Task("pool", [Question([{"role": "user", "content": str(n)}], "a", "") for n in range(3)]),
            "two different",
        ),
    ],
)
def test_examples_that_are_not_there(shots: Shots, pool: Any, said: str) -> None:
    task = (
        TASK
        if pool is not None and pool.labels
        else Task("task", [Question([{"role": "user", "content": "q"}], "x", "")])
    )
    with pytest.raises((DataError, ConfigError), match=said):
        draw_shots(task, task.questions, pool, shots)


@pytest.mark.parametrize(
    "fields", [{"count": -1}, {"count": 2, "pick": "simular"}, {"random_labels": True}, {"count": 1, "seed": -1}]
)
def test_shots_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Shots(**fields)
