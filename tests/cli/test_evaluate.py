"""`slimtune evaluate`: a base, an adapter and a merged model on a file of questions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from slimtune.evaluate.generation import generate_batch
from slimtune.evaluate.tasks import prompt, read_task
from slimtune.loading import load_text_model
from small_text_model import orders, write_lines

SHORT = ["--max-new-tokens", 12]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six orders."""
    return write_lines(tmp_path_factory.mktemp("task") / "task.jsonl", *({"messages": e.messages()} for e in orders(6)))


def asked(run: Any, *arguments: Any) -> dict[str, Any]:
    result = run("evaluate", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_loss_and_answers(run: Any, base: Path, task: Path, tmp_path: Path) -> None:
    found = asked(run, base, task, "--answers", tmp_path / "a.jsonl", *SHORT)
    assert (found["metric"], found["count"], found["max_new_tokens"]) == ("json_match", 6, 12)
    assert set(found["scores"]) == set(found["intervals"]) == {"json_match", "json_valid", "exact_match"}
    rows = lines(tmp_path / "a.jsonl")
    assert [row["question"] for row in rows] == [example.question() for example in orders(6)]
    assert [row["expected"] for row in rows] == [example.order.to_json() for example in orders(6)]
    model, tokenizer = load_text_model(str(base))
    prompts = [prompt(tokenizer, question) for question in read_task(task).questions]
    assert [row["answer"] for row in rows] == generate_batch(model, tokenizer, prompts, 12)
    # A mean of the batches' means would be another number: the answers differ in length.
    per_token = sum(row["loss"] for row in rows) / sum(row["tokens"] for row in rows)
    assert found["loss"] == pytest.approx(per_token)
    assert found["perplexity"] == pytest.approx(math.exp(per_token))
    assert found["unfinished"] == sum(not row["ended"] for row in rows) > 0


def test_what_the_model_would_say_is_right(run: Any, base: Path, task: Path, tmp_path: Path) -> None:
    asked(run, base, task, "--answers", tmp_path / "a.jsonl", *SHORT)
    said = [
        {"messages": [*r["question"], {"role": "assistant", "content": r["answer"]}]}
        for r in lines(tmp_path / "a.jsonl")
    ]
    said[0]["messages"][-1]["content"] += "not this"
    found = asked(run, base, write_lines(tmp_path / "said.jsonl", *said), "--scorer", "exact_match", *SHORT)
    assert found["scores"] == {"exact_match": pytest.approx(5 / 6)}
    low, high = found["intervals"]["exact_match"]
    assert 0.3 < low < 5 / 6 < high < 1
