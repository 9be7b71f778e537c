"""There is never half an adapter on disk: a kill or a full disk in the middle of a save leaves the old or the new."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

import slimtune
from slimtune.errors import AdapterFileError
from slimtune.storage.peft_format import WEIGHTS_NAME, read_adapter, read_config, read_tensors, save_adapter
from zoo import LLAMA

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KILLS = 60

# A process saves one adapter after the other and is killed; its parent then looks at what is on disk. Each save has a
# number: it is every element of every tensor, and lora_alpha in the config.
KILLED_SAVES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from slimtune import LoraConfig
from slimtune.storage.peft_format import read_adapter, read_config, save_adapter

torch.set_num_threads(1)
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
fields = LoraConfig(r=4, target_modules=["site"]).to_dict()
shapes = {f"base_model.model.{i}.site.lora_{f}.weight": (64, 64) for i in range(8) for f in "AB"}

def save_without_end(number, confirm):
    while True:
        number += 1
        tensors = {key: torch.full(shape, float(number)) for key, shape in shapes.items()}
        save_adapter(folder, {**fields, "lora_alpha": number, "revision": "x" * (number % 7 * 5000)}, tensors)
        os.write(confirm, f"{number}\\n".encode())

random.seed(0)
number, cut_off = 0, 0
for kill in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_without_end(number, writer)
    os.close(writer)
    confirmed = os.read(reader, 64)  # at least one save, so that there is an old adapter
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    while chunk := os.read(reader, 4096):
        confirmed += chunk
    os.close(reader)
    confirmed = int(confirmed.split()[-1])
    tensors, config = read_adapter(folder), read_config(folder)
    numbers = {float(value) for tensor in tensors.values() for value in tensor.unique()}
    assert len(tensors) == len(shapes)
    assert numbers == {float(config["lora_alpha"])}, f"tensors of {numbers}, config of {config['lora_alpha']}"
    number = config["lora_alpha"]
    assert number in (confirmed, confirmed + 1), f"{number} on disk, {confirmed} confirmed"
    cut_off += len(list(folder.iterdir())) > 2 or number > confirmed
print(cut_off)
"""


def test_a_kill_at_any_moment_leaves_a_whole_adapter(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SAVES, str(tmp_path), str(KILLS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > KILLS / 4, "so many of the kills fell into a save"

    # What the last one left lying about goes with the next save.
    save_adapter(tmp_path, slimtune.LoraConfig().to_dict(), {"a": torch.ones(2)})
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG}


@pytest.mark.parametrize("missing", [WEIGHTS, CONFIG])
def test_a_save_cut_off_between_its_two_renames_is_read_as_the_new_one(missing: str, tmp_path: Path) -> None:
    """Weights are renamed first: new weights beside the old config and the new one's pending file, or the old pair."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, number in ((old, 1), (new, 2)):
        save_adapter(folder, slimtune.LoraConfig(lora_alpha=number).to_dict(), {"a": torch.full((2,), float(number))})
    if missing == CONFIG:
        (new / WEIGHTS).replace(old / WEIGHTS)
    else:
        (new / WEIGHTS).replace(old / ".unfinished")
    (new / CONFIG).replace(old / f"{CONFIG}.new")
    expected = 2 if missing == CONFIG else 1
    assert read_config(old)["lora_alpha"] == expected
    assert read_adapter(old)["a"].tolist() == [expected, expected]


def test_a_save_finishes_one_that_was_cut_off_before_it_can_fail_itself(tmp_path: Path) -> None:
    """New weights are in place, their config is still pending; the next save fails as it begins to write."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, number in ((old, 1), (new, 2)):
        save_adapter(folder, slimtune.LoraConfig(lora_alpha=number).to_dict(), {"a": torch.full((2,), float(number))})
    (new / WEIGHTS).replace(old / WEIGHTS)
    (new / CONFIG).replace(old / f"{CONFIG}.new")
    with room_for_files_of(0), pytest.raises(AdapterFileError, match="not saved"):
        save_adapter(old, slimtune.LoraConfig(lora_alpha=3).to_dict(), {"a": torch.full((2,), 3.0)})
    assert read_config(old)["lora_alpha"] == 2
    assert read_adapter(old)["a"].tolist() == [2, 2]
    assert {path.name for path in old.iterdir()} == {WEIGHTS, CONFIG}


def test_what_reads_back_other_than_it_was_written_is_not_saved(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that flips a bit, which no test can have."""
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    write = safetensors.torch.save_file

    def flipping(tensors: Any, path: Path, **options: Any) -> None:
        write(tensors, path, **options)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(safetensors.torch, "save_file", flipping)
    with pytest.raises(AdapterFileError, match="read back other than it was written"):
        save_adapter(adapter, slimtune.LoraConfig().to_dict(), {"a": torch.ones(2)})
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@contextmanager
def room_for_files_of(size: int) -> Iterator[None]:
    """A real limit of the operating system: a write beyond it fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 300, 5000, 30000])
def test_a_full_disk_leaves_the_old_adapter(size: int, adapter: Path) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=16, **LLAMA.options()))
    with room_for_files_of(size), pytest.raises(AdapterFileError, match="not saved"):
        model.save_pretrained(adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    slimtune.PeftModel.from_pretrained(LLAMA.model(), adapter)
    model.save_pretrained(adapter)
    assert json.loads((adapter / CONFIG).read_text())["r"] == 16


def test_a_config_alone_is_written_whole_or_not_at_all(adapter: Path) -> None:
    before = (adapter / CONFIG).read_bytes()
    with room_for_files_of(100), pytest.raises((AdapterFileError, OSError)):
        slimtune.LoraConfig(r=7).save_pretrained(str(adapter))
    assert (adapter / CONFIG).read_bytes() == before


def test_a_folder_that_is_a_file_is_an_error(adapter: Path) -> None:
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), adapter)
    (adapter / "taken").write_text("mine")
    with pytest.raises(AdapterFileError, match="taken"):
        model.save_pretrained(adapter / "taken")
    assert (adapter / "taken").read_text() == "mine"


def test_what_is_not_finite_is_saved_as_it_is(tmp_path: Path) -> None:
    """Storage doesn't judge: a diverged adapter is written and read back bit by bit."""
    tensors = {"a": torch.tensor([float("nan"), float("inf"), -0.0])}
    save_adapter(tmp_path, slimtune.LoraConfig().to_dict(), tensors)
    assert torch.equal(read_tensors(tmp_path / WEIGHTS_NAME)[0]["a"].view(torch.int32), tensors["a"].view(torch.int32))


def test_two_saves_to_one_folder_follow_each_other(adapter: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=2, **LLAMA.options()))
    model.save_pretrained(adapter)
    assert json.loads((adapter / CONFIG).read_text())["r"] == 2
    assert {tensor.shape[0] for key, tensor in load_file(adapter / WEIGHTS).items() if "lora_A" in key} == {2}
