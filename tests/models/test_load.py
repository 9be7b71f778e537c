"""Loading a base: plain weights whatever it came as, and folders that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimtune import LoraConfig, get_peft_model
from slimtune.errors import ConfigError, ModelNotFoundError, OutputExistsError
from slimtune.models.load import LoadOptions, load, load_model, load_tokenizer
from slimtune.storage.atomic import staged
from slimtune.storage.source import cache_dir, resolve
from small_text_model import save_base, tiny_model


def test_a_folder(tmp_path: Path) -> None:
    model, tokenizer = load(save_base(tmp_path / "base"), device="cpu")
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    assert tokenizer.chat_template


@pytest.mark.parametrize("length", [[512], "512"])
def test_a_tokenizer_that_fails_with_its_first_text_is_refused_when_it_is_loaded(length: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = base / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": length}))
    with pytest.raises(
        ModelNotFoundError, match=r"the tokenizer in '.*' can't be loaded: TypeError: .*; fetch the model"
    ):
        load_tokenizer(str(base))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_of_numbers_is_the_one_asked_for(tmp_path: Path, dtype: str) -> None:
    model, _ = load(save_base(tmp_path / "base"), dtype=dtype, device="cpu")
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}


def test_an_adapter_brings_its_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model, _ = load(base, device="cpu")
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 20)[None]
    again, tokenizer = load_model(tmp_path / "adapter", "text", LoadOptions(device="cpu"))
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
    assert tokenizer is not None


def test_code_of_the_model_is_only_run_when_asked(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(Exception, match="can't be loaded"):
        load(base)
    assert not (tmp_path / "ran").exists()


def test_the_packaged_model_is_plain_and_kept(smollm2: Any) -> None:
    assert type(smollm2.model.layers[0].self_attn.q_proj) is nn.Linear
    assert not getattr(smollm2, "is_quantized", False)
    assert not hasattr(smollm2.config, "quantization_config")
    assert smollm2.name_or_path == "smollm2-135m-instruct"
    folder = Path(resolve("smollm2-135m-instruct"))
    assert folder.parent == cache_dir()
    written = folder.stat().st_mtime_ns
    load("smollm2-135m-instruct", device="cpu")
    assert folder.stat().st_mtime_ns == written
    assert not [path for path in cache_dir().iterdir() if path.name.startswith(".")]


def test_the_packaged_model_speaks(smollm2: Any, smollm2_tokenizer: Any) -> None:
    ids = smollm2_tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert smollm2_tokenizer.decode(smollm2(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "slimtune" / "models"


def test_unknown_types_of_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'float16'"):
        load(save_base(tmp_path / "base"), dtype="flaot16")


def test_a_staged_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "whole").read_text() == "x"
    assert (tmp_path / "out").stat().st_mode & 0o700 == 0o700


def test_a_staged_folder_replaces_only_when_told_and_only_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    (out / "mine").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"), staged(out):
        pass
    with staged(out, overwrite=True) as folder:
        (folder / "old").write_text("new")
        assert (out / "old").read_text() == "old"
    assert ((out / "old").read_text(), (out / "mine").read_text()) == ("new", "mine")
