"""Rows as tools and people write them: what becomes of each layout, mark and column, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimtune.data.batches import pieces
from slimtune.data.encode import encode_row
from slimtune.data.formats import format_of, read_as
from slimtune.data.preview import preview
from slimtune.data.reading import read_splits
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import Remark, splits_report
from slimtune.data.tasks.registry import read
from slimtune.errors import DataError
from small_text_model import tiny_tokenizer, write_lines

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
CALL = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
AS_JSON = '{"name": "f", "arguments": {"n": 1}}'


def of(row: dict[str, Any], task: str = "auto") -> Any:
    return read_as(format_of(row, "here", task), row, "here")


def share_gpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


def texts(row: Any) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in row.turns()]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [Q, A]},
        {"messages": share_gpt(("human", "q"), ("gpt", "a"))},
        {"messages": json.dumps([Q, A])},
        {"conversations": json.dumps(share_gpt(("user", "q"), ("assistant", "a")))},
        {"messages": [{"role": "Human", "content": "q"}, {"role": "model", "content": "a"}]},
        {"messages": [Q | {"tool_calls": None, "name": None}, A | {"tool_calls": None, "weight": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "image": None}]}, A]},
    ],
    ids=str,
)
def test_layouts_of_one_conversation(row: dict[str, Any]) -> None:
    assert of(row) == of({"messages": [Q, A]})


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "function_call", "value": AS_JSON},
        {"from": "function-call", "value": AS_JSON},
        {"role": "tool_call", "content": AS_JSON},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"n": 1}'}},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
    ],
    ids=str,
)
@pytest.mark.parametrize("responds", ["tool", "function", "observation", "ipython", "function-response"])
def test_calls_and_responses(turn: dict[str, Any], responds: str) -> None:
    turns = of({"messages": [Q, turn, {"role": responds, "content": "1"}, A]}).turns()
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert turns[1]["tool_calls"] == [CALL]


def test_system_messages_in_a_column_and_in_the_middle() -> None:
    system = {"role": "system", "content": "s"}
    for name in ("messages", "conversations"):
        assert texts(of({name: [Q, A], "system": "s"})) == [("system", "s"), ("user", "q"), ("assistant", "a")]
        assert of({name: [system, Q, A], "system": "s"}) == of({name: [system, Q, A]})
        with pytest.raises(DataError, match="two system messages that differ"):
            of({name: [system, Q, A], "system": "t"})
    assert texts(of({"messages": [Q, system, A]})) == [("user", "q"), ("system", "s"), ("assistant", "a")]
    row = of({"prompt": "q", "completion": "a", "system": "s"})
    assert texts(row) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert row.plain() == ("s\n\nq", "a")


@pytest.mark.parametrize("prompt", ["q", [Q]])
def test_system_messages_beside_answers_that_are_compared(prompt: Any) -> None:
    for row in (
        {"prompt": prompt, "chosen": "a", "rejected": "b"},
        {"prompt": prompt, "completion": "a", "label": True},
        {"chosen": [Q, A], "rejected": [Q, B]},
        {"instruction": "q", "chosen": "a", "rejected": "b"},
    ):
        asked = of(row | {"system": "s"}).prompt
        assert [(turn.role, turn.content) for turn in asked] == [("system", "s"), ("user", "q")]
        assert of(row | {"system": ""}) == of(row)
    for row in ({"prompt": prompt, "system": "s", "answer": "4"}, {"messages": [Q, A], "system": "s", "answer": "4"}):
        assert texts(of(row, "grpo")) == [("system", "s"), ("user", "q")]
        assert of(row, "grpo").model_extra["answer"] == "4"
    with pytest.raises(DataError, match="has a prompt and input besides"):
        of({"prompt": "q", "input": "1 1", "chosen": "a", "rejected": "b"})


def test_an_assistant_that_begins_is_learned_where_the_template_lets_it() -> None:
    tokenizer = tiny_tokenizer()
    greeted = of({"messages": [{"role": "assistant", "content": "two teas"}, Q, A]})
    example = encode_row(greeted, tokenizer)
    learned = [tokenizer.decode(ids) for learned, ids in pieces(example) if learned]
    assert learned == ["two teas<|im_end|>", "a<|im_end|>"]
    strict = tiny_tokenizer()
    strict.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + str(
        tokenizer.chat_template
    )
    with pytest.raises(DataError, match="refuses a conversation of the roles assistant, user, assistant: user first"):
        encode_row(greeted, strict)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"train": 0}])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_marked_turn_is_not_learned(mark: dict[str, Any], column: str) -> None:
    tokenizer = tiny_tokenizer()
    row = of({column: [Q, A | mark, Q, B | {"train": True}]})
    assert row.learned() == [False, False, False, True]
    assert all(turn.keys() == {"role", "content"} for turn in row.turns())
    learned = [tokenizer.decode(ids) for learned, ids in pieces(encode_row(row, tokenizer)) if learned]
    assert learned == ["b<|im_end|>"]
    with pytest.raises(DataError, match="all assistant turns have weight 0"):
        of({column: [Q, A | mark]})


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (A | {"train": False, "weight": 1}, "weight and train contradict"),
        (A | {"train": "no"}, "train must be true or false"),
        (A | {"train_detail": [{"begin_offset": 0}]}, "train_detail marks parts of a turn"),
        (Q | {"train": True}, "marks a turn of the user as learned"),
        ({"role": "user", "content": [{"type": "image", "image": "x"}]}, "holds an image"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "holds an image"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "holds an audio"),
        ({"role": "asistant", "content": "a"}, "did you mean 'assistant'"),
    ],
    ids=str,
)
def test_turns_that_are_refused(turn: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"^here: messages.1: .*{said}"):
        of({"messages": [Q, turn, A]})


def test_history_of_alpaca_stands_before_the_question_and_is_learned() -> None:
    row = of({"instruction": "And dog?", "input": "in French", "output": "chien", "history": [["cat?", "chat"]]})
    assert [text for _, text in texts(row)] == ["cat?", "chat", "And dog?\n\nin French", "chien"]
    assert row.learned() == [False, True, False, True]
    with pytest.raises(DataError, match="history must be a list of pairs"):
        of({"instruction": "a", "output": "b", "history": ["cat?"]})


def test_judged_conversations_are_judged_and_not_learned() -> None:
    for column in ("messages", "conversations"):
        for label in ("label", "kto_tag"):
            row = {column: [Q, A], label: False}
            assert format_of(row, "here").task == "kto"
            assert of(row) == of({"prompt": [Q], "completion": [A], "label": False})
            with pytest.raises(DataError, match=f"column {label}.*choose task=kto"):
                of(row, "text")
    assert of({"prompt": "q", "completion": "a", "kto_tag": True}).label is True
    with pytest.raises(DataError, match="ends in no answer"):
        of({"messages": [Q], "label": True})


def test_preferences_of_llama_factory() -> None:
    expected = of({"prompt": [Q], "chosen": [A], "rejected": [B]})
    gpt = [{"from": "gpt", "value": text} for text in "ab"]
    assert of({"conversations": share_gpt(("human", "q")), "chosen": gpt[0], "rejected": gpt[1]}) == expected
    assert of({"messages": [Q], "chosen": [A], "rejected": [B]}) == expected
    row = {"instruction": "add", "input": "1 1", "chosen": "2", "rejected": "3"}
    assert of(row) == of({"prompt": "add\n\n1 1", "chosen": "2", "rejected": "3"})
    # UltraFeedback's rows hold the prompt and the chosen answer a second time.
    assert of({"prompt": "q", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [Q], "chosen": [A | {"train": False}], "rejected": [B]},
        {"prompt": [Q], "chosen": [A], "rejected": [B | {"weight": 0}]},
        {"messages": [Q, A | {"loss": False}], "label": True},
    ],
    ids=str,
)
def test_an_answer_that_is_compared_can_not_be_marked(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="a turn of an answer is marked as not learned"):
        of(row)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": [Q, A], "images": ["x.png"]}, "images"),
        ({"text": "a", "image": "x.png"}, "image"),
        ({"prompt": "q", "completion": "a", "history": [["q", "a"]]}, "history"),
        ({"question": "q", "chosen": "q a", "rejected": "q b"}, "question"),
        ({"instruction": "q", "output": "a", "context": "c"}, "context"),
        ({"messages": [Q, A], "functions": [{"name": "f"}]}, "functions"),
        ({"messages": [Q, A], "train_on_inputs": True}, "train_on_inputs"),
        ({"messages": [Q, A], "roles_to_train": ["user"]}, "roles_to_train"),
        ({"text": "a", "weight": 0}, "weight"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]}, "tools"),
    ],
    ids=str,
)
def test_columns_that_would_change_the_meaning_are_named(row: dict[str, Any], column: str) -> None:
    with pytest.raises(DataError, match=f"here has a column {column}, which format .* would change what is learned"):
        of(row)


@pytest.mark.parametrize(
    "columns",
    [{"images": []}, {"train_on_inputs": False}, {"roles_to_train": ["assistant"]}, {"weight": 1}, {"functions": None}],
    ids=str,
)
def test_columns_that_ask_for_what_is_done_anyway_are_taken(columns: dict[str, Any]) -> None:
    assert of({"messages": [Q, A], **columns}) == of({"messages": [Q, A]})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "response": "r"}, r"nearest to prompt-completion.*fields: \{completion: response\}"),
        ({"question": "p", "answer": "r"}, r"fields: \{prompt: question, completion: answer\}"),
        ({"instruction": "i", "response": "r"}, r"nearest to alpaca.*fields: \{output: response\}"),
        ({"conversation": [Q, A]}, r"nearest to sharegpt.*fields: \{conversations: conversation\}"),
    ],
    ids=str,
)
def test_the_format_that_is_most_likely_meant_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        of(row)


def test_ignored_columns_repeated_rows_and_held_out_rows_in_training_are_told(tmp_path: Path) -> None:
    rows = [{"messages": [Q, A], "id": 1}] * 16
    path = write_lines(tmp_path / "rows.jsonl", *rows, {"messages": [Q, B], "source": "x"})
    splits = read_splits(DataSettings(path, 0.2), seed=1)
    report = [f"{remark.warning}{remark.text}" for remark in splits_report(splits)]
    held_out = [row.messages[1].content for row in splits.held_out[0].rows]
    assert f"{path}: format messages ignores the columns id (16 rows), source (1 row)" in report[0]
    assert report[1].startswith(f"repeated rows: {16 - held_out.count('a') - 1} of 14,")
    assert report[2].startswith(f"held-out rows that are in the training data, too: {held_out.count('a')} of 3,")
    assert splits_report(read_splits(DataSettings(write_lines(tmp_path / "one.jsonl", {"text": "a"})))) == []


def test_the_preview_lists_each_column_as_used_or_ignored(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl", {"prompt": "q", "completion": "a", "id": 1}, {"prompt": "q", "completion": "b"}
    )
    columns = preview(DataSettings(path)).to_dict(8, 2)["columns"]
    assert [(c["name"], c["rows"], c["used"]) for c in columns] == [
        ("prompt", 2, True), ("completion", 2, True), ("id", 1, False)
    ]  # fmt: skip


def test_of_a_stream_the_ignored_columns_are_told_without_a_count(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"text": "two teas", "id": 1}, {"text": "a latte", "id": 2})
    (remark,) = splits_report(read(DataSettings(path, streaming=True)).splits)
    assert isinstance(remark, Remark)
    assert remark.text == f"{path}: format text ignores the columns id"
