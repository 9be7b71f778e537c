"""`slimtune merge` on a quantized base: into the plain model that the codes stand for, or into codes again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from slimtune import PeftModel
from slimtune.bases import claim
from slimtune.models.load import load

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz")


def logits(model: Any) -> torch.Tensor:
    claim(model)
    with torch.no_grad():
        return model.eval()(torch.arange(3, 60)[None]).logits


@pytest.fixture(scope="module")
def in_nf4(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a folder that transformers and bitsandbytes wrote in 4 bits."""
    folder = tmp_path_factory.mktemp("quantized")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)
    return folder


def test_a_quantized_folder_gives_a_plain_model(run: Any, in_nf4: Path, tuned: Path, tmp_path: Path) -> None:
    result = run("merge", tuned, "--base", in_nf4, "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "a plain model" in result.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    unmerged = PeftModel.from_pretrained(load(str(in_nf4))[0], tuned)
    torch.testing.assert_close(logits(merged), logits(unmerged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_base_is_quantized_as_it_was_in_training(
    kind: str, run: Any, base: Path, tuned: Path, tmp_path: Path
) -> None:
    result = run("merge", tuned, "--quantize", kind, "--output", tmp_path / "merged", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["merged"]["kl"] < 1e-6
    assert report["requantized"] is None
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    unmerged = PeftModel.from_pretrained(load(str(base), quantize=kind)[0], tuned)
    torch.testing.assert_close(logits(merged), logits(unmerged), rtol=1e-4, atol=1e-4)
    # The original base has other weights, and so has what is merged into it.
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tuned)
    assert not torch.allclose(logits(merged), logits(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_into_codes_again(kind: str, run: Any, tuned: Path, tmp_path: Path) -> None:
    options = ["--quantize", kind, "--requantize", "--max-kl", 5, "--output", tmp_path / "merged"]
    result = run("merge", tuned, *options, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert 0.5 < report["requantized"]["survived"] < 1.5
    assert report["requantized"]["outputs"]["kl"] > 0
    assert report["reloaded"] == report["merged"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")
    assert again.is_quantized
    told = run("merge", tuned, *options, "--overwrite")
    assert f"{report['requantized']['survived']:.1%} of the update is left" in told.stdout
    assert "entries were beyond the old scales, which were computed anew" in told.stdout
    assert "a quantized model" in told.stdout
    plain = tmp_path / "plain"
    assert run("merge", tuned, "--quantize", kind, "--output", plain).exit_code == 0
    in_floats = AutoModelForCausalLM.from_pretrained(plain)
    relative = (logits(again) - logits(in_floats)).norm() / logits(in_floats).norm()
    assert float(relative) == pytest.approx(report["merged"]["relative"], rel=1)


def test_a_quantized_folder_stays_one_when_asked(run: Any, in_nf4: Path, tuned: Path, tmp_path: Path) -> None:
    options = ["--requantize", "--max-kl", 5, "--output", tmp_path / "merged"]
    result = run("merge", tuned, "--base", in_nf4, *options)
    assert result.exit_code == 0, result.output
    again, _ = load(str(tmp_path / "merged"))
    before, _ = load(str(in_nf4))
    assert again.config.to_dict()["quantization_config"] == before.config.to_dict()["quantization_config"]
    assert sorted(again.state_dict()) == sorted(before.state_dict())


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W8A8"])
def test_a_folder_of_whole_numbers_stays_one_when_asked(
    scheme: str, run: Any, base: Path, tuned: Path, tmp_path: Path
) -> None:
    quantized = tmp_path / "quantized"
    result = run("quantize", base, "--scheme", scheme, "--method", "rtn", "--output", quantized)
    assert result.exit_code == 0, result.output
    told, plain = (json.loads(run("info", folder, "--json").stdout) for folder in (quantized, base))
    assert scheme in told["quantized"]
    assert told["parameters"] == plain["parameters"]
    options = ["--requantize", "--max-kl", 5, "--output", tmp_path / "merged", "--json"]
    result = run("merge", tuned, "--base", quantized, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    # What was written has the answers of what was merged, in codes of the same kind.
    assert report["reloaded"] == report["merged"]
    again, before = load(str(tmp_path / "merged"))[0], load(str(quantized))[0]
    assert [type(module) for module in again.modules()] == [type(module) for module in before.modules()]
    assert again.config.quantization_config == before.config.quantization_config
    unmerged = PeftModel.from_pretrained(before, tuned)
    relative = (logits(again) - logits(unmerged)).norm() / logits(unmerged).norm()
    assert float(relative) == pytest.approx(report["merged"]["relative"], rel=1)


def test_a_drift_beyond_the_bound_is_refused(run: Any, tuned: Path, tmp_path: Path) -> None:
    options = ["--quantize", "nf4", "--requantize", "--max-kl", 0, "--output", tmp_path / "merged"]
    result = run("merge", tuned, *options)
    assert result.exit_code == 1, result.output
    assert "merge into 16 bits, without --requantize; for a model in few bits" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_mistakes(run: Any, base: Path, in_nf4: Path, tuned: Path, tmp_path: Path) -> None:
    for options, words in (
        (["--requantize"], ["isn't quantized", "--quantize nf4"]),
        (["--quantize", "nf5"], ["nf5", "did you mean 'nf4'?"]),
        (["--base", in_nf4, "--quantize", "nf4"], ["is quantized already"]),
    ):
        result = run("merge", tuned, *options, "--output", tmp_path / "merged")
        assert result.exit_code == 2, result.output
        assert all(word in result.stderr for word in words), result.stderr
    assert list(tmp_path.iterdir()) == []
