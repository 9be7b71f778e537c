"""The boundary around other libraries' reading: their errors are one sentence, our own bugs stay tracebacks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slimtune
from slimtune.data.reading import read_rows
from slimtune.errors import AdapterFileError, DataError, ModelNotFoundError, SlimtuneError
from slimtune.models.inspect import contents
from slimtune.storage import foreign
from slimtune.storage.foreign import reading, refuse_code
from slimtune.storage.text_files import read_json, read_mapping
from small_text_model import save_base, tiny_model


class PanicException(BaseException):
    """What a library in Rust raises where it gives up."""


@pytest.mark.parametrize(
    ("error", "words"),
    [(KeyError("model"), "KeyError: 'model'"), (ValueError("a\nb"), ": a;"), (PanicException("no"), "PanicException")],
)
def test_what_a_library_raises_becomes_one_sentence(error: BaseException, words: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught, reading("the file x can't be read", "fetch it again"):
        raise error
    assert words in str(caught.value)
    assert str(caught.value).endswith("; fetch it again")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_what_our_own_code_raises_on_the_way_stays_as_it_is() -> None:
    bug: Any = None
    with pytest.raises(TypeError), reading("the file x can't be read", "fetch it again"):
        refuse_code("x", ValueError("trust_remote_code")) if bug else foreign.refuse_special_files(bug)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), DataError("own"), RuntimeError("bad_alloc")])
def test_memory_keyboards_and_our_own_sentences_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("the file x can't be read", "fetch it again"):
        raise error
    assert caught.value is error


CONFIGS: dict[str, dict[str, Any]] = {
    "config.json": {"architectures": 7, "num_hidden_layers": "two", "model_type": ["x"], "hidden_act": {}},
    "tokenizer_config.json": {"unk_token": {"a": 1}, "tokenizer_class": 7, "added_tokens_decoder": [1]},
    "tokenizer.json": {"model": None, "added_tokens": {"a": 1}, "pre_tokenizer": 7},
    "generation_config.json": {"eos_token_id": "x", "transformers_version": []},
}


def refusal(folder: Path) -> str:
    """What is said against a folder; transformers passes over some fields, and then it is nothing."""
    try:
        slimtune.load(folder)
    except SlimtuneError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in CONFIGS.items() for field in fields])
def test_fields_of_another_type_in_a_model_s_folder(name: str, field: str, tmp_path: Path) -> None:
    path = save_base(tmp_path / "base") / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: CONFIGS[name][field]}))
    sentence = refusal(tmp_path / "base")
    assert "\n" not in sentence
    assert not sentence or "base" in sentence


def pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


READERS: dict[str, tuple[str, Callable[[Path], Any], type[SlimtuneError]]] = {
    "a model's configuration": ("config.json", lambda folder: slimtune.load(folder), ModelNotFoundError),
    "a model's weights": ("model.safetensors", lambda folder: slimtune.load(folder), ModelNotFoundError),
    "a tokenizer": ("tokenizer.json", lambda folder: slimtune.load(folder), ModelNotFoundError),
    "what info reads": ("model.safetensors", lambda folder: contents(str(folder)), AdapterFileError),
    "a plan's configuration": ("config.json", lambda folder: slimtune.plan(folder, max_length=64), ModelNotFoundError),
    "data": ("rows.jsonl", lambda folder: read_rows(folder / "rows.jsonl"), DataError),
    "packed data": ("rows.jsonl.gz", lambda folder: read_rows(folder / "rows.jsonl.gz"), DataError),
    "a table": ("rows.parquet", lambda folder: read_rows(folder / "rows.parquet"), DataError),
    "a recipe": ("recipe.yaml", lambda folder: read_mapping(folder / "recipe.yaml"), SlimtuneError),
}


@pytest.mark.parametrize("case", READERS)
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(case: str, tmp_path: Path) -> None:
    name, read, kind = READERS[case]
    folder = save_base(tmp_path / "base")
    pipe(folder / name)
    with pytest.raises(kind, match="pipe or a device"):
        read(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_an_adapter_s_folder(name: str, tmp_path: Path) -> None:
    slimtune.get_peft_model(tiny_model(), slimtune.LoraConfig(r=2)).save_pretrained(tmp_path)
    pipe(tmp_path / name)
    with pytest.raises(AdapterFileError, match="pipe or a device"):
        slimtune.PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_a_device_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="pipe or a device"):
        read_json(tmp_path / "endless.json")
