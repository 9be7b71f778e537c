"""Rows from files, folders, saved data sets and the Hub: all the same rows, and each complaint with its place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from slimtune.data.reading import SourceRows, drawn, exact_shares, read_rows, read_splits, read_texts
from slimtune.data.rows import Document, Pair
from slimtune.data.settings import DataSettings, Source
from slimtune.data.sources import records
from slimtune.errors import ConfigError, DataError
from small_text_model import write_lines

ROWS = [{"prompt": f"q{n}", "completion": f"ä, {n}\nnext"} for n in range(5)]


def write(folder: Path, kind: str) -> Path:
    """The rows in a file of this kind."""
    path = folder / f"rows.{kind}"
    table = datasets.Dataset.from_list(ROWS)
    if kind in ("jsonl", "ndjson"):
        return write_lines(path, *ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if kind == "tsv" else ",")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    found = list(records(Source(str(path))))
    assert [value for value, _ in found] == ROWS
    assert all(where.startswith(f"{path}, ") for _, where in found)
    assert read_rows(path) == [Pair.model_validate(row) for row in ROWS]


def test_json_may_hold_lines_and_begin_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    assert [value for value, _ in records(Source(str(path)))] == ROWS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("One.\n\nTwo.\n", encoding="utf-8")
    assert read_rows(tmp_path / "book.txt") == [Document(text="One.\n\nTwo.\n")]


def test_a_folder_is_its_files_by_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "train-1.jsonl", *ROWS[:2])
    write_lines(tmp_path / "train-2.jsonl", *ROWS[2:4])
    write_lines(tmp_path / "test.jsonl", ROWS[4])
    (tmp_path / "README.md").write_text("about")
    assert [value for value, _ in records(Source(str(tmp_path)))] == ROWS[:4]
    assert [value for value, _ in records(Source(str(tmp_path), split="test"))] == ROWS[4:]
    parts = read_splits(DataSettings(tmp_path, {"path": str(tmp_path), "split": "test"}))
    assert parts.train[0].name == f"{tmp_path} (train-1.jsonl, train-2.jsonl)"
    assert len(parts.held_out[0].rows) == 1
    with pytest.raises(DataError, match="no split 'dev'; its files are of test, train"):
        list(records(Source(str(tmp_path), split="dev")))


def test_what_datasets_saved(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    table = table.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    assert [value["label"] for value, _ in records(Source(str(tmp_path / "one")))] == ["good", "bad"]
    assert [value["label"] for value, _ in records(Source(str(tmp_path / "two"), split="test"))] == ["bad"]


def test_fields_that_only_other_rows_have_are_not_there(tmp_path: Path) -> None:
    """A table gives each row the columns of all."""
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    table = datasets.Dataset.from_list([{"messages": messages}, {"messages": other}])
    table.to_parquet(tmp_path / "rows.parquet")
    plain, called = read_rows(tmp_path / "rows.parquet")
    assert plain.turns() == messages
    assert called.turns()[1]["tool_calls"] == [call]


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"question": "q", "answer": "a", "prompt": "not this"})
    source = Source(str(path), fields={"prompt": "question", "completion": "answer"})
    (part,) = read_splits(DataSettings(source)).train
    assert part.rows == [Pair(prompt="q", completion="a")]
    with pytest.raises(DataError, match=r"line 1 has no column 'qestion'.*did you mean 'question'"):
        read_splits(DataSettings(Source(str(path), fields={"prompt": "qestion"})))


def test_a_format_of_ones_own_choice(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"text": "a", "label": "b"})
    assert read_splits(DataSettings(path)).task == "classification"
    assert read_splits(DataSettings(path, format="text")).train[0].rows == [Document(text="a")]
    assert read_splits(DataSettings({"path": str(path), "format": "text"})).task == "text"
    assert read_splits(DataSettings(path), task="text").train[0].format == "text"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2 is not JSON"),
        (
            "x.jsonl",
            b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n',
            "line 3 .* needs prompt and completion",
        ),
        ("x.jsonl", b'{"prompt": "a", "completion": "b"}\n\xff\n', "line 2 is not UTF-8"),
        ("x.jsonl", b"", "holds no example"),
        ("x.json", b'[{"prompt": "a", "completion": "b"}, 3]', "item 2 is a int"),
        ("x.json", b"[1, 2", "is not JSON"),
        ("x.json", b"[]", "holds no example"),
        ("x.csv", b"prompt,completion\na,b\nc\n", "line 3 has another number of fields"),
        ("x.csv", b'prompt,completion\na,"b\n', "is not CSV"),
        ("x.parquet", b"PAR1 nothing", "can't be read"),
        ("x.txt", b" \n", "holds no example"),
        ("x.xlsx", b"x", r"ends in .xlsx, but data is read from"),
    ],
)
def test_files_that_can_not_be_read_say_where(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{said}"):
        read_rows(tmp_path / name)


def test_places_that_are_not_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", *ROWS)
    for path, said in {
        tmp_path / "trian.jsonl": "did you mean 'train.jsonl'",
        tmp_path / "none.parquet": "is not there",
        Path("org/data"): "no file or folder org/data, and the Hub can't be reached",
    }.items():
        with pytest.raises(DataError, match=said):
            read_rows(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        read_rows(tmp_path / "empty")
    with pytest.raises(DataError, match="a file has no split"):
        read_splits(DataSettings({"path": str(tmp_path / "train.jsonl"), "split": "test"}))


def test_texts_to_judge_need_no_label(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b", "label": "x"})
    assert [type(row).__name__ for row in read_texts(path)] == ["Unlabelled", "Labelled"]


def test_a_share_of_each_source_is_held_out(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{name}.jsonl", *(r | {"prompt": f"{name}{i}"} for i, r in enumerate(ROWS * 4)))
             for name in "ab"]  # fmt: skip
    parts = read_splits(DataSettings(paths, 0.25), seed=3)
    for name, train, held_out in zip("ab", parts.train, parts.held_out, strict=True):
        prompts = [row.prompt for row in (*train.rows, *held_out.rows)]
        assert (len(train.rows), len(held_out.rows)) == (15, 5)
        assert sorted(prompts) == sorted(f"{name}{i}" for i in range(20))
        line = train.rows[0].prompt.removeprefix(name)
        assert train.places[0].endswith(f"line {int(line) + 1}")
    assert read_splits(DataSettings(paths, 0.25), seed=3) == parts
    assert read_splits(DataSettings(paths, 0.25), seed=4) != parts
    for share, said in ((0.01, "nothing is held out of the 20 examples"), (0.99, "nothing is left to learn from")):
        with pytest.raises(DataError, match=said):
            read_splits(DataSettings(paths, share))


def test_sources_of_different_tasks(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "a.jsonl", {"text": "a", "label": "b"})
    other = write_lines(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r"a\.jsonl is data for task classification; .*b\.jsonl is data for task text"):
        read_splits(DataSettings([one, other]))
    with pytest.raises(ConfigError, match="no task 'txt'"):
        read_splits(DataSettings(one), task="txt")


def parts(*sources: tuple[int, float | None]) -> list[SourceRows]:
    return [SourceRows(f"{number}", "text", list(range(count)), weight=w) for number, (count, w) in enumerate(sources)]


def test_weights_are_exact_shares_of_an_epoch() -> None:
    assert exact_shares(parts((5, None), (7, None))) == [5, 7]
    assert exact_shares(parts((100, 1.0), (50, 1.0))) == [75, 75]
    assert exact_shares(parts((10, 3), (10, 1), (11, 1))) == [19, 6, 6]
    counts: list[Any] = [exact_shares(parts((n, 0.2), (31, 0.5), (7, 0.3))) for n in range(1, 40)]
    assert [sum(shares) for shares in counts] == [n + 38 for n in range(1, 40)]


def test_examples_are_drawn_as_evenly_as_can_be() -> None:
    assert drawn(range(5), 5, 0) == list(range(5))
    assert len(set(drawn(range(9), 4, 0))) == 4
    twice = Counter(drawn(range(5), 13, 0))
    assert sorted(twice.values()) == [2, 2, 3, 3, 3]
    assert drawn(range(50), 20, 0) != drawn(range(50), 20, 1)
