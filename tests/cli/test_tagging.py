"""Rows with tokens and tags: `slimtune train` makes a tagger of them, `slimtune predict` asks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForTokenClassification

from slimtune.loading import load
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
    trained = run("train", encoder, rows, "-o", out, "--method", method, "--eval-data", fresh, "--json", *LEARN)
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
    trained = run("train", base, rows, "-o", out, "--eval-fraction", 0.25, "--json", *LEARN)
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["scores"]["entity_f1"] > 0.8


def test_numbers_are_tags_too(run: Any, encoder: Path, tmp_path: Path) -> None:
    numbered = [{"tokens": row["tokens"], "tags": [int(tag != "O") for tag in row["tags"]]} for row in opinions(16)]
    data = write_lines(tmp_path / "rows.jsonl", *numbered)
    trained = run("train", encoder, data, "-o", tmp_path / "out", "--eval-fraction", 0.25, "--json", *FAST)
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
        in run("train", encoder, rows, "-o", out, "--eval-data", odd).stderr
    )
    alike = write_lines(tmp_path / "alike.jsonl", {"tokens": ["film"], "tags": ["O"]})
    assert "all words have the tag 'O'" in run("train", encoder, alike, "-o", out).stderr
    longer = write_lines(tmp_path / "longer.jsonl", {"tokens": ["film"] * 40, "tags": ["B-PART"] * 40}, *opinions(4))
    refused = run("train", encoder, longer, "-o", out)
    assert "1 of 5 texts are longer than 32 tokens (the longest has 42)" in refused.stderr
    cut = run("train", encoder, longer, "-o", out, "--too-long", "truncate", *FAST)
    assert cut.exit_code == 0, cut.output
    assert "1 texts cut" in cut.stdout
    assert "10 words are not learned" in cut.stdout
    untrained = save_base(tmp_path / "text")
    texts = write_lines(tmp_path / "texts.jsonl", {"text": "the film was good ."})
    assert "gives texts no labels" in run("predict", untrained, texts).stderr
