"""Rows with labels: `slimtune train` makes a classifier of them, `slimtune predict` asks it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from slimtune.metrics.classification import scores
from slimtune.models.load import load
from slimtune.storage.source import base_of
from small_encoder import reviews, save_encoder
from small_text_model import save_base, write_lines

LEARN = ["--max-steps", 40, "--batch-size", 16, "--lr"]
FAST = ["--max-steps", 2, "--lr", 0.01, "--batch-size", 4]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", *reviews(64))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences that were not learned from."""
    return write_lines(tmp_path_factory.mktemp("fresh") / "rows.jsonl", *reviews(40, seed=5))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("method", "how"),
    [("lora", [*LEARN, 0.008]), ("ia3", [*LEARN, 0.03]), ("full", [*LEARN, 0.008]), ("features", [])],
)
def test_it_learns_and_answers_with_the_names_of_the_labels(
    run: Any, encoder: Path, rows: Path, fresh: Path, tmp_path: Path, method: str, how: list[Any]
) -> None:
    out = tmp_path / "out"
    trained = run("train", encoder, rows, "-o", out, "--method", method, f"data.held_out={fresh}", "--json", *how)
    assert trained.exit_code == 0, trained.output
    reached = json.loads(trained.stdout)["scores"]
    assert reached["accuracy"] > 0.8
    asked = run("predict", out, fresh, "--json")
    assert asked.exit_code == 0, asked.output
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    true = [row["label"] for row in reviews(40, seed=5)]
    assert [answer["text"] for answer in answers] == [row["text"] for row in reviews(40, seed=5)]
    assert scores([answer["label"] for answer in answers], true) == pytest.approx(reached)
    assert all(0.5 <= answer["p"] <= 1 for answer in answers)
    assert f"accuracy {reached['accuracy']:.3f}, macro F1 {reached['macro_f1']:.3f}" in asked.stderr
    assert run("predict", out, fresh).stdout.split() == [answer["label"] for answer in answers]


def test_the_adapter_brings_its_labels_and_its_head(run: Any, encoder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("train", encoder, rows, "-o", out, *FAST).exit_code == 0
    stored = json.loads((out / "adapter_config.json").read_text())
    assert (stored["task_type"], stored["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    ours, tokenizer = load(out)
    assert ours.config.id2label == {0: "bad", 1: "good"}
    # As the card says: with peft, on the labels of the adapter's own config.
    import peft

    config = AutoConfig.from_pretrained(out)
    theirs = AutoModelForSequenceClassification.from_pretrained(encoder, config=config)
    theirs = peft.PeftModel.from_pretrained(theirs, str(out)).eval()
    batch = tokenizer(["the film was good .", "bad ."], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "| labels | bad, good |" in card


def test_a_full_tuning_is_a_plain_classifier(run: Any, encoder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("train", encoder, rows, "-o", out, "--method", "full", *FAST, "model.dtype=float32").exit_code == 0
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert not (out / "adapter_config.json").exists()
    assert not torch.equal(model.bert.pooler.dense.weight, load(encoder)[0].pooler.dense.weight)


def test_an_adapter_is_merged_into_a_plain_classifier(
    run: Any, encoder: Path, rows: Path, fresh: Path, tmp_path: Path
) -> None:
    assert run("train", encoder, rows, "-o", tmp_path / "out", *FAST).exit_code == 0
    merged = run("merge", tmp_path / "out", "-o", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    before, after = (run("predict", tmp_path / name, fresh, "--json") for name in ("out", "merged"))
    for one, other in zip(before.stdout.splitlines(), after.stdout.splitlines(), strict=True):
        assert json.loads(one)["p"] == pytest.approx(json.loads(other)["p"], abs=1e-4)


def test_a_decoder_is_read_at_its_last_token(run: Any, rows: Path, fresh: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", pad_token_id=None)
    trained = run("train", base, rows, "-o", tmp_path / "out", f"data.held_out={fresh}", *LEARN, 0.01, "--json")
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["scores"]["accuracy"] > 0.8
    alone = write_lines(tmp_path / "one.jsonl", reviews(1, seed=5)[0])
    together = json.loads(run("predict", tmp_path / "out", fresh, "--json").stdout.splitlines()[0])
    assert json.loads(run("predict", tmp_path / "out", alone, "--json").stdout)["p"] == pytest.approx(
        together["p"], abs=1e-5
    )


def test_csv_says_the_same_as_jsonl(run: Any, encoder: Path, rows: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["label", "text"])
        writer.writeheader()
        writer.writerows(reviews(64))
    for name, source in (("a", rows), ("b", table)):
        result = run("train", encoder, source, "-o", tmp_path / name, *FAST)
        assert result.exit_code == 0, result.output
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pairs_of_texts_are_told_apart_by_the_model(run: Any, encoder: Path, tmp_path: Path) -> None:
    pairs = [{"text": row["text"], "text_pair": "the plot .", "label": row["label"]} for row in reviews(32)]
    data = write_lines(tmp_path / "pairs.jsonl", *pairs)
    result = run("train", encoder, data, "-o", tmp_path / "out", *FAST)
    assert result.exit_code == 0, result.output
    model, tokenizer = load(tmp_path / "out")
    batch = tokenizer(pairs[0]["text"], pairs[0]["text_pair"], return_tensors="pt")
    assert batch["token_type_ids"].any()
    with torch.no_grad():
        expected = model(**batch).logits.softmax(-1).max().item()
    answered = json.loads(run("predict", tmp_path / "out", data, "--json").stdout.splitlines()[0])
    assert answered["text_pair"] == "the plot ."
    assert answered["p"] == pytest.approx(expected, abs=1e-5)


def test_accumulated_batches_are_one_batch(run: Any, encoder: Path, rows: Path, tmp_path: Path) -> None:
    """The mean over all texts of the step, whatever the model's own loss would make of it."""
    options = ["--method", "last-layer", "--max-steps", 3, "--lr", 0.01]
    run("train", encoder, rows, "-o", tmp_path / "whole", *options, "--batch-size", 8)
    parts = ["--batch-size", 2, "training.gradient_accumulation=4"]
    run("train", encoder, rows, "-o", tmp_path / "parts", *options, *parts)
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5)
    first, second = (
        json.loads((tmp_path / name / "loss.jsonl").read_text().splitlines()[0])["loss"] for name in ("whole", "parts")
    )
    assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize(("predicted", "true"), [("aabbc", "abbbc"), ("aaaa", "bbbb"), ("abc", "abc"), ("aab", "aaa")])
def test_scores_are_those_of_scikit_learn(predicted: str, true: str) -> None:
    found = scores(list(predicted), list(true))
    expected = f1_score(list(true), list(predicted), average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(float(expected))
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in zip(predicted, true, strict=True)) / len(true))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", '{"text": "a", "label": "b"}\n{"text": "c"}\n', ["line 2", "label"]),
        ("x.jsonl", '{"text": "a", "label": "b"}\n{"text": "c", "label": "b"}\n', ["'b'", "nothing to tell apart"]),
        ("x.jsonl", '{"txt": "a", "label": "b"}\n', ["line 1", "text"]),
        ("x.jsonl", '{"text": 3, "label": "b"}\n', ["line 1", "text"]),
        ("x.jsonl", '{"text": "a", "label": null}\n', ["line 1", "label"]),
        ("x.jsonl", '{"text": "a", "label": 0.5}\n', ["line 1", "label"]),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "a", "text_pair": "b", "label": 2}\n', ["text_pair"]),
        ("x.csv", "text,label\ngood,1\nbad\n", ["line 3", "quotation marks"]),
        ("x.csv", "text,label\ngood, or not,1\n", ["line 2", "quotation marks"]),
        ("x.csv", "text,lable\ngood,1\n", ["line 2", "label"]),
        ("x.csv", "text,label\n", ["no example"]),
        ("x.csv", "", ["no example"]),
    ],
)
def test_rows_that_no_classifier_can_learn_from(
    run: Any, encoder: Path, tmp_path: Path, name: str, content: str, said: list[str]
) -> None:
    (tmp_path / name).write_text(content)
    result = run("train", encoder, tmp_path / name, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    for part in said:
        assert part in result.stderr


def test_long_texts_are_the_users_choice(run: Any, encoder: Path, rows: Path, tmp_path: Path) -> None:
    long = {"text": "the film " * 30, "label": "odd"}
    data = write_lines(tmp_path / "rows.jsonl", *reviews(20), *[long] * 2)
    refused = run("train", encoder, data, "-o", tmp_path / "a", *FAST)
    assert refused.exit_code == 2
    # The model has 32 positions, whatever --max-length would allow.
    assert "2 of 22 texts are longer than 32 tokens (the longest has 62)" in refused.stderr
    dropped = run("train", encoder, data, "-o", tmp_path / "b", "data.too_long=drop", *FAST)
    assert "2 texts dropped" in dropped.stdout
    cut = run("train", encoder, data, "-o", tmp_path / "c", "data.too_long=truncate", *FAST)
    assert "2 texts cut at 32 tokens" in cut.stdout
    assert "longer than 32 tokens" in run("predict", tmp_path / "c", data).stderr
    assert run("predict", tmp_path / "c", data, "--truncate").exit_code == 0


def test_labels_that_only_the_held_out_rows_have(run: Any, encoder: Path, rows: Path, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.jsonl", {"text": "odd", "label": "odd"})
    result = run("train", encoder, rows, "-o", tmp_path / "out", f"data.held_out={other}")
    assert result.exit_code == 2
    assert "labels that" in result.stderr


def test_labels_in_the_order_of_their_numbers(run: Any, encoder: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "stars.jsonl", *({"text": "good", "label": n} for n in (10, 9, 2, -1)))
    assert run("train", encoder, data, "-o", tmp_path / "out", *FAST).exit_code == 0
    assert list(load(tmp_path / "out")[0].config.id2label.values()) == ["-1", "2", "9", "10"]


def test_predict_wants_a_classifier(run: Any, tuned: Path, encoder: Path, rows: Path) -> None:
    for source in (tuned, encoder):
        result = run("predict", source, rows)
        assert result.exit_code == 2
        assert "gives texts no labels" in result.stderr


def test_the_packaged_encoder_is_tuned(run: Any, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", *reviews(8))
    result = run("train", "minilm-l6-v2", data, "-o", tmp_path / "out", "--method", "ia3", *FAST)
    assert result.exit_code == 0, result.output
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (Path(named) / "model.safetensors").is_file()
    assert base_of(tmp_path / "out") == "minilm-l6-v2"
    assert run("predict", tmp_path / "out", data).exit_code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("films") == ["films"]
