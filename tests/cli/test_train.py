"""`slimtune train`: what it learns, writes and shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune import PeftModel
from slimtune.data.encode import encode
from slimtune.data.reading import read_rows
from small_text_model import save_base, tiny_tokenizer, write_lines

FAST = ["--max-steps", 5, "--batch-size", 4, "--rank", 4]


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_every_file_is_there(tuned: Path) -> None:
    written = {path.name for path in tuned.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "loss.jsonl"} <= written
    assert not [name for name in written if name.endswith((".bin", ".pt", ".pkl"))]
    curve = losses(tuned)
    assert [entry["step"] for entry in curve] == list(range(1, 31))
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    assert (tuned / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_says_how_the_adapter_was_made_and_how_to_load_it(tuned: Path, base: Path) -> None:
    card = (tuned / "README.md").read_text()
    for said in (
        str(base),
        "| r | 4 |",
        "| learning_rate | 0.03 |",
        "from slimtune import PeftModel",
        "from peft import",
    ):
        assert said in card


def test_the_tokenizer_is_stored_with_its_template(tuned: Path, base: Path) -> None:
    assert AutoTokenizer.from_pretrained(tuned).chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_peft_reads_what_was_trained(tuned: Path, base: Path) -> None:
    import peft

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)
        untuned = plain(ids).logits
        ours = PeftModel.from_pretrained(plain, tuned)(ids).logits
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tuned))(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, untuned, atol=1e-2)


def test_it_shows_what_is_trained_and_what_is_learned(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    result = run("train", base, data, "-o", tmp_path / "out", *FAST)
    assert "q_proj        2 of 2" in result.stdout
    assert "24 examples" in result.stdout
    assert "tokens/s" in result.stdout
    shown = " ".join(result.stdout.split())
    assert '[[{"name"' in shown
    assert "<|im_end|>]]" in shown


def test_json_is_all_that_goes_to_standard_output(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    result = run("train", base, data, "-o", tmp_path / "out", *FAST, "--json")
    outcome = json.loads(result.stdout)
    assert outcome["steps"] == 5
    assert outcome["final_loss"] == losses(tmp_path / "out")[-1]["loss"]
    assert "24 examples" in result.stderr


def test_the_same_seed_gives_the_same_adapter(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        run("train", base, data, "-o", tmp_path / name, *FAST, "--seed", seed)
        return load_file(tmp_path / name / "adapter_model.safetensors")

    first, second, other = weights("first", 1), weights("second", 1), weights("other", 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_accumulated_batches_are_one_batch(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    """The mean over all learned tokens of the step, not the mean of the batches' means."""
    options = ["--max-steps", 3, "--rank", 4, "--learning-rate", 0.01]
    run("train", base, data, "-o", tmp_path / "whole", *options, "--batch-size", 8)
    run("train", base, data, "-o", tmp_path / "parts", *options, "--batch-size", 2, "training.gradient_accumulation=4")
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-4)
    assert losses(tmp_path / "whole")[0]["loss"] == pytest.approx(losses(tmp_path / "parts")[0]["loss"], rel=1e-4)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["method.target_modules=[q_proj,v_proj]", "--alpha", 3],
            {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 3},
        ),
        ([r"method.target_modules=.*layers\.1.*\.up_proj"], {"target_modules": r".*layers\.1.*\.up_proj"}),
        (
            ["method.use_rslora=true", "method.lora_dropout=0.1"],
            {"use_rslora": True, "lora_dropout": 0.1, "lora_alpha": 8},
        ),
        (["method.layers_to_transform=[1]", "method.target_modules=[q_proj]"], {"layers_to_transform": [1]}),
        (["method.exclude_modules=[down_proj]"], {"exclude_modules": ["down_proj"]}),
        (["method.rank_pattern.q_proj=2", "method.alpha_pattern.q_proj=5"], {"rank_pattern": {"q_proj": 2}}),
        (["method.modules_to_save=[lm_head]", "method.init_lora_weights=gaussian"], {"modules_to_save": ["lm_head"]}),
    ],
)
def test_the_options_of_lora_reach_the_adapter(
    run: Any, base: Path, data: Path, tmp_path: Path, options: list[Any], expected: dict[str, Any]
) -> None:
    result = run("train", base, data, "-o", tmp_path / "out", *FAST, *options)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for name, value in expected.items():
        found = sorted(config[name]) if isinstance(config[name], list) else config[name]
        assert found == value


def test_lora_plus_learns_b_faster(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    def size_of_b(name: str, *options: Any) -> float:
        run("train", base, data, "-o", tmp_path / name, *FAST, *options)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        return sum(tensor.norm().item() for key, tensor in tensors.items() if "lora_B" in key)

    assert size_of_b("plus", "training.lora_plus_ratio=8") > 4 * size_of_b("plain")


def test_gradient_checkpointing_changes_nothing(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    run("train", base, data, "-o", tmp_path / "plain", *FAST)
    run("train", base, data, "-o", tmp_path / "checkpointed", *FAST, "training.gradient_checkpointing=true")
    plain, checkpointed = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "checkpointed")
    )
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-4, atol=1e-5)


def test_full_tuning_writes_a_plain_model(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    result = run(
        "train", base, data, "-o", tmp_path / "full", "--method", "full", "--max-steps", 6, "--lr", 1e-2,
        "model.dtype=float32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "full"))
    changed = [name for name, p in before.named_parameters() if not torch.equal(p, after.get_parameter(name))]
    assert len(changed) == len(list(before.named_parameters()))
    assert losses(tmp_path / "full")[-1]["loss"] < losses(tmp_path / "full")[0]["loss"]
    assert not (tmp_path / "full" / "adapter_config.json").exists()


def test_held_out_examples_are_evaluated_and_not_learned(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    result = run("train", base, data, "-o", tmp_path / "out", "--epochs", 2, "data.held_out=0.25")
    assert "18 examples" in result.stdout
    assert "6 examples held out" in result.stdout
    assert len([entry for entry in losses(tmp_path / "out") if "eval_loss" in entry]) == 2
    assert "loss on held-out examples" in (tmp_path / "out" / "README.md").read_text()


def test_prompts_and_completions_work_with_and_without_a_template(run: Any, base: Path, tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", *({"prompt": f"say {n}", "completion": f" {n}!"} for n in range(8)))
    plain = save_base(tmp_path / "plain", chat_template=None)
    for model, name in ((base, "chat"), (plain, "text")):
        result = run("train", model, pairs, "-o", tmp_path / name, *FAST)
        assert result.exit_code == 0, result.output
        assert ("<|im_start|>assistant" in result.stdout) == (name == "chat")
        assert "<|im_end|>]]" in " ".join(result.stdout.split())


def test_long_examples_are_the_users_choice(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    lengths = sorted(len(e.input_ids) for e in encode(read_rows(data), tiny_tokenizer(), 10_000).examples)
    options = [*FAST, "--max-length", lengths[12] - 1]
    refused = run("train", base, data, "-o", tmp_path / "refused", *options)
    assert refused.exit_code == 2
    assert "of 24 examples are longer than" in refused.stderr
    assert f"--max-length {lengths[-1]}" in refused.stderr
    assert not (tmp_path / "refused").exists()
    dropped = run("train", base, data, "-o", tmp_path / "dropped", *options, "data.too_long=drop")
    assert "examples dropped" in dropped.stdout
    cut = run("train", base, data, "-o", tmp_path / "cut", *options, "data.too_long=truncate")
    assert "examples cut" in cut.stdout
    assert cut.exit_code == dropped.exit_code == 0


def test_a_loss_that_is_not_a_number_keeps_the_last_good_state(
    run: Any, base: Path, data: Path, tmp_path: Path
) -> None:
    result = run("train", base, data, "-o", tmp_path / "out", *FAST, "--lr", 1e30, "training.warmup=0")
    assert result.exit_code == 2
    assert "in step" in result.stderr
    assert "learning rate" in result.stderr
    assert not (tmp_path / "out").exists()
    kept = [path for path in tmp_path.iterdir() if "until-step" in path.name]
    if kept:
        tensors = load_file(kept[0] / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_overwriting_replaces_its_own_files_alone(run: Any, base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run("train", base, data, "-o", output, *FAST)
    before = (output / "adapter_model.safetensors").read_bytes()
    (output / "notes.txt").write_text("mine")
    result = run("train", base, data, "-o", output, *FAST, "--seed", 5, "--overwrite")
    assert result.exit_code == 0, result.output
    assert (output / "adapter_model.safetensors").read_bytes() != before
    assert (output / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
