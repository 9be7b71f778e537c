"""`slimtune merge`: the merged folder answers as base and adapter did, and the report says how nearly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune import PeftModel
from slimtune.adapters.merge import Drift
from slimtune.models.export import MergeReport


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits


def test_the_merged_folder_is_a_plain_model_that_answers_alike(
    run: Any, base: Path, tuned: Path, tmp_path: Path
) -> None:
    result = run("merge", tuned, "--output", tmp_path / "merged", "--json")
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tuned)
    torch.testing.assert_close(logits(merged), logits(unmerged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
    assert "lora" not in "".join(merged.state_dict())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    report = json.loads(result.stdout)
    assert report["base"] == str(base)
    assert report["adapter"]["kl"] > 100 * report["merged"]["kl"]
    assert report["reloaded"]["top1_agreement"] == 1


def test_a_drift_beyond_the_bound_is_refused_with_1_and_nothing_is_written(
    run: Any, tuned: Path, tmp_path: Path
) -> None:
    result = run("merge", tuned, "--output", tmp_path / "merged", "--max-kl", 0, "--dtype", "bfloat16")
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("slimtune: the merged model strays")
    assert "--max-kl" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_changes_nothing_is_told(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    from slimtune import LoraConfig, get_peft_model

    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig()).save_pretrained(tmp_path / "idle")
    result = run("merge", tmp_path / "idle", "--base", base, "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "the adapter changes nothing" in result.stdout


def test_tied_embeddings_survive_a_merge_into_the_head(run: Any, data: Path, tmp_path: Path) -> None:
    """The head was trained: reloaded as tied, it would be the embedding again."""
    from small_text_model import save_base

    tied = save_base(tmp_path / "tied", tie_word_embeddings=True)
    options = ["method.target_modules=[lm_head]", "--max-steps", 4, "--lr", 0.05]
    trained = run("train", tied, data, "-o", tmp_path / "out", *options)
    assert trained.exit_code == 0, trained.output
    merged = run("merge", tmp_path / "out", "-o", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(reloaded), logits(unmerged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scale", "verdict"),
    [(1.0, "keeps the tuning"), (0.0, "changes nothing"), (2e-3, "hardly more than rounding does")],
)
def test_one_sentence_says_how_much_of_the_tuning_is_kept(
    run: Any, tuned: Path, tmp_path: Path, scale: float, verdict: str
) -> None:
    weaker = tmp_path / "weaker"
    shutil.copytree(tuned, weaker)
    file = weaker / "adapter_model.safetensors"
    tensors = {name: tensor * (scale if "lora_B" in name else 1) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    result = run("merge", weaker, "--output", tmp_path / "merged", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert verdict in " ".join(result.stdout.split())


def test_the_verdict_follows_the_share_of_the_change_beyond_rounding() -> None:
    def report(change: float, lost: float, rounding: float) -> MergeReport:
        adapter, merged, noise = (Drift(1.0, 1.0, 1.0, kl, 1.0) for kl in (change, lost, rounding))
        return MergeReport(adapter, merged, merged, noise)

    assert report(1.0, 0.011, 0.01).lost == pytest.approx(0.001 / 0.99)
    assert "keeps the tuning" in report(1.0, 0.05, 0.01).verdict
    assert "blurs the tuning: 30%" in report(1.0, 0.3, 0.0).verdict
    assert "--dtype float32" in report(1.0, 0.3, 0.0).verdict
    assert "loses most of" in report(2.5e-3, 2.2e-3, 1e-4).verdict
    assert report(2.5e-3, 1e-3, 1e-3).lost == 0
    assert "hardly more than rounding" in report(1.5e-3, 1e-3, 1e-3).verdict
    assert not report(1.5e-3, 1e-3, 1e-3).is_kept
