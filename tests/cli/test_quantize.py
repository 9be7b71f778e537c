"""`--quantize` on the command line: what is loaded in fewer bits, what is said of it, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import slimtune
from small_encoder import save_encoder
from small_text_model import write_lines

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz")

OPTIONS = ("--max-steps", 5, "--rank", 4, "--learning-rate", 0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The base as a folder that holds it in NF4."""
    target = tmp_path_factory.mktemp("quantized") / "nf4"
    model, tokenizer = slimtune.load(base, quantize="nf4")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_train_says_what_the_base_is_stored_as(kind: str, run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    result = run("train", base, data, "--output", output, "--quantize", kind, "--json", *OPTIONS)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["parts"][kind]["modules"] == {"linear layer": 14}
    assert f"14 linear layers in {kind}" in result.stderr
    assert f"float32 on {kind}" in result.stderr
    assert f"slimtune chat {output} --quantize {kind}" in result.stderr
    card = (output / "README.md").read_text()
    assert f"14 linear layers in {kind}" in card
    assert f'slimtune.load("path/to/this/folder", quantize="{kind}")' in card
    assert ("load_in_8bit=True" if kind == "int8" else f'bnb_4bit_quant_type="{kind}"') in card


def test_a_plain_base_is_told_too(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    result = run("train", base, data, "--output", tmp_path / "tuned", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert "1 embedding, 15 linear layers, 5 norms" in result.stdout
    assert "quantiz" not in (tmp_path / "tuned" / "README.md").read_text()


def test_what_answers_is_the_quantized_base(run: Any, base: Path, tuned: Path, folder: Path) -> None:
    question = ("two large lattes for ana", "--max-new-tokens", 12)
    quantized = run("generate", tuned, *question, "--quantize", "nf4")
    assert quantized.exit_code == 0, quantized.output
    stored = run("generate", folder, *question, "--adapter", tuned)
    assert stored.exit_code == 0, stored.output
    assert quantized.stdout == stored.stdout
    chat = run("chat", tuned, "--quantize", "nf4", "--max-new-tokens", 12, stdin="two large lattes for ana\n")
    assert chat.exit_code == 0, chat.output
    assert quantized.stdout.strip() in chat.stdout


def test_classifiers_are_trained_and_asked(run: Any, tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    rows = [
        {"text": f"the {noun} was {label} .", "label": label} for noun in ("film", "plot") for label in ("good", "bad")
    ]
    data = write_lines(tmp_path / "data.jsonl", *rows * 4)
    output = tmp_path / "judge"
    result = run("train", encoder, data, "--output", output, "--quantize", "nf4", "--max-steps", 3)
    assert result.exit_code == 0, result.output
    assert f"slimtune predict {output} texts.jsonl --quantize nf4" in result.stdout
    answered = run("predict", output, data, "--quantize", "nf4", "--json")
    assert answered.exit_code == 0, answered.output
    assert {json.loads(line)["label"] for line in answered.stdout.splitlines()} <= {"good", "bad"}


def test_features_are_those_of_the_base_as_it_is(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoder = save_encoder(tmp_path / "encoder")
    rows = [{"text": f"the film was {label} .", "label": label} for label in ("good", "bad")]
    data = write_lines(tmp_path / "data.jsonl", *rows * 4)
    options = ("--output", tmp_path / "judge", "--method", "features")
    refused = run("train", encoder, data, *options, "--quantize", "nf4")
    assert refused.exit_code == 2
    assert "leave --quantize out" in refused.stderr
    assert run("train", encoder, data, *options).exit_code == 0
    refused = run("predict", tmp_path / "judge", data, "--quantize", "nf4")
    assert refused.exit_code == 2
    assert "features of the base as it is" in refused.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--quantize", "nf5"), "did you mean 'nf4'"),
        (("--quantize", "nf4", "--method", "full"), "codes can't be trained"),
    ],
)
def test_mistakes_cost_no_loading(options: tuple[str, ...], said: str, run: Any, data: Path, tmp_path: Path) -> None:
    result = run("train", tmp_path / "no-such-model", data, "--output", tmp_path / "tuned", *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_quantized_folder_is_not_quantized_again(run: Any, folder: Path) -> None:
    result = run("generate", folder, "hello", "--quantize", "nf4")
    assert result.exit_code == 2
    assert "is quantized already" in result.stderr


def test_info_names_the_quantization_of_a_folder(run: Any, folder: Path, base: Path) -> None:
    assert json.loads(run("info", folder, "--json").stdout)["quantized"] == "bitsandbytes, nf4, double"
    assert "quantized" not in json.loads(run("info", base, "--json").stdout)


@pytest.mark.parametrize(("capability", "is_told"), [("avx2", True), ("avx512", False)])
def test_doctor_says_where_4_bits_are_slower(capability: str, is_told: bool) -> None:
    import torch

    if not is_told and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this cpu has no AVX512")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-W", "ignore", "-m", "slimtune", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("slower than on one with AVX512" in done.stdout) is is_told
    assert "bitsandbytes" in done.stdout
