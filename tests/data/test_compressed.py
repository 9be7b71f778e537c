"""Packed files give the rows that they hold; one that is damaged, or a bomb, is refused in a sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from slimtune.data.preview import preview
from slimtune.data.reading import read_rows
from slimtune.data.settings import DataSettings, Source
from slimtune.data.sources import ANY_BYTES, records
from slimtune.errors import DataError

ROWS = [{"prompt": f"q{n}", "completion": f"ä, {n}"} for n in range(2000)]
TEXTS = {
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "json": json.dumps(ROWS),
    "csv": "prompt,completion\n" + "".join(f'{row["prompt"]},"{row["completion"]}"\n' for row in ROWS),
    "tsv": "prompt\tcompletion\n" + "".join(f"{row['prompt']}\t{row['completion']}\n" for row in ROWS),
}


def packed(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()))
    return path


@pytest.mark.parametrize("kind", TEXTS)
def test_packed_rows_are_those_that_were_packed(kind: str, tmp_path: Path) -> None:
    path = packed(tmp_path / f"rows.{kind}.gz", TEXTS[kind])
    found = list(records(Source(str(path))))
    assert [value for value, _ in found] == ROWS
    assert all(where.startswith(f"{path}, ") for _, where in found)
    assert preview(DataSettings(path)).lengths.examples == 2000


def test_a_folder_of_packed_files_is_one_source(tmp_path: Path) -> None:
    packed(tmp_path / "train-1.jsonl.gz", TEXTS["jsonl"])
    packed(tmp_path / "test-1.jsonl.gz", '{"text": "held out"}\n')
    assert len(read_rows(tmp_path)) == 2000


def test_a_packed_text_is_one_document(tmp_path: Path) -> None:
    assert read_rows(packed(tmp_path / "book.txt.gz", "One.\n\nTwo."))[0].text == "One.\n\nTwo."


def test_a_bomb_is_refused_before_it_goes_off(tmp_path: Path) -> None:
    """Without a line break, so that its one line would fill the memory."""
    path = tmp_path / "rows.jsonl.gz"
    member = gzip.compress(b" " * 2**24)
    path.write_bytes(member * (ANY_BYTES // 2**24 + 2))
    assert path.stat().st_size * 500 < ANY_BYTES
    with pytest.raises(DataError, match="unpacks to more than 256 MB") as caught:
        list(records(Source(str(path))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl.gz", gzip.compress(TEXTS["jsonl"].encode(), mtime=0)[:-900], "can't be unpacked"),
        ("rows.jsonl.gz", TEXTS["jsonl"].encode(), "can't be unpacked"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "q"\n', mtime=0), "line 1 is not JSON"),
        ("rows.parquet.gz", gzip.compress(b"PAR1", mtime=0), "unpack it with gunzip"),
        ("rows.tar.gz", gzip.compress(b"rows", mtime=0), "ends in .tar.gz"),
    ],
)
def test_what_can_not_be_read_says_why(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        list(records(Source(str(path))))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
