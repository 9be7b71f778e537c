"""What is written can be read by whom the umask lets; what can't be read is one sentence."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slimtune
from slimtune.data.features import FeatureClassifier
from slimtune.errors import SlimtuneError
from slimtune.evaluate.tuned import Tuned
from slimtune.models.headers import read_folder, read_header
from slimtune.models.inspect import contents
from slimtune.storage.atomic import staged, staged_file
from slimtune.storage.peft_format import CONFIG_NAME, WEIGHTS_NAME, read_adapter, read_config
from slimtune.storage.push import contents_of
from slimtune.storage.source import base_of, folder_of, is_adapter
from slimtune.storage.tensor_tree import write_tree
from slimtune.train.results import save_model
from small_text_model import tiny_model, tiny_tokenizer
from zoo import LLAMA

SOURCES = Path(slimtune.__file__).parent


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def adapted() -> Any:
    return slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()))


def two_adapters(folder: Path) -> None:
    model = adapted()
    model.add_adapter("second", slimtune.LoraConfig(r=2, **LLAMA.options()))
    model.save_pretrained(folder)


def for_the_trainer(folder: Path) -> None:
    adapted().save_pretrained(folder / "checkpoint-1")


def by_libraries(folder: Path) -> None:
    with staged(folder) as scratch:
        tiny_model().save_pretrained(scratch)
        Path(tempfile.mkdtemp(dir=scratch), "file").write_text("text")
        os.close(tempfile.mkstemp(dir=scratch)[0])


def one_file(folder: Path) -> None:
    with staged_file(folder / "file") as scratch:
        scratch.write_text("text")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "adapters": two_adapters,
    "an adapter in a checkpoint": for_the_trainer,
    "a classifier": FeatureClassifier(["a", "b"], torch.zeros(1, 4), torch.zeros(1), "mean", "base", 8).save,
    "nested tensors": lambda folder: folder.mkdir() or write_tree(folder, "state", {"a": torch.ones(2)}),
    "a whole model": lambda folder: save_model(folder, tiny_model(), tiny_tokenizer()),
    "a staged folder": by_libraries,
    "a staged file": one_file,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_and_folders_have_the_permissions_of_the_umask(writer: str, umask: int, tmp_path: Path) -> None:
    WRITERS[writer](tmp_path / "out")
    written = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert any(path.is_file() for path in written)
    for path in written:
        plain = 0o777 if path.is_dir() else 0o666
        assert oct(path.stat().st_mode & 0o777) == oct(plain & ~umask), path.name


def test_an_adapter_that_is_saved_again_is_not_shut(tmp_path: Path) -> None:
    for _ in range(2):
        adapted().save_pretrained(tmp_path)
        modes = {(tmp_path / name).stat().st_mode & 0o777 for name in (CONFIG_NAME, WEIGHTS_NAME)}
        assert len(modes) == 1


def test_a_folder_of_a_group_hands_the_group_on(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    with staged(tmp_path / "out") as scratch:
        inherits = scratch.stat().st_mode & stat.S_ISGID
        scratch.chmod(scratch.stat().st_mode | stat.S_ISGID)
    assert (tmp_path / "out").stat().st_mode & stat.S_ISGID
    assert inherits


def test_what_makes_files_for_the_owner_alone_is_called_in_one_place() -> None:
    makers = re.compile(r"\b(save_file|serialize_file|mkstemp|mkdtemp|NamedTemporaryFile)\(")
    found = {str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py") if makers.search(path.read_text("utf-8"))}
    assert found == {"storage/atomic.py", "storage/permissions.py"}


# -- Reading.


def attached(folder: Path) -> Any:
    return slimtune.PeftModel.from_pretrained(LLAMA.model(), folder)


READERS: dict[str, Callable[[Path], Any]] = {
    "headers": lambda folder: read_folder(folder, CONFIG_NAME, "adapter_model*.safetensors"),
    "header": lambda folder: read_header(folder / WEIGHTS_NAME),
    "info": lambda folder: contents(str(folder)),
    "config": read_config,
    "adapter": read_adapter,
    "attached": attached,
    "automatic": slimtune.AutoPeftModelForCausalLM.from_pretrained,
    "tensors": lambda folder: slimtune.load_peft_weights(str(folder)),
    "is adapter": is_adapter,
    "base": base_of,
    "folder": lambda folder: folder_of(str(folder)),
    "loaded": slimtune.load,
    "tuned": lambda folder: Tuned.find(str(folder)),
    "pushed": contents_of,
}


def outcome(read: Callable[[Path], Any], folder: Path) -> str | None:
    """The sentence of a refusal; None where nothing that is wrong was read. Any other error goes through."""
    try:
        read(folder)
    except SlimtuneError as error:
        return str(error)
    return None


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_folder_in_place_of_a_file(reader: str, name: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused = outcome(READERS[reader], tmp_path)
    needs = {"headers", "info", "attached", "automatic", "loaded", "pushed"}
    needs |= {"config"} if name == CONFIG_NAME else {"header", "adapter", "tensors"}
    assert refused or reader not in needs
    assert "\n" not in (refused or "")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("call", ["open", "iterdir", "is_file"])
def test_what_this_user_may_not_read(reader: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system says it: tests run as root, to whom all is open."""
    adapted().save_pretrained(tmp_path)
    real: Callable[..., Any] = getattr(Path, call)

    def denied(path: Path, *args: Any, **options: Any) -> Any:
        if path == tmp_path or path.parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, call, denied)
    refused = outcome(READERS[reader], tmp_path)
    assert "\n" not in (refused or "")
    if call == "is_file" and reader not in ("headers", "header"):
        assert refused is not None


@pytest.mark.parametrize("reader", READERS)
def test_a_name_that_no_file_can_have(reader: str) -> None:
    assert outcome(READERS[reader], Path("x" * 5000))


def test_tensors_are_written_as_given(tmp_path: Path) -> None:
    from safetensors import safe_open

    from slimtune.storage.permissions import write_tensors

    tensors: dict[str, Tensor] = {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "file.safetensors", tensors, {"what": "this"})
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert file.metadata() == {"what": "this"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
