"""The base that an adapter's file names is found by every library on this machine, and by slimtune on others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, pipeline

from cli.conftest import invoke
from slimtune import LoraConfig, get_peft_model
from slimtune.models.load import load
from slimtune.storage.source import PACKAGED, base_of, id_on_hub, name_elsewhere, name_here, resolve
from small_text_model import save_base


def saved(model: Any, folder: Path) -> str:
    """The base that a new adapter of the model names in its file."""
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_transformers_finds_a_packaged_base(tmp_path: Path) -> None:
    model, tokenizer = load("smollm2-135m-instruct", dtype="bfloat16", device="cpu")
    named = saved(model, tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert (Path(named) / "config.json").is_file()
    write = pipeline("text-generation", model=str(tmp_path / "tuned"))
    assert write("Hello", max_new_tokens=2)[0]["generated_text"].startswith("Hello")
    # Here it has the name that holds on every machine, and its card the model's id on the Hub.
    assert base_of(tmp_path / "tuned") == "smollm2-135m-instruct"
    assert json.loads(invoke("info", tmp_path / "tuned", "--json").stdout)["base"] == "smollm2-135m-instruct"
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in (tmp_path / "tuned" / "README.md").read_text()


def test_a_relative_folder_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    named = saved(AutoModelForCausalLM.from_pretrained("base"), tmp_path / "tuned")
    assert named == str(tmp_path / "base")


def test_a_hub_id_stays() -> None:
    assert name_elsewhere("organisation/model") == name_here("organisation/model") == "organisation/model"
    assert id_on_hub("organisation/model") == "organisation/model"


@pytest.mark.parametrize("name", PACKAGED)
def test_the_folder_of_a_packaged_model_is_known_on_any_machine(name: str) -> None:
    assert name_here(name_elsewhere(name)) == name
    there = Path("/home/somebody/elsewhere", *Path(resolve(name)).parts[-3:])
    assert name_here(str(there)) == name
