"""Comparisons that earlier versions wrote are read: what is a candidate now was an arm there."""

from __future__ import annotations

import json
from pathlib import Path

from compare.constructed import DORA, LORA, done, failed
from slimtune.compare.record import FACTS, ComparisonRecord, read_record
from slimtune.compare.results import read_result
from slimtune.models.inspect import contents

RECORD = ComparisonRecord(
    model="base", data="rows.jsonl", command="slimtune compare recipe.yaml", date="2026-11-29", recipe="{}",
    candidates=["lora", "dora"], seeds=2, same={}, machine={}, versions={},
)  # fmt: skip


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    for result in (*done(LORA, [0.5]), failed(DORA, 1)):
        path = tmp_path / "result.json"
        result.write(path)
        fields = json.loads(path.read_text())
        fields["arm"] = fields.pop("candidate")
        path.write_text(json.dumps(fields))
        assert read_result(path) == result


def test_a_comparison_of_an_earlier_version(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    fields = json.loads((tmp_path / FACTS).read_text())
    fields["arms"] = fields.pop("candidates")
    (tmp_path / FACTS).write_text(json.dumps(fields))
    assert read_record(tmp_path) == RECORD
    assert contents(str(tmp_path))[0]["candidates"] == ["lora", "dora"]
