"""What can be wrong with a quantized base: each mistake is told in one sentence, before anything is computed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import slimtune
from slimtune import LoraConfig, Quantization, get_peft_model
from slimtune.errors import ConfigError, DamagedBaseError
from small_text_model import save_base

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz")

WEIGHT = "model.layers.1.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def stored(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base as folders that hold it quantized."""
    folders = {}
    for kind in ("nf4", "int8"):
        folders[kind] = tmp_path_factory.mktemp("quantized") / kind
        slimtune.load(base, quantize=kind)[0].save_pretrained(folders[kind])
    return folders


class TestAsked:
    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: "nf5", "did you mean 'nf4'"),
            (lambda: 4, "found 4"),
            (lambda: Quantization("nf4", blocksize=48), "blocksize must be one of 32, 64"),
            (lambda: Quantization("nf4", compute_dtype="bf16"), "compute_dtype must be one of"),
            (lambda: Quantization("nf4", keep="o_proj"), "keep must be a list"),
            (lambda: Quantization("int8", blocksize=128), "would change nothing with int8"),
            (lambda: Quantization("nf4", keep=["o_prj"]), "did you mean 'o_proj'"),
            (BitsAndBytesConfig, "asks for nothing"),
            (lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True), "llm_int8_has_fp16_weight"),
        ],
    )
    def test_what_can_not_be_is_told(self, make: Callable[[], Any], said: str, base: Path) -> None:
        with pytest.raises(ConfigError, match=said):
            slimtune.load(base, quantize=make())

    def test_a_model_without_linear_layers(self, tmp_path: Path) -> None:
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2
        )
        transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="no linear layer to quantize beside classifier"):
            slimtune.load(tmp_path, quantize="nf4")

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_a_model_that_is_quantized_already(self, kind: str, stored: dict[str, Path]) -> None:
        with pytest.raises(ConfigError, match="is quantized already"):
            slimtune.load(stored[kind], quantize="nf4")

    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
    def test_a_library_that_is_missing_is_named_with_what_installs_it(
        self, missing: str, base: Path, stored: dict[str, Path]
    ) -> None:
        code = (
            f"import sys; sys.modules['{missing}'] = None\n"
            "import slimtune\n"
            "for options in ({'quantize': 'nf4'}, {}):\n"
            "    try:\n"
            "        slimtune.load(sys.argv[1 if options else 2], **options)\n"
            "    except slimtune.errors.MissingDependencyError as error:\n"
            "        print(error)\n"
        )
        command = [sys.executable, "-W", "ignore", "-c", code, base, stored["nf4"]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        sentence = f"a quantized base needs {missing}: run `pip install 'slimtune[quantized]'`"
        assert done.stdout.splitlines() == [sentence, sentence]


def without(name: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        del tensors[name]

    return damage


def shorter(name: str, count: int = 1) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:-count].clone()

    return damage


def saying(**changes: Any) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return damage


DAMAGES: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "no scales": ("nf4", without(f"{WEIGHT}.absmax"), "absmax is missing"),
    "no table": ("nf4", without(f"{WEIGHT}.quant_map"), "quant_map is missing"),
    "no scales of scales": ("nf4", without(f"{WEIGHT}.nested_absmax"), "nested_absmax is missing"),
    "no state": ("nf4", without(STATE), "is missing"),
    "half a state": ("nf4", shorter(STATE, 20), "can't be read"),
    "too few scales": ("nf4", shorter(f"{WEIGHT}.absmax"), "127 scales"),
    "too few scales of scales": ("nf4", shorter(f"{WEIGHT}.nested_absmax"), "0 scales of scales"),
    "too few codes": ("nf4", shorter(WEIGHT), "4,095 codes"),
    "another shape": ("nf4", saying(shape=[64, 64]), "64"),
    "another block size": ("nf4", saying(blocksize=32), "128 scales"),
    "no block size": ("nf4", saying(blocksize=0), "block size"),
    "too few int8 scales": ("int8", shorter("model.layers.1.mlp.up_proj.SCB"), "127 scales"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_the_name_of_the_weight(name: str, stored: dict[str, Path], tmp_path: Path) -> None:
    kind, damage, said = DAMAGES[name]
    tensors = load_file(stored[kind] / "model.safetensors")
    damage(tensors)
    (tmp_path / "config.json").write_bytes((stored[kind] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedBaseError, match=said) as told:
        slimtune.load(tmp_path)
    assert WEIGHT in str(told.value)
    assert "\n" not in str(told.value)


def test_damage_that_transformers_lets_through_is_refused_when_an_adapter_comes(
    stored: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(stored["nf4"] / "model.safetensors")
    shorter(f"{WEIGHT}.absmax")(tensors)
    (tmp_path / "config.json").write_bytes((stored["nf4"] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(DamagedBaseError, match="127 scales"):
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
