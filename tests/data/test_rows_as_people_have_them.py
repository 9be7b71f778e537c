"""Rows as tools and people write them: what becomes of each layout, mark and column, and what is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from slimtune.data.batches import pieces
from slimtune.data.columns import recognize
from slimtune.data.encode import encode_row
from slimtune.data.formats import read_as
from slimtune.data.preview import preview
from slimtune.data.reading import read_splits
from slimtune.data.settings import DataSettings
from slimtune.data.sources import renamed
from slimtune.data.tasks.base import Remark, splits_report
from slimtune.data.tasks.registry import read
from slimtune.errors import DataError
from slimtune.pipeline.show_data import shortened
from small_text_model import tiny_model, tiny_tokenizer, write_lines

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
CALL = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
AS_JSON = '{"name": "f", "arguments": {"n": 1}}'


def of(row: dict[str, Any], task: str = "auto") -> Any:
    layout = recognize(row, "here", task)
    return read_as(layout.format, renamed(row, "here", layout.fields), "here")


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
            assert recognize(row, "here").format.task == "kto"
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


PAIR = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("row", "same", "task"),
    [
        *(({one: "q", two: "a"}, PAIR, "auto") for one in ("question", "input", "query", "problem", "prompt")
          for two in ("answer", "output", "response", "solution")),
        ({"user": "q", "assistant": "a"}, PAIR, "auto"),
        ({"source": "q", "target": "a"}, PAIR, "seq2seq"),
        ({"question": "q", "answer": "a", "source": "a book"}, PAIR | {"source": "a book"}, "auto"),
        ({"instruction": "q", "response": "a"}, {"instruction": "q", "output": "a"}, "auto"),
        *(({"instruction": "q", name: "c", "response": "a"}, {"instruction": "q", "input": "c", "output": "a"}, "auto")
          for name in ("input", "context")),
        ({"question": "q", "answer": "a"}, PAIR, "seq2seq"),
        ({"question": "q", "answer": "4"}, {"prompt": "q", "answer": "4"}, "grpo"),
        ({"prompt": "q", "accepted": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}, "auto"),
        ({"question": "q", "answer": "a", "label": True}, PAIR | {"label": True}, "kto"),
        ({"conversation": [Q, A]}, {"messages": [Q, A]}, "auto"),
        ({"chat": json.dumps([Q, A])}, {"messages": [Q, A]}, "auto"),
        *(({text: "t", label: "l"}, {"text": "t", "label": "l"}, "auto") for text in ("sentence", "review", "text")
          for label in ("sentiment", "emotion", "intent", "category")),
        ({"sentence": "t", "label": 1}, {"text": "t", "label": 1}, "auto"),
        ({"premise": "t", "hypothesis": "u", "label": 1}, {"text": "t", "text_pair": "u", "label": 1}, "auto"),
        ({"question": "t", "sentence": "u", "label": 1}, {"text": "t", "text_pair": "u", "label": 1}, "auto"),
        ({"tokens": ["a"], "ner_tags": ["O"]}, {"tokens": ["a"], "tags": ["O"]}, "auto"),
    ],
    ids=str,
)  # fmt: skip
def test_common_names_of_columns_are_found(row: dict[str, Any], same: dict[str, Any], task: str) -> None:
    assert of(row, task) == of(same, task)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a", "response": "b"},
        {"question": "q", "input": "p", "answer": "a"},
        {"question": "q", "answer": {"text": "a"}},
        {"dialogue": "Tom: hi", "summary": "s"},
        {"title": "t", "body": "b"},
    ],
    ids=str,
)
def test_columns_that_could_mean_either_are_not_guessed(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"no format of task auto.*--field prompt=COLUMN.*data\.fields\.prompt"):
        of(row)


def test_a_text_is_a_text_where_the_task_says_so() -> None:
    assert of({"text": "t", "category": "c"}, "text") == of({"text": "t"})


def test_columns_that_were_found_are_told_and_hold_for_a_stream(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "faq.jsonl", {"question": "two teas", "answer": "yes"})
    said = f"{path}: read as prompt-completion with fields {{prompt: question, completion: answer}}"
    for streaming in (False, True):
        data = read(DataSettings(path, streaming=streaming))
        assert said in [remark.text for remark in splits_report(data.splits)]
    encoded = data.encode(tiny_model(), tiny_tokenizer())
    assert encoded.facts["examples"] == "streamed"
    write_lines(path, {"question": "two teas", "answer": "yes"}, {"question": "one tea"})
    with pytest.raises(DataError, match="line 2 has no column 'answer'"):
        read_splits(DataSettings(path))


def test_fields_hold_for_every_source_without_its_own(tmp_path: Path) -> None:
    here = write_lines(tmp_path / "here.jsonl", {"frage": "q", "antwort": "a"})
    there = write_lines(tmp_path / "there.jsonl", {"q": "q", "a": "a"})
    own = {"path": str(there), "fields": {"prompt": "q", "completion": "a"}}
    settings = DataSettings([str(here), own], [str(here)], fields={"prompt": "frage", "completion": "antwort"})
    splits = read_splits(settings)
    assert [row for source in (*splits.train, *splits.held_out) for row in source.rows] == [of(PAIR)] * 3


@pytest.mark.parametrize(
    "row",
    [
        PAIR | {"completion": ""},
        PAIR | {"completion": " \n"},
        {"instruction": "q", "output": ""},
        {"messages": [Q, A | {"content": ""}]},
        {"messages": [Q, A, Q, A | {"content": " "}]},
        {"conversations": share_gpt(("human", "q"), ("gpt", ""))},
        {"instruction": "q", "output": "a", "history": [["p", ""]]},
        {"prompt": [Q], "completion": [A | {"content": ""}]},
        {"prompt": "q", "chosen": "a", "rejected": " "},
        {"prompt": "q", "completion": "", "label": True},
        {"messages": [Q, A | {"content": ""}], "label": True},
        {"text": "t", "label": ""},
    ],
    ids=str,
)
def test_an_empty_answer_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"^here.* empty"):
        of(row)


def test_an_empty_answer_that_is_not_learned_or_calls_a_tool_is_none() -> None:
    assert of({"messages": [Q, A | {"content": "", "weight": 0}, Q, A]}).learned() == [False, False, False, True]
    assert of({"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}).learned()[-1]


def test_bad_rows_are_skipped_with_a_count_and_the_first_three(tmp_path: Path) -> None:
    good, bad = {"messages": [Q, A]}, {"messages": [Q]}
    path = write_lines(tmp_path / "rows.jsonl", bad, good, bad, bad, {"mesages": [Q]}, good)
    with path.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match="line 1 has no assistant turn"):
        read_splits(DataSettings(path))
    splits = read_splits(DataSettings(path, bad_rows="skip"))
    assert len(splits.train[0].rows) == 2
    assert [place.rpartition(" ")[2] for place in splits.train[0].places] == ["2", "6"]
    (remark,) = splits_report(splits)[:1]
    assert isinstance(remark, Remark)
    assert remark.warning == "5 rows skipped"
    assert re.findall(r"line (\d)", remark.text) == ["1", "3", "4"]
    nothing = write_lines(tmp_path / "nothing.jsonl", bad, bad)
    with pytest.raises(DataError, match=r"none of the 2 rows of .* can be read: .*line 1 has no assistant turn"):
        read_splits(DataSettings(nothing, bad_rows="skip"))


def test_rows_that_the_template_refuses_are_skipped_too(tmp_path: Path) -> None:
    strict = tiny_tokenizer()
    strict.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + str(
        strict.chat_template
    )
    path = write_lines(tmp_path / "rows.jsonl", {"messages": [A, Q, A]}, {"messages": [Q, A]})
    for streaming in (False, True):
        with pytest.raises(DataError, match="user first"):
            next(iter(read(DataSettings(path, streaming=streaming)).encode(tiny_model(), strict).examples))
    encoded = read(DataSettings(path, bad_rows="skip")).encode(tiny_model(), strict)
    assert len(encoded.examples) == 1
    assert "1 row skipped" in [entry.warning for entry in encoded.report if isinstance(entry, Remark)]
    streamed = read(DataSettings(path, bad_rows="skip", streaming=True)).encode(tiny_model(), strict)
    next(iter(streamed.examples))
    assert streamed.after()["rows skipped"] == 1
    write_lines(path, {"messages": [A, Q, A]})
    with pytest.raises(DataError, match="user first"):
        read(DataSettings(path, bad_rows="skip")).encode(tiny_model(), strict)


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolons"), ("\t", "tabs"), (",", "")])
def test_what_separates_the_columns_of_a_table_is_found_and_told(delimiter: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "faq.csv"
    path.write_text(f'question{delimiter}answer\n"q{delimiter} and, more; yes"{delimiter}a\n')
    splits = read_splits(DataSettings(path))
    assert splits.train[0].rows == [of({"prompt": f"q{delimiter} and, more; yes", "completion": "a"})]
    said = [note for note in splits.train[0].notes if "separated" in note]
    assert said == [f"{path}: faq.csv is separated by {name}"] * bool(name)


def test_what_stands_in_quotation_marks_separates_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "faq.csv"
    path.write_text('prompt;"a, b";"c, d";completion\nq;1;2;a\n')
    (source,) = read_splits(DataSettings(path)).train
    assert source.rows == [of({"prompt": "q", "completion": "a"})]
    assert source.ignored == {"a, b": 1, "c, d": 1}


def test_a_long_row_is_cut_in_the_preview_of_any_format(tmp_path: Path) -> None:
    words = " ".join(f"w{number}" for number in range(5000))
    for row in (
        {"text": words},
        {"prompt": words, "completion": "the end"},
        {"messages": [Q, A] * 2500},
        {"tokens": words.split(), "tags": ["O"] * 5000},
    ):
        (sample,) = preview(DataSettings(write_lines(tmp_path / "long.jsonl", row))).samples
        shown = "".join(text for _, text in shortened(sample))
        whole = "".join(text for _, text in sample)
        assert len(shown) < 1300 < len(whole)
        begins, count, ends = re.fullmatch(
            r"(.*) \.\.\. ([\d,]+) characters left out \.\.\. (.*)", shown, re.DOTALL
        ).groups()
        assert whole.startswith(begins)
        assert whole.endswith(ends)
        assert len(begins) + len(ends) + int(count.replace(",", "")) == len(whole)


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
    figures = preview(DataSettings(path)).to_dict(8, 2)
    columns = figures["columns"]
    # Rows of a batch are of tokens, and nothing says how many without a tokenizer.
    assert figures["unit"] == "characters"
    assert "packed_rows" not in figures
    assert preview(DataSettings(path), tokenizer=tiny_tokenizer()).to_dict(8, 2)["packed_rows"] == 2
    assert [(c["name"], c["rows"], c["used"]) for c in columns] == [
        ("prompt", 2, True), ("completion", 2, True), ("id", 1, False)
    ]  # fmt: skip


def test_of_a_stream_the_ignored_columns_are_told_without_a_count(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"text": "two teas", "id": 1}, {"text": "a latte", "id": 2})
    (remark,) = splits_report(read(DataSettings(path, streaming=True)).splits)
    assert isinstance(remark, Remark)
    assert remark.text == f"{path}: format text ignores the columns id"
