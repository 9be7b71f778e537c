"""Every method from the command line: trained, written, loaded again, shown, merged or refused by the library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimtune.core.config import methods as registered
from slimtune.errors import MergeError
from slimtune.models.load import load
from slimtune.recipe.method import FEATURES, FULL, methods, table
from small_encoder import reviews, save_encoder
from small_text_model import write_lines

KNOWN = methods()
ADAPTERS = sorted(name for name, method in KNOWN.items() if method.is_adapter)
NEEDED = {"trainable-tokens": ["method.token_indices=[5, 6]"], "bitfit": ["method.add_bias=true"]}
"""What a method needs on a model without biases."""
FAST = ["--max-steps", 2, "--batch-size", 4, "--lr", 0.01, "training.warmup=0"]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An encoder without a head, and rows with labels."""
    folder = tmp_path_factory.mktemp("classes")
    return save_encoder(folder / "encoder"), write_lines(folder / "rows.jsonl", *reviews(16))


def test_every_registered_method_has_a_name() -> None:
    assert len(KNOWN) == len(registered()) + 3
    assert {"lora", "dora", "full", "full-adapter", "features", "last-layer"} <= set(KNOWN)
    assert {method.config for method in KNOWN.values() if method.is_adapter} == set(registered().values())


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_trained_written_loaded_and_shown(run: Any, base: Path, data: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    options = NEEDED.get(name, [])
    trained = run("train", base, data, "-o", out, "--method", name, "data.held_out=0.1", *options, *FAST)
    assert trained.exit_code == 0, trained.output
    assert load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(base))
    assert f"| method | {name} |" in (out / "README.md").read_text()
    facts = json.loads(run("info", out, "--json").stdout)
    assert facts["parameters"] > 0
    answered = run("generate", out, "two large lattes", "--max-new-tokens", 3)
    beside = run("generate", base, "two large lattes", "--adapter", out, "--max-new-tokens", 3)
    assert answered.exit_code == 0, answered.output
    assert answered.stdout == beside.stdout
    talked = run("chat", out, "--max-new-tokens", 3, stdin="two large lattes\n")
    assert talked.exit_code == 0, talked.output
    assert "".join(talked.stdout.split()) == "".join(answered.stdout.split())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_merged_or_refused_as_the_library_does(
    run: Any, base: Path, data: Path, tmp_path: Path, name: str
) -> None:
    options = NEEDED.get(name, [])
    trained = run("train", base, data, "-o", tmp_path / "out", "--method", name, *options, *FAST)
    assert trained.exit_code == 0, trained.output
    merged = run("merge", tmp_path / "out", "-o", tmp_path / "merged", "--max-kl", 1e-3)
    model, _ = load(tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    unmerged = model(ids).logits
    if merged.exit_code == 0:
        torch.testing.assert_close(load(tmp_path / "merged")[0](ids).logits, unmerged, rtol=1e-3, atol=1e-3)
        return
    with pytest.raises(MergeError) as refusal:
        model.merge_and_unload()
    assert (merged.exit_code, merged.stderr) == (1, f"slimtune: {refusal.value}\n")
    assert not (tmp_path / "merged").exists()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_trains_a_classifier_or_says_why_not(
    run: Any, classes: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    encoder, rows = classes
    out = tmp_path / "out"
    options = NEEDED.get(name, [])
    trained = run("train", encoder, rows, "-o", out, "--method", name, "data.held_out=0.25", *options, *FAST)
    assert trained.exit_code == 0, trained.output
    names = load_file(out / "adapter_model.safetensors")
    assert any("classifier" in tensor for tensor in names), "the new head is saved with the adapter"
    first = run("predict", out, rows, "--json")
    assert first.exit_code == 0, first.output
    moved = shutil.move(out, tmp_path / "moved")
    assert run("predict", moved, rows, "--json").stdout == first.stdout
    model, _ = load(moved)
    assert model.config.id2label == {0: "bad", 1: "good"}


def test_the_methods_are_listed_with_their_fields(run: Any) -> None:
    listed = json.loads(run("methods", "--json").stdout)
    assert [method["name"] for method in listed] == sorted(KNOWN)
    assert all(method["summary"].endswith((".", ")")) or method["summary"] for method in listed)
    shown = run("methods").stdout
    assert all(name in shown for name in KNOWN)
    one = json.loads(run("methods", "lora", "--json").stdout)
    assert one["fields"]["r"] == 8
    assert one["fields"]["init_lora_weights"] is True
    assert not {"peft_type", "task_type", "inference_mode"} & set(one["fields"])
    assert "use_dora" not in json.loads(run("methods", "dora", "--json").stdout)["fields"]
    for part in ("learning rate: 0.0002", "lora_alpha", "8"):
        assert part in run("methods", "lora").stdout


@pytest.mark.parametrize("name", [name for name in sorted(KNOWN) if name != FEATURES])
def test_the_learning_rate_is_the_methods_own(run: Any, base: Path, data: Path, tmp_path: Path, name: str) -> None:
    method = KNOWN[name]
    assert method.config.learning_rate > 0
    if name not in ("lora", "ia3", FULL):
        return
    result = run("train", base, data, "-o", tmp_path / "out", "--method", name, "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert f"| learning_rate | {method.config.learning_rate} |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (["--method", "lora", "method.r=3", "method.lora_dropout=1e-1"], {"r": 3, "lora_dropout": 0.1}),
        (["--method", "lora", "method.target_modules=[q_proj, v_proj]"], {"target_modules": ["q_proj", "v_proj"]}),
        (["--method", "lora", "method.rank_pattern={q_proj: 2}"], {"rank_pattern": {"q_proj": 2}}),
        (["--method", "lora", "method.use_rslora=true"], {"use_rslora": True}),
        (["--method", "dora", "--rank", 2], {"use_dora": True, "r": 2, "lora_alpha": 4}),
        (["--method", "vera", "--rank", 8, "method.layers_to_transform=[1]"], {"r": 8, "layers_to_transform": [1]}),
        (["--method", "ia3", "method.target_modules=[k_proj]"], {"target_modules": ["k_proj"]}),
        (["--method", "prompt-tuning", "method.num_virtual_tokens=3"], {"num_virtual_tokens": 3}),
    ],
)  # fmt: skip
def test_options_and_assignments_reach_the_adapter_and_the_card(
    run: Any, base: Path, data: Path, tmp_path: Path, options: list[Any], fields: dict[str, Any]
) -> None:
    result = run("train", base, data, "-o", tmp_path / "out", *options, *FAST)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    found = {name: sorted(config[name]) if isinstance(config[name], list) else config[name] for name in fields}
    assert found == fields
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {name} |" in card for name in fields)


def test_a_prompt_that_begins_as_a_text_reads_the_bases_tokenizer(
    run: Any, base: Path, data: Path, tmp_path: Path
) -> None:
    text = ["method.prompt_tuning_init=TEXT", "method.prompt_tuning_init_text='Turn it into JSON: now'"]
    options = ["--method", "prompt-tuning", *text, "method.num_virtual_tokens=4"]
    result = run("train", base, data, "-o", tmp_path / "out", *options, *FAST)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["prompt_tuning_init_text"] == "Turn it into JSON: now"
    assert config["tokenizer_name_or_path"] == str(base)


def test_a_table_shows_what_is_not_as_it_comes() -> None:
    lora, dora = KNOWN["lora"], KNOWN["dora"]
    assert table(lora, lora.config()) == {"method": "lora"}
    assert table(dora, dora.config(r=4, use_dora=True)) == {"method": "dora", "use_dora": True, "r": 4}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "ia3", "--rank", 4], ["--rank", "--method ia3"]),
        (["--method", "bitfit", "training.lora_plus_ratio=4"], ["training.lora_plus_ratio", "bitfit"]),
        (["--method", "full", "method.r=4"], ["method.r", "full"]),
        (["--method", "prompt-tuning", "method.target_modules=[q_proj]"], ["method.target_modules", "prompt-tuning"]),
        (["--method", "prefixtuning"], ["did you mean 'prefix-tuning'?"]),
        (["method.lora_alfa=3"], ["lora_alfa", "did you mean 'lora_alpha'?"]),
        (["--method", "bitfit", "method.zzz=3"], ["zzz", "its fields are", "target_modules"]),
        (["method.r=many"], ["method.r takes a whole number", '"many"']),
        (["method.r=2.5"], ["method.r takes a whole number", "2.5"]),
        (["method.use_rslora=perhaps"], ["use_rslora takes true or false"]),
        (["method.r"], ["section.key=value"]),
        (["method.=3"], ["section.key=value"]),
        (["method.r=3", "--rank", 4], ["'r' is set twice"]),
        (["method.r=3", "method.r=4"], ["'r' is set twice"]),
        (["method.peft_type=IA3"], ["peft_type"]),
        (["--method", "dora", "method.use_dora=false"], ["use_dora"]),
        (["--method", "features"], ["rows with text and label"]),
        (["--method", "features", "--epochs", 2], ["--epochs", "--method features"]),
        (["--method", "features", "method.pooling=max"], ["pooling", "mean"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_does_not_belong_to_the_method_is_refused(
    run: Any, base: Path, data: Path, tmp_path: Path, options: list[Any], said: list[str]
) -> None:
    result = run("train", base, data, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    for part in said:
        assert part in result.stderr
    assert not (tmp_path / "out").exists()


def test_methods_that_files_of_peft_know_are_told_from_the_others() -> None:
    import peft

    theirs = {str(kind.value) for kind in peft.PeftType}
    assert {kind for kind, config in registered().items() if config.in_peft} == theirs & set(registered())
