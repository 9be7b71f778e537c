"""Rows with tokens and tags: `slimtune train` makes a tagger of them, `slimtune predict` asks it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForTokenClassification
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.metrics.tagging import entities, tag_scores
from slimtune.models.load import load
from small_encoder import save_encoder
from small_text_model import save_base, write_lines

LEARN = ["--max-steps", 60, "--batch-size", 16, "--lr", 0.01]
FAST = ["--max-steps", 2, "--batch-size", 4, "--lr", 0.01]


def opinions(count: int, seed: int = 0) -> list[dict[str, list[str]]]:
    """Sentences with things and opinions of them; an opinion of two words begins with `very`."""
    draw = torch.Generator().manual_seed(seed)

    def pick(options: list[str]) -> str:
        return options[int(torch.randint(len(options), (1,), generator=draw))]

    rows = []
    for _ in range(count):
        thing, adjective = pick(["film", "plot", "cast"]), pick(["good", "bad", "odd"])
        said = [(pick(["the", "a"]), "O"), (thing, "B-PART"), (pick(["was", "is"]), "O")]
        said += [("very", "B-OPINION"), (adjective, "I-OPINION")] if pick(["", "very"]) else [(adjective, "B-OPINION")]
        words, tags = zip(*said, (".", "O"), strict=True)
        rows.append({"tokens": list(words), "tags": list(tags)})
    return rows


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", *opinions(64))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences that were not learned from."""
    return write_lines(tmp_path_factory.mktemp("fresh") / "rows.jsonl", *opinions(24, seed=7))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_learns_and_answers_with_tags_and_entities(
    run: Any, encoder: Path, rows: Path, fresh: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    trained = run("train", encoder, rows, "-o", out, "--method", method, f"data.held_out={fresh}", "--json", *LEARN)
    assert trained.exit_code == 0, trained.output
    result = json.loads(trained.stdout)
    assert result["task_type"] == "TOKEN_CLS"
    assert result["scores"]["entity_f1"] > 0.9
    assert {"accuracy", "precision", "recall"} < result["scores"].keys()
    asked = run("predict", out, fresh, "--json")
    assert asked.exit_code == 0, asked.output
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    assert [answer["tokens"] for answer in answers] == [row["tokens"] for row in opinions(24, seed=7)]
    assert f"entity F1 {result['scores']['entity_f1']:.3f}" in asked.stderr
    for answer in answers:
        for entity in answer["entities"]:
            assert entity["text"].split() == answer["tokens"][entity["start"] : entity["end"]]
    plain = run("predict", out, fresh).stdout.splitlines()
    assert [line.split() for line in plain] == [answer["tags"] for answer in answers]
    texts = write_lines(tmp_path / "texts.jsonl", {"text": "the plot is very bad ."})
    assert run("predict", out, texts).stdout.split() == ["O", "B-PART", "O", "B-OPINION", "I-OPINION", "O"]


@pytest.fixture(scope="module")
def tagger(encoder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has learned."""
    out = tmp_path_factory.mktemp("tagger") / "out"
    options = ["--max-steps", "10", "--batch-size", "16", "--lr", "0.01"]
    assert CliRunner().invoke(app, ["train", str(encoder), str(rows), "-o", str(out), *options]).exit_code == 0
    return out


def contested(count: int) -> list[dict[str, list[str]]]:
    """Sentences that were not learned from, some with other tags than those that one learns."""
    rows = opinions(count, seed=7)
    for row in rows[::4]:
        row["tags"][1] = "O"
    for row in rows[::5]:
        row["tags"][0] = "B-PART"
    return rows


@pytest.fixture(scope="module")
def disputed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("disputed") / "rows.jsonl", *contested(24))


def test_it_is_evaluated_by_entities_with_a_line_for_each_text(run: Any, tagger: Path, disputed: Path) -> None:
    answers = tagger.parent / "answers.jsonl"
    result = run("evaluate", tagger, disputed, "--answers", answers, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["metric"], found["count"]) == ("entity_f1", 24)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    true = [row["tags"] for row in contested(24)]
    assert [line["expected"] for line in lines] == true
    assert found["scores"] == pytest.approx(tag_scores([line["answer"] for line in lines], true))
    assert 0.5 < found["scores"]["entity_f1"] < 1
    for name, score in found["scores"].items():
        low, high = found["intervals"][name]
        assert low <= score <= high
        assert low < high
    predicted = [json.loads(line)["tags"] for line in run("predict", tagger, disputed, "--json").stdout.splitlines()]
    assert [line["answer"] for line in lines] == predicted
    for line in lines:
        assert bool(line["missed"] or line["wrong"]) == (entities(line["answer"]) != entities(line["expected"]))
        assert line["score"] == sum(map(str.__eq__, line["answer"], line["expected"])) / len(line["expected"])
    words = sum(map(len, true))
    assert found["loss"] == pytest.approx(sum(line["loss"] for line in lines) / words)
    assert found["by_kind"]["PART"]["count"] == sum(tags.count("B-PART") for tags in true)


def test_the_loss_of_a_text_is_that_of_its_true_tags(run: Any, tagger: Path, disputed: Path, tmp_path: Path) -> None:
    run("evaluate", tagger, disputed, "--limit", 1, "--answers", tmp_path / "a.jsonl")
    line = json.loads((tmp_path / "a.jsonl").read_text())
    model, tokenizer = load(tagger)
    batch = tokenizer([" ".join(line["question"])], return_tensors="pt")
    with torch.no_grad():
        log_p_WK = model(**batch).logits[0, 1:-1].log_softmax(-1)
    by_hand = -sum(log_p_WK[word, model.config.label2id[tag]] for word, tag in enumerate(line["expected"]))
    assert line["loss"] == pytest.approx(float(by_hand), rel=1e-4)


def test_what_is_printed_of_a_tagger(run: Any, tagger: Path, disputed: Path) -> None:
    shown = run("evaluate", tagger, disputed, "--limit", 10).stdout
    assert re.search(r"entity_f1 +0\.\d+ +0\.\d+ to [01]\.\d+", shown)
    assert "10 texts in" in shown
    assert "a word" in shown
    assert re.search(r"PART: f1 [01]\.\d+, precision [01]\.\d+, recall [01]\.\d+, 9 there", shown)


def test_a_tagger_and_what_it_cant_be_asked(run: Any, tagger: Path, encoder: Path, fresh: Path, tmp_path: Path) -> None:
    odd = write_lines(tmp_path / "odd.jsonl", {"tokens": ["film"], "tags": ["B-THING"]})
    labelled = write_lines(tmp_path / "labelled.jsonl", {"text": "film", "label": "good"})
    for arguments, said in (
        ((tagger, odd), "tags that"),
        ((tagger, labelled), "pass rows with tokens and tags"),
        ((encoder, fresh), "gives tokens no tags"),
        ((tagger, fresh, "--scorer", "json"), "--scorer would change nothing where words are tagged"),
        ((tagger, fresh, "--shots", 2), "--shots would change nothing"),
    ):
        refused = run("evaluate", *arguments)
        assert refused.exit_code == 2, refused.output
        assert said in refused.stderr


def test_single_words_are_evaluated_by_accuracy(run: Any, encoder: Path, tmp_path: Path) -> None:
    numbered = [{"tokens": row["tokens"], "tags": [int(tag != "O") for tag in row["tags"]]} for row in opinions(16)]
    data = write_lines(tmp_path / "rows.jsonl", *numbered)
    assert run("train", encoder, data, "-o", tmp_path / "out", *FAST).exit_code == 0
    found = json.loads(run("evaluate", tmp_path / "out", data, "--json").stdout)
    assert found["metric"] == "accuracy"
    assert set(found["scores"]) == {"accuracy", "macro_f1"}


def test_the_adapter_brings_its_tags_and_its_head(run: Any, encoder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("train", encoder, rows, "-o", out, *FAST).exit_code == 0
    stored = json.loads((out / "adapter_config.json").read_text())
    assert (stored["task_type"], stored["modules_to_save"]) == ("TOKEN_CLS", ["classifier"])
    ours, tokenizer = load(out)
    assert list(ours.config.id2label.values()) == ["O", "B-OPINION", "I-OPINION", "B-PART"]
    config = AutoConfig.from_pretrained(out)
    theirs = AutoModelForTokenClassification.from_pretrained(encoder, config=config)
    theirs = peft.PeftModel.from_pretrained(theirs, str(out)).eval()
    batch = tokenizer(["the film was good ."], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert "AutoModelForTokenClassification" in card
    assert "slimtune predict" in card


def test_a_decoder_tags_words_of_several_tokens(run: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained = run("train", base, rows, "-o", out, "data.held_out=0.25", "--json", *LEARN)
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["scores"]["entity_f1"] > 0.8


def test_numbers_are_tags_too(run: Any, encoder: Path, tmp_path: Path) -> None:
    numbered = [{"tokens": row["tokens"], "tags": [int(tag != "O") for tag in row["tags"]]} for row in opinions(16)]
    data = write_lines(tmp_path / "rows.jsonl", *numbered)
    trained = run("train", encoder, data, "-o", tmp_path / "out", "data.held_out=0.25", "--json", *FAST)
    assert trained.exit_code == 0, trained.output
    assert set(json.loads(trained.stdout)["scores"]) == {"accuracy", "macro_f1"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"tokens": ["the", "film"], "tags": ["O"]}, "line 2 has 2 tokens and 1 tags"),
        ({"tokens": [], "tags": []}, "line 2: tokens: list should have at least 1 item"),
        ({"tokens": ["the"], "tags": [""]}, "line 2: tag 1 of 1 is empty"),
        ({"tokens": "the film", "tags": ["O"]}, "line 2: tokens"),
    ],
)
def test_a_row_that_is_wrong_is_named(run: Any, encoder: Path, tmp_path: Path, row: Any, complaint: str) -> None:
    data = write_lines(tmp_path / "rows.jsonl", opinions(1)[0], row)
    refused = run("train", encoder, data, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert complaint in refused.stderr


def test_mistakes_say_what_to_do(run: Any, encoder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    odd = write_lines(tmp_path / "odd.jsonl", {"tokens": ["film"], "tags": ["B-THING"]})
    assert (
        "odd.jsonl has tags that rows.jsonl hasn't: B-THING"
        in run("train", encoder, rows, "-o", out, f"data.held_out={odd}").stderr
    )
    alike = write_lines(tmp_path / "alike.jsonl", {"tokens": ["film"], "tags": ["O"]})
    assert "all words have the tag 'O'" in run("train", encoder, alike, "-o", out).stderr
    longer = write_lines(tmp_path / "longer.jsonl", {"tokens": ["film"] * 40, "tags": ["B-PART"] * 40}, *opinions(4))
    refused = run("train", encoder, longer, "-o", out)
    assert "1 of 5 texts are longer than 32 tokens (the longest has 42)" in refused.stderr
    cut = run("train", encoder, longer, "-o", out, "data.too_long=truncate", *FAST)
    assert cut.exit_code == 0, cut.output
    assert "1 text cut" in cut.stdout
    assert "10 words are not learned" in cut.stdout
    untrained = save_base(tmp_path / "text")
    texts = write_lines(tmp_path / "texts.jsonl", {"text": "the film was good ."})
    assert "gives texts no labels" in run("predict", untrained, texts).stderr
