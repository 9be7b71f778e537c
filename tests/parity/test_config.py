"""`LoraConfig` has the fields and defaults of peft, in memory and on disk."""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest

import slimtune
from slimtune.errors import ConfigError
from tensors import plain
from zoo import BERT, LLAMA, MIXTURE

FILE = "adapter_config.json"
SET: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 12,
    "lora_dropout": 0.1,
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["lm_head"],
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["input_layernorm"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"v_proj": 7},
    "task_type": "CAUSAL_LM",
    "fan_in_fan_out": False,
    "base_model_name_or_path": "some/base",
    "revision": "main",
    "inference_mode": False,
}


def fields(config: Any) -> dict[str, Any]:
    return {name: plain(value) for name, value in config.to_dict().items()}


def test_each_field_of_ours_has_peft_s_default() -> None:
    ours, theirs = fields(slimtune.LoraConfig()), fields(peft.LoraConfig())
    del ours["peft_version"], theirs["peft_version"]
    assert ours == {name: theirs[name] for name in ours}


def test_the_first_arguments_stand_in_the_same_place() -> None:
    """`LoraConfig(16)` sets what it sets in peft."""
    ours, theirs = (next(iter(inspect.signature(lib.LoraConfig).parameters)) for lib in (slimtune, peft))
    assert ours == theirs
    assert plain(slimtune.LoraConfig("CAUSAL_LM").task_type) == plain(peft.LoraConfig("CAUSAL_LM").task_type)


def test_task_types_have_the_same_names() -> None:
    assert {name: str(member.value) for name, member in slimtune.TaskType.__members__.items()} == {
        name: str(member.value) for name, member in peft.TaskType.__members__.items()
    }


@pytest.mark.parametrize(("writer", "reader"), [(slimtune, peft), (peft, slimtune), (slimtune, slimtune)])
def test_a_file_is_read_back_equal(writer: ModuleType, reader: ModuleType, tmp_path: Path) -> None:
    written = writer.LoraConfig(**SET)
    written.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = reader.PeftConfig.from_pretrained(str(tmp_path))
    assert type(read) is reader.LoraConfig
    before, after = fields(written), fields(read)
    assert set(SET) <= set(after)
    shared = (set(before) & set(after)) - {"peft_version"}
    assert {name: after[name] for name in shared} == {name: before[name] for name in shared}


@pytest.mark.parametrize("specimen", [LLAMA, BERT, MIXTURE], ids=lambda specimen: specimen.name)
def test_a_saved_adapter_has_the_config_that_peft_saves(specimen: Any, tmp_path: Path) -> None:
    """But for heads in peft's `modules_to_save` that this model doesn't have."""
    there = {name.rpartition(".")[2] for name, _ in specimen.model().named_modules()}
    written = []
    for library in (slimtune, peft):
        folder = tmp_path / library.__name__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = library.LoraConfig(r=4, **specimen.options())
            library.get_peft_model(specimen.model(), config).save_pretrained(folder)
        content = json.loads((folder / FILE).read_text())
        for name in ("target_modules", "modules_to_save"):
            content[name] = sorted(there & set(content[name] or []))
        del content["peft_version"]
        written.append(content)
    ours, theirs = written
    assert ours == {name: theirs[name] for name in ours}
    assert ours["inference_mode"] is True


def test_peft_reads_a_saved_adapter_without_a_warning(tmp_path: Path) -> None:
    config = slimtune.LoraConfig(r=4, **LLAMA.options())
    slimtune.get_peft_model(LLAMA.model(), config).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path)


def test_every_field_of_peft_at_its_default_is_accepted() -> None:
    """Whoever spells the defaults out, as generated configs do, loses nothing."""
    theirs = peft.LoraConfig()
    spelled_out = {f.name: getattr(theirs, f.name) for f in dataclasses.fields(theirs) if f.init}
    del spelled_out["peft_version"], spelled_out["runtime_config"]  # neither is a choice that a user makes
    ours = slimtune.LoraConfig(**{name: plain(value) for name, value in spelled_out.items()})
    assert ours.r == theirs.r


def test_an_unknown_field_of_a_file_that_changes_nothing_is_kept(tmp_path: Path) -> None:
    slimtune.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, "field_of_next_year": None}))
    config = slimtune.PeftConfig.from_pretrained(str(tmp_path))
    config.save_pretrained(str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / FILE).read_text())["field_of_next_year"] is None


@pytest.mark.parametrize("change", [{"field_of_next_year": 3}, {"use_qalora": True}, {"peft_type": "NEXT_YEAR"}])
def test_a_field_that_would_change_the_result_is_refused_by_name(change: dict[str, Any], tmp_path: Path) -> None:
    slimtune.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, **change}))
    word = str(next(iter(change.values()))) if "peft_type" in change else next(iter(change))
    with pytest.raises(ConfigError, match=word):
        slimtune.PeftConfig.from_pretrained(str(tmp_path))


VARIANTS: dict[str, Any] = {
    "use_bdlora": {"nblocks": 2}, "use_qalora": True, "arrow_config": {}, "corda_config": {}, "kasa_config": {},
    "lora_ga_config": {}, "megatron_config": {"a": 1}, "monteclora_config": {}, "velora_config": {},
    "alora_invocation_tokens": [1],
}  # fmt: skip


@pytest.mark.parametrize("field", VARIANTS)
def test_a_variant_of_lora_that_is_not_here_is_refused_with_a_way_out(field: str) -> None:
    assert field in {f.name for f in dataclasses.fields(peft.LoraConfig)}, "the oracle knows it"
    with pytest.raises(ConfigError, match=rf"{field}.*(leave it out|without).*peft"):
        slimtune.LoraConfig(r=2, **{field: VARIANTS[field]})


def test_a_field_of_another_version_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"'field_of_next_year' .* is unknown to this version .* update slimtune"):
        slimtune.PeftConfig.from_peft_type(peft_type="LORA", field_of_next_year=3)


def test_a_config_is_made_by_the_name_of_its_method() -> None:
    for library in (slimtune, peft):
        config = library.PeftConfig.from_peft_type(peft_type="IA3", target_modules=["k_proj"])
        assert isinstance(config, library.IA3Config)
        assert config.target_modules == {"k_proj"}
        assert isinstance(library.LoraConfig.from_peft_type(r=3), library.LoraConfig)
    with pytest.raises(ConfigError, match="this adapter is of IA3, not one for LoraConfig"):
        slimtune.LoraConfig.from_peft_type(peft_type="IA3", target_modules=["k_proj"])
