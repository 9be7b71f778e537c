"""`slimtune info` and `slimtune doctor`: facts that other programs can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slimtune.models.compatibility import Verdict, verdicts
from slimtune.models.headers import StoredTensor


def test_an_adapter(run: Any, tuned: Path, base: Path) -> None:
    found = json.loads(run("info", tuned, "--json").stdout)
    assert found["method"] == "LoRA"
    assert (found["rank"], found["alpha"], found["base"]) == (4, 8, str(base))
    assert found["targets"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    # Each layer: A is 4 x in and B is out x 4, for seven matrices.
    outs_and_ins = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    assert found["parameters"] == 2 * sum(4 * (rows + columns) for rows, columns in outs_and_ins)
    assert found["tensors"] == 28
    assert found["dtypes"] == {"F32": 28}
    assert found["bytes"] == (tuned / "adapter_model.safetensors").stat().st_size
    assert {engine["engine"]: engine["takes"] for engine in found["engines"]} == {
        "peft": True,
        "vLLM": True,
        "llama.cpp": True,
    }
    shown = run("info", tuned).stdout
    for part in ("LoRA", str(base), "q_proj", "takes it"):
        assert part in shown


def test_a_model(run: Any, base: Path) -> None:
    found = json.loads(run("info", base, "--json").stdout)
    assert (found["kind"], found["architecture"]) == ("model", "LlamaForCausalLM")
    assert found["num_hidden_layers"] == 2
    assert found["engines"] == []


def plain(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "init_lora_weights": True} | changes


@pytest.mark.parametrize(
    ("config", "takes", "said"),
    [
        (plain(), {"peft", "vLLM", "llama.cpp"}, {}),
        (plain(r=64), {"peft", "vLLM", "llama.cpp"}, {"vLLM": "--max-lora-rank 64"}),
        (plain(r=20), {"peft", "vLLM", "llama.cpp"}, {"vLLM": "--max-lora-rank 32"}),
        (plain(rank_pattern={"q_proj": 40}), {"peft", "vLLM", "llama.cpp"}, {"vLLM": "--max-lora-rank 64"}),
        (plain(r=4096), {"peft", "llama.cpp"}, {"vLLM": "rank 4096"}),
        (plain(use_rslora=True), {"peft", "vLLM", "llama.cpp"}, {}),
        (plain(alpha_pattern={"q_proj": 3}), {"peft", "vLLM", "llama.cpp"}, {}),
        (plain(trainable_token_indices=[3]), {"peft"}, {"vLLM": "trained tokens", "llama.cpp": "trained tokens"}),
        (plain(use_dora=True), {"peft"}, {"vLLM": "DoRA", "llama.cpp": "DoRA"}),
        (plain(modules_to_save=["embed_tokens"]), {"peft", "llama.cpp"}, {"vLLM": "embed_tokens"}),
        (plain(modules_to_save=["score"]), {"peft", "vLLM", "llama.cpp"}, {}),
        (plain(bias="all"), {"peft", "llama.cpp"}, {"vLLM": "bias"}),
        (plain(init_lora_weights="pissa"), {"peft"}, {"vLLM": "pissa"}),
        (plain(init_lora_weights="gaussian"), {"peft", "vLLM", "llama.cpp"}, {}),
        ({"peft_type": "IA3"}, {"peft"}, {"vLLM": "IA3"}),
    ],
)
def test_which_engines_take_it(config: dict[str, Any], takes: set[str], said: dict[str, str]) -> None:
    found: dict[str, Verdict] = {verdict.engine: verdict for verdict in verdicts(config, [])}
    assert {engine for engine, verdict in found.items() if verdict.takes} == takes
    for engine, part in said.items():
        assert part in found[engine].note


def test_the_flag_is_only_named_where_it_is_needed() -> None:
    assert all("--max-lora-rank" not in verdict.note for verdict in verdicts(plain(r=16), []))


def test_llama_cpp_stops_at_a_tensor_that_is_no_lora() -> None:
    head = StoredTensor("base_model.model.lm_head.weight", "F32", (10, 10))
    found = {verdict.engine: verdict for verdict in verdicts(plain(), [head])}
    assert not found["llama.cpp"].takes
    assert head.name in found["llama.cpp"].note


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("layers.0.q_proj.lora_magnitude_vector", (10,), "DoRA is refused"),
        ("embed_tokens.token_adapter.trainable_tokens_delta", (2, 10), "trained tokens are refused"),
        ("layers.0.q_proj.lora_B.bias", (10,), "tensors beside A and B"),
        ("layers.0.q_proj.base_layer.bias", (10,), "tensors beside A and B"),
        ("lm_head.weight", (10, 10), "tensors beside A and B"),
        ("layers.0.q_proj.lora_A.weight", (600, 10), "rank 600 is above its largest"),
    ],
)
def test_vllm_refuses_what_the_config_does_not_say(name: str, shape: tuple[int, ...], why: str) -> None:
    tensor = StoredTensor(f"base_model.model.{name}", "F32", shape)
    verdict = next(v for v in verdicts(plain(), [tensor]) if v.engine == "vLLM")
    assert not verdict.takes
    assert why in verdict.note


def test_vllm_takes_a_classifiers_head() -> None:
    head = StoredTensor("base_model.model.score.weight", "F32", (2, 10))
    assert next(v for v in verdicts(plain(), [head]) if v.engine == "vLLM").takes


def test_a_pipe_gets_whole_commands(run: Any, tuned: Path) -> None:
    shown = run("info", tuned).stdout
    assert "vllm serve BASE --enable-lora --lora-modules NAME=FOLDER" in shown
    assert "slimtune export FOLDER --to gguf-lora --output DIR" in shown


def test_info_loads_no_torch(tuned: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from slimtune.cli import app\n"
        f"app(['info', {str(tuned)!r}, '--json'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_doctor_tells_what_is_installed(run: Any) -> None:
    import torch

    found = json.loads(run("doctor", "--json").stdout)
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"][0]["name"] == "cpu"
    assert found["memory"]["ram_total_bytes"] > found["memory"]["ram_free_bytes"] > 0
    assert found["conflicts"] == []


def test_doctor_names_what_is_missing_and_what_does_not_fit(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packaged distribution that is too old, put in front of the real one on the path."""
    old = tmp_path / "typer-0.1.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: typer\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("doctor")
    assert result.exit_code == 1
    assert "typer 0.1.0" in result.stdout
    assert "pip install 'typer" in result.stdout
    shutil.rmtree(old)
