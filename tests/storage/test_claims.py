"""What a file of somebody else's may claim: no more than it holds, nothing outside of its folder, no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import slimtune
from slimtune.errors import BaseMismatchError, ConfigError, ModelNotFoundError, SlimtuneError
from slimtune.evaluate.tuned import Tuned
from slimtune.storage.source import resolve
from small_text_model import save_base, tiny_model

HUGE = 10**13
SIZES: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (slimtune.LoraConfig(r=2), {"r": HUGE}),
    "AdaLoRA": (slimtune.AdaLoraConfig(init_r=3, target_r=2, total_step=10), {"init_r": HUGE}),
    "VeRA": (slimtune.VeraConfig(r=4), {"r": HUGE}),
    "LoHa": (slimtune.LoHaConfig(r=2), {"r": HUGE}),
    "bottleneck": (slimtune.BottleneckConfig(bottleneck_size=2), {"bottleneck_size": HUGE}),
    "bottleneck, relative": (slimtune.BottleneckConfig(), {"reduction_factor": 1e-12}),
    "prompt": (slimtune.PromptTuningConfig(num_virtual_tokens=2), {"num_transformer_submodules": HUGE}),
    "prompt, a part": (slimtune.PromptTuningConfig(num_virtual_tokens=2), {"num_transformer_submodules": 1e-9}),
    "P-tuning": (slimtune.PromptEncoderConfig(num_virtual_tokens=2), {"num_transformer_submodules": HUGE}),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_config_that_asks_for_more_than_is_stored(case: str, tmp_path: Path) -> None:
    config, claim = SIZES[case]
    config.task_type = "CAUSAL_LM"
    slimtune.get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | claim))
    with pytest.raises((BaseMismatchError, ConfigError)) as caught:
        slimtune.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", "model.bin"])
def test_an_index_that_names_files_elsewhere(tmp_path: Path, name: str) -> None:
    model, other = save_base(tmp_path / "model"), save_base(tmp_path / "other")
    assert (other / "model.safetensors").is_file()
    weights = {"weight_map": {"lm_head.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(ModelNotFoundError, match="out of its folder"):
        slimtune.load(model)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": 7}', '{"weight_map": {"a": ["b"]}}', "{", '{"a":' * 90_000])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    model = save_base(tmp_path / "model")
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelNotFoundError, match="can't be read"):
        resolve(str(model))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_beside_or_in_place_of_safetensors_is_not_read(tmp_path: Path) -> None:
    model = save_base(tmp_path / "model")
    torch.save(Payload(tmp_path / "ran"), model / "pytorch_model.bin")
    slimtune.load(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="unpickling can run any code"):
        slimtune.load(model)
    assert not (tmp_path / "ran").exists()


def test_the_base_that_an_adapter_names_is_read_from_safetensors_alone(tmp_path: Path) -> None:
    base = save_base(tmp_path / "model")
    model, _ = slimtune.load(base)
    slimtune.get_peft_model(model, slimtune.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "mine")
    assert slimtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mine").active_adapter == "default"
    (base / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.ones(2)}, base / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        slimtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mine")


def test_code_in_a_model_folder_is_not_run_unless_asked(tmp_path: Path) -> None:
    model = save_base(tmp_path / "model")
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlimtuneError):
        slimtune.load(model)
    assert not (tmp_path / "ran").exists()


NINE = "[*a, *a, *a, *a, *a, *a, *a, *a, *a]"
RECIPES = {
    "a bomb of aliases": "a: &a [x, x]\nmodel: {name: " + NINE + "}\n",
    "a tag": "model: !!python/object/apply:os.system [touch ran]\n",
    "deep nesting": "model: " + "[" * 50_000,
    "a list for a name": "model: {name: [a, b]}\n",
    "no model": "data: {}\n",
    "a text": "just text\n",
}


@pytest.mark.parametrize("case", RECIPES)
def test_the_recipe_beside_a_tuned_model(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_base(tmp_path / "model")
    (model / "recipe.yaml").write_text(RECIPES[case])
    with pytest.raises(ConfigError) as caught:
        Tuned.find(str(model))
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "ran").exists()
