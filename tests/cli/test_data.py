"""`slimtune data preview`: the format, examples with what is learned, and lengths as training has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimtune.data.encode import encode
from slimtune.data.reading import read_rows
from small_text_model import tiny_tokenizer, write_lines


def test_what_is_shown_is_what_training_sees(run: Any, base: Path, data: Path) -> None:
    prepared = encode(read_rows(data), tiny_tokenizer(), 1024)
    found = json.loads(run("data", "preview", data, "--model", base, "--examples", 2, "--json").stdout)
    assert (found["task"], found["unit"]) == ("text", "tokens")
    source = {"name": str(data), "format": "messages", "fields": {}, "rows": 24, "examples_of_an_epoch": 24}
    assert found["sources"] == [source]
    assert (found["examples"], found["total"], found["learned"]) == (24, prepared.tokens, prepared.learned)
    assert found["longest"] == prepared.longest == found["histogram"][-1]["up_to"]
    assert sum(bar["examples"] for bar in found["histogram"]) == 24
    first = json.loads(data.read_text().splitlines()[0])["messages"]
    (answer,) = [piece["text"] for piece in found["samples"][0] if piece["learned"]]
    assert answer == f"{first[-1]['content']}<|im_end|>"
    assert len(found["samples"]) == 2


def test_lengths_padding_and_packing_are_told(run: Any, base: Path, data: Path) -> None:
    shown = run("data", "preview", data, "--model", base, "--max-length", 100, "--packing", "--examples", 1).stdout
    for said in ("format messages, 24 rows", "task text: 24 examples", "[[{", "tokens of an example", "99% have"):
        assert said in shown
    assert "padding: " in shown
    assert "packed: " in shown
    assert (
        "examples are longer than 60 tokens" in run("data", "preview", data, "--model", base, "--max-length", 60).stdout
    )


def test_without_a_model_rows_are_shown_as_they_are_read(run: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1 1", "output": "2"}, {"instruction": "Greet.", "output": "Hi"}]
    shown = run("data", "preview", write_lines(tmp_path / "a.jsonl", *rows)).stdout
    assert "format alpaca, 2 rows" in shown
    assert "completion: [[2]]" in shown
    assert "characters of an example" in shown
    assert "padding" not in shown


def test_every_kind_of_row_can_be_seen(run: Any, tmp_path: Path) -> None:
    kinds: dict[str, tuple[dict[str, Any], str]] = {
        "classification": ({"text": "good", "label": "yes"}, "label: [[yes]]"),
        "dpo": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen: [[a]]\nrejected: b"),
        "kto": ({"prompt": "q", "completion": "a", "label": True}, "completion: [[a]]\nlabel: [[True]]"),
        "token-classification": ({"tokens": ["a", "b"], "tags": ["O", "X"]}, "a/[[O]] b/[[X]]"),
        "text": ({"text": "all of it"}, "[[all of it]]"),
    }
    for task, (row, said) in kinds.items():
        shown = run("data", "preview", write_lines(tmp_path / f"{task}.jsonl", row)).stdout
        assert f"task {task}: 1 example\n" in shown or f"task {task}: 1 example," in shown
        assert said in shown
    prompts = run("data", "preview", write_lines(tmp_path / "p.jsonl", {"prompt": "q", "answer": 1}), "--task", "grpo")
    assert "format prompt-only" in prompts.stdout


def test_texts_with_labels_are_counted(run: Any, base: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "x.jsonl", *({"text": "a b", "label": label} for label in "xxy"))
    assert "labels: x 2, y 1" in run("data", "preview", rows, "--model", base).stdout
    found = json.loads(run("data", "preview", rows, "--model", base, "--json").stdout)
    assert found["labels"] == {"x": 2, "y": 1}


def test_rows_of_every_task_are_measured_in_tokens(run: Any, base: Path, tmp_path: Path) -> None:
    """What counts is what has to fit at once; the tokenizer is the one of the base."""
    tokenizer = tiny_tokenizer()

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    pair = {"prompt": "two teas", "chosen": "a large latte, please", "rejected": "no"}
    rows = {
        "dpo": (pair, count(asked(tokenizer, pair["chosen"])), "chosen"),
        "seq2seq": ({"prompt": "one tea and two lattes", "completion": "no"}, None, "completion"),
        "token-classification": ({"tokens": ["two", "teas"], "tags": ["N", "O"]}, count("two teas"), "N"),
        "grpo": ({"prompt": "two teas"}, count(asked(tokenizer)), "two teas"),
    }
    for task, (row, expected, said) in rows.items():
        path = write_lines(tmp_path / f"{task}.jsonl", row, row)
        found = json.loads(run("data", "preview", path, "--model", base, "--task", task, "--json").stdout)
        assert (found["task"], found["unit"], found["examples"]) == (task, "tokens", 2)
        assert expected is None or found["longest"] == expected
        assert found["learned"] <= found["total"]
        assert said in json.dumps(found["samples"][0])


def asked(tokenizer: Any, answer: str | None = None) -> str:
    turns = [{"role": "user", "content": "two teas"}]
    turns += [{"role": "assistant", "content": answer}] if answer else []
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)


def test_mistakes(run: Any, base: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "x.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    for options, said in {
        ("--format", "shargpt"): "did you mean 'sharegpt'?",
        ("--task", "txt"): "did you mean 'text'?",
        ("--packing",): "pass --model",
        ("--model", base, "--packing"): "packing is for models that write text, and not for task dpo",
        ("--task", "text"): "needs prompt and completion",
    }.items():
        result = run("data", "preview", rows, *options)
        assert result.exit_code == 2
        assert said in result.stderr
    missing = run("data", "preview", "some/where")
    assert "the Hub can't be reached" in missing.stderr
