"""Prompts and completions for a model with an encoder: `slimtune train` with task=seq2seq, `slimtune generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from slimtune.data.batches import token_loss
from slimtune.data.rows import Pair
from slimtune.data.tasks.seq2seq import encode_pair
from small_seq2seq import bart, save_seq2seq, seq2seq_tokenizer, translations
from small_text_model import write_lines

LEARN = ["--max-steps", 240, "--lr", 0.01, "--batch-size", 12, "method.target_modules=all-linear"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", *translations())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_it_learns_to_write_the_completions(run: Any, kind: str, rows: Path, tmp_path: Path) -> None:
    base, out = save_seq2seq(tmp_path / "base", kind), tmp_path / "out"
    trained = run("train", base, rows, "task=seq2seq", "-o", out, *LEARN)
    assert trained.exit_code == 0, trained.output
    assert "slimtune generate" in trained.stdout
    assert "planned: " in trained.stdout
    stored = json.loads((out / "adapter_config.json").read_text())
    assert stored["task_type"] == "SEQ_2_SEQ_LM"
    asked = run("generate", out, "-i", rows, "--max-new-tokens", 6)
    assert asked.exit_code == 0, asked.output
    assert asked.stdout.splitlines() == [row["completion"] for row in translations()]
    assert run("generate", base, translations()[0]["prompt"], "--adapter", out).stdout.strip() == "gross rot"


def test_the_held_out_pairs_are_judged_by_their_loss(run: Any, rows: Path, tmp_path: Path) -> None:
    base = save_seq2seq(tmp_path / "base", "bart")
    options = ["data.held_out=0.25", "--max-steps", 6, "--lr", 0.02, "--json"]
    trained = run("train", base, rows, "task=seq2seq", "-o", tmp_path / "out", *options)
    assert trained.exit_code == 0, trained.output
    losses = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    held_out = [line["eval_loss"] for line in losses if "eval_loss" in line]
    assert held_out[-1] < held_out[0]
    assert json.loads(trained.stdout)["eval_loss"] == held_out[-1]


def test_all_weights_learn_too(run: Any, rows: Path, tmp_path: Path) -> None:
    base, out = save_seq2seq(tmp_path / "base", "bart"), tmp_path / "out"
    options = ["--method", "full", "--max-steps", 60, "--lr", 0.005, "--batch-size", 6]
    trained = run("train", base, rows, "-o", out, *options, "task=seq2seq")
    assert trained.exit_code == 0, trained.output
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    batch = tokenizer(["small blue"], return_tensors="pt")
    with torch.no_grad():
        said = tokenizer.decode(model.generate(**batch, max_new_tokens=6)[0], skip_special_tokens=True)
    assert said == "klein blau"


def test_the_loss_is_the_models_own_whatever_the_batches() -> None:
    from transformers import DataCollatorForSeq2Seq

    model, tokenizer = bart(), seq2seq_tokenizer(starts=True)
    encoded = [vars(encode_pair(Pair(**row), tokenizer)) for row in translations()[:4]]
    encoded[0]["labels"] = encoded[0]["labels"][:2]
    assert encoded[1]["labels"][-1] == tokenizer.eos_token_id
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    with torch.no_grad():
        whole = model(**collate(encoded))
        expected = whole.loss
        assert token_loss(whole, collate(encoded)["labels"]) == pytest.approx(expected)
        count = sum(len(row["labels"]) for row in encoded)
        halves = [collate(encoded[:1]), collate(encoded[1:])]
        apart = sum(token_loss(model(**half), half["labels"], count) for half in halves)
    assert float(apart) == pytest.approx(float(expected), rel=1e-5)


def test_mistakes_say_what_to_do(run: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    without_encoder = run("train", base, rows, "-o", out, "task=seq2seq")
    assert without_encoder.exit_code == 2
    assert "has no encoder" in without_encoder.stderr
    t5 = save_seq2seq(tmp_path / "t5", "t5")
    as_text = run("train", t5, rows, "-o", out)
    assert as_text.exit_code == 2
    assert "task=seq2seq" in as_text.stderr
    packed = run("train", t5, rows, "-o", out, "task=seq2seq", "data.packing=true")
    assert "packing is for models that write text" in packed.stderr
    empty = write_lines(tmp_path / "empty.jsonl", {"prompt": "big red", "completion": ""})
    assert "completion: it is empty" in run("train", t5, empty, "-o", out, "task=seq2seq").stderr
    turns = {"prompt": [{"role": "user", "content": "red"}], "completion": [{"role": "assistant", "content": "rot"}]}
    spoken = write_lines(tmp_path / "spoken.jsonl", turns)
    assert "an encoder reads one text" in run("train", t5, spoken, "-o", out, "task=seq2seq").stderr
    assert not out.exists()


def test_long_pairs_are_cut_with_their_end_kept(run: Any, tmp_path: Path) -> None:
    base = save_seq2seq(tmp_path / "base", "t5")
    rows = write_lines(tmp_path / "rows.jsonl", {"prompt": "red " * 30, "completion": "rot"}, *translations()[:3])
    limit = ["task=seq2seq", "--max-length", 8, "--max-steps", 1]
    refused = run("train", base, rows, "-o", tmp_path / "a", *limit)
    assert "1 of 4 pairs are longer than 8 tokens (the longest has 31)" in refused.stderr
    dropped = run("train", base, rows, "-o", tmp_path / "b", *limit, "data.too_long=drop")
    assert "1 pair dropped" in dropped.stdout
    cut = run("train", base, rows, "-o", tmp_path / "c", *limit, "data.too_long=truncate")
    assert "1 pair cut" in cut.stdout
    pair = encode_pair(Pair(prompt="red " * 30, completion="rot"), seq2seq_tokenizer(starts=False)).cut(8)
    assert (len(pair.input_ids), pair.input_ids[-1]) == (8, 1)
