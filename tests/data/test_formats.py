"""The formats that people write rows in: which is found, what becomes of a row, and what is wrong with others."""

from __future__ import annotations

from typing import Any

import pytest

from slimtune.data.batches import pieces
from slimtune.data.columns import recognize
from slimtune.data.encode import encode_row
from slimtune.data.formats import FORMATS, TASKS, find_format, read_as
from slimtune.data.rows import Conversation, Document, Instruction, Judged, Labelled, Pair, Preference, Prompt, Tagged
from slimtune.data.tasks.preference import trl_columns
from slimtune.errors import ConfigError, DataError
from small_text_model import tiny_tokenizer

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": [Q, A]}, {"messages": [{"role": "developer", "content": "s"}, Q, A], "tools": []}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
    "alpaca": [{"instruction": "q", "input": "", "output": "a"}, {"instruction": "q", "output": "a"}],
    "prompt-completion": [{"prompt": "q", "completion": "a"}, {"prompt": [Q], "completion": [A]}],
    "text": [{"text": "a", "url": "x"}],
    "text-label": [{"text": "a", "label": 1}, {"text": "a", "text_pair": "b", "label": "x"}],
    "tokens-tags": [{"tokens": ["a"], "tags": ["O"]}],
    "preference": [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": [Q, A], "rejected": [Q, {"role": "assistant", "content": "b"}]},
    ],
    "unpaired-preference": [{"prompt": "q", "completion": "a", "label": True}],
    "prompt-only": [{"prompt": "q", "solution": "4"}],
}
"""Rows of each format, in each way to write it."""


def of(name: str, row: dict[str, Any]) -> Any:
    return read_as(FORMATS[name], row, "here")


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_formats_are_found_by_looking(name: str, row: dict[str, Any]) -> None:
    task = "grpo" if name == "prompt-only" else "auto"
    assert recognize(row, "here", task).format.name == name
    assert find_format(name) is FORMATS[name]
    assert name in TASKS[FORMATS[name].task]
    of(name, row)


def test_every_format_has_rows_here() -> None:
    assert set(ROWS) == set(FORMATS)


def test_conversations_come_out_the_same_from_every_format() -> None:
    plain = Conversation.model_validate({"messages": [Q, A]})
    assert of("messages", {"messages": [Q, A], "id": 3}) == plain
    assert of("sharegpt", ROWS["sharegpt"][0]) == plain
    assert [row.turns() for row in (of("alpaca", row) for row in ROWS["alpaca"])] == [plain.turns()] * 2
    assert of("prompt-completion", {"prompt": "q", "completion": "a"}).turns() == plain.turns()
    in_parts = of("prompt-completion", {"prompt": [Q, A, Q], "completion": [A]})
    assert in_parts.turns() == [Q, A, Q, A]
    assert in_parts.learned() == [False, False, False, True]
    parts = [{"type": "text", "text": "q"}]
    assert of("messages", {"messages": [{"role": "user", "content": parts}, A]}) == plain


def test_sharegpt_with_system_tools_and_calls() -> None:
    turns = [
        {"from": "human", "value": "tea"},
        {"from": "function_call", "value": '{"name": "brew", "arguments": {"n": 1}}'},
        {"from": "observation", "value": "done"},
        {"from": "gpt", "value": "Here"},
    ]
    row = of("sharegpt", {"conversations": turns, "system": "s", "tools": '[{"name": "brew"}]'})
    assert [turn["role"] for turn in row.turns()] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.turns()[2]["tool_calls"][0]["function"] == {"name": "brew", "arguments": {"n": 1}}
    assert row.tools == [{"name": "brew"}]
    assert row.learned() == [False, False, True, False, True]


def test_alpaca_with_a_template_and_without() -> None:
    row = of("alpaca", {"instruction": "Add.", "input": "1 1", "output": "2", "system": "s"})
    assert isinstance(row, Instruction)
    assert [turn["content"] for turn in row.turns()] == ["s", "Add.\n\n1 1", "2"]
    tokenizer = tiny_tokenizer(chat_template=None)
    example = encode_row(row, tokenizer)
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2<|im_end|>")
    assert [tokenizer.decode(ids) for learned, ids in pieces(example) if learned] == ["2<|im_end|>"]


def test_a_text_is_learned_whole_and_ends() -> None:
    tokenizer = tiny_tokenizer()
    example = encode_row(Document(text="two teas, please"), tokenizer)
    assert tokenizer.decode(example.input_ids) == "two teas, please<|im_end|>"
    assert example.learned == len(example.input_ids) - 1


@pytest.mark.parametrize("as_messages", [False, True])
@pytest.mark.parametrize("has_template", [False, True])
def test_preferences_go_to_trl_as_messages_where_there_is_a_template(as_messages: bool, has_template: bool) -> None:
    def said(role: str, text: str, is_answer: bool = False) -> Any:
        return [{"role": role, "content": text}] if as_messages or (is_answer and has_template) else text

    tokenizer = tiny_tokenizer() if has_template else tiny_tokenizer(chat_template=None)
    asked = said("user", "q")
    pair = Preference(prompt=asked, chosen=said("assistant", "a"), rejected=said("assistant", "b"))
    judged = Judged(prompt=asked, completion=said("assistant", "a"), label=False)
    if as_messages and not has_template:
        for row in (pair, judged):
            with pytest.raises(DataError, match="no chat template"):
                trl_columns(row, tokenizer)
        return
    q, a, b = (said(role, text, True) for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
    assert trl_columns(pair, tokenizer) == {"prompt": q, "chosen": a, "rejected": b}
    assert trl_columns(judged, tokenizer) == {"prompt": q, "completion": a, "label": False}
    prompt = Prompt.model_validate({"prompt": asked, "solution": "4"})
    assert trl_columns(prompt, tokenizer) == {"prompt": q, "solution": "4"}


def test_rows_of_the_other_tasks() -> None:
    assert of("text-label", {"text": "a", "label": 1}) == Labelled(text="a", label="1")
    assert of("text-label", {"text": "a", "text_pair": "", "label": True}).text_pair is None
    assert of("tokens-tags", {"tokens": ["a"], "tags": [3]}) == Tagged(tokens=["a"], tags=["3"])
    assert of("unpaired-preference", ROWS["unpaired-preference"][0]) == Judged(prompt="q", completion="a", label=True)
    prompt = of("prompt-only", {"prompt": "q", "solution": "4"})
    assert (prompt.turns(), prompt.model_extra) == ([Q], {"solution": "4"})
    asked = of("prompt-only", {"messages": [Q, A]})
    assert isinstance(asked, Prompt)
    assert asked.turns() == [Q]


def test_preferences_with_the_prompt_beside_and_within() -> None:
    b = {"role": "assistant", "content": "b"}
    beside = of("preference", {"prompt": [Q], "chosen": [A], "rejected": [b]})
    for row in (
        {"chosen": [Q, A], "rejected": [Q, b]},
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, b]},
        {"prompt": "q", "chosen": [A], "rejected": [b]},
    ):
        assert of("preference", row) == beside
    assert of("preference", {"chosen": "q: a", "rejected": "q: b"}) == Preference(
        prompt="q: ", chosen="a", rejected="b"
    )


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("messages", {"messages": [Q, {"role": "tool", "content": "s"}, A]}, "turn 2 is a tool's"),
        ("messages", {"messages": [Q]}, "no assistant turn"),
        ("messages", {"messages": [Q, A | {"weight": 0}]}, "all assistant turns have weight 0"),
        ("messages", {"messages": [Q, {"role": "assistant", "content": [{"type": "image"}]}]}, "content"),
        ("messages", {"messages": [Q, A | {"weight": 3}]}, "weight"),
        ("messages", {"messages": "q"}, "messages: input should be a valid list"),
        ("sharegpt", {"conversations": [{"from": "humen", "value": "q"}]}, "did you mean 'human'"),
        ("sharegpt", {"conversations": "x"}, "not a list of turns"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "x"}]}, "not JSON"),
        ("alpaca", {"instruction": "x"}, "needs instruction and output"),
        ("alpaca", {"instruction": "x", "output": 3}, "completion: input should be a valid string"),
        ("text", {"text": ""}, "at least 1"),
        ("text-label", {"text": "a", "label": 0.5}, "label"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": [A]}, "both be texts"),
        ("preference", {"chosen": "a", "rejected": "b"}, "is empty"),
        ("unpaired-preference", {"prompt": "q", "completion": "a", "label": "maybe"}, "label"),
        ("prompt-only", {"messages": [A]}, "answers only"),
    ],
)
def test_rows_that_can_not_be_read_say_where_and_why(name: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"^here.*{said}"):
        of(name, row)


@pytest.mark.parametrize(
    ("row", "task", "said"),
    [
        ({"mesages": []}, "auto", "did you mean 'messages'"),
        ({"text": "a", "lable": 1}, "auto", "did you mean 'label'"),
        ({"instructions": "a", "output": "b"}, "auto", "did you mean 'instruction'"),
        ({}, "auto", "has no fields"),
        ({"text": "a"}, "dpo", "no format of task dpo"),
    ],
)
def test_rows_of_no_format(row: dict[str, Any], task: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        recognize(row, "here", task)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        find_format("alpacca")
    with pytest.raises(ConfigError, match="task dpo can't learn from format alpaca"):
        find_format("alpaca", "dpo")
    with pytest.raises(ConfigError, match="did you mean 'text'"):
        recognize({}, "here", "texts")
    assert isinstance(of("prompt-completion", {"prompt": "a", "completion": "b"}), Pair)
