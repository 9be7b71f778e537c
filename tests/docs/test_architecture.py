"""The architecture page: its additions are whole, each applied to a copy of the source and used there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from import_graph import FLOORS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ADDITIONS = dict(re.findall(r"^### A (\w+)\n.*?^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))

USES = {
    "method": """
import torch, slimtune
from torch import nn
model = slimtune.get_peft_model(nn.Sequential(nn.Linear(3, 2)), slimtune.ShiftConfig(target_modules=["0"]))
x = torch.randn(4, 3)
before = model(x).detach()
model(x).sum().backward()
with torch.no_grad():
    model.get_submodule("0.deltas.default").shift += 1.5
assert torch.allclose(model(x), before + 1.5)
assert torch.allclose(model.merge_and_unload()(x), before + 1.5)
""",
    "base": """
import torch, slimtune
from torch import nn
from slimtune.bases.sign import BinaryLinear
model = nn.Sequential(BinaryLinear(nn.Linear(8, 4)))
x = torch.randn(3, 8)
plain = model(x)
config = slimtune.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
model = slimtune.get_peft_model(model, config)
tuned = model(x)
tuned.sum().backward()
assert [name for name, p in model.named_parameters() if p.grad is not None] == [
    "0.deltas.default.lora_A", "0.deltas.default.lora_B"
]
assert "sign" in str(slimtune.parts(model))
with model.disable_adapter():
    assert torch.equal(model(x), plain)
merged = model.merge_and_unload()
assert type(merged[0]) is nn.Linear
assert torch.allclose(merged(x), tuned, atol=1e-5)
""",
    "task": """
import json
from pathlib import Path
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.registry import read
from slimtune.models.load import load_tokenizer
from slimtune.recipe.recipe import Recipe
from slimtune.storage.source import resolve
Path("rows.jsonl").write_text(json.dumps({"text": "one two"}) + chr(10))
tokenizer = load_tokenizer(resolve("smollm2-135m-instruct"))
(example,) = read(DataSettings("rows.jsonl"), "echo").encode(None, tokenizer).examples
learned = [label for label in example.labels if label >= 0]
assert tokenizer.decode(learned) == "one two"
assert example.input_ids == learned + learned
model, data = {"name": "smollm2-135m-instruct"}, {"train": "rows.jsonl"}
recipe = {"task": "echo", "model": model, "data": data, "output": "out"}
assert Recipe.of(recipe).task == "echo"
""",
    "command": """
import sys
from slimtune.cli import main
sys.argv = ["slimtune", "size", sys.argv[1]]
main()
""",
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", USES)
def test_an_addition_is_whole(copy: Path, name: str) -> None:
    applied = subprocess.run(["git", "apply", "-"], input=ADDITIONS[name], text=True, cwd=copy, capture_output=True)
    assert not applied.returncode, applied.stderr
    command = [sys.executable, "-W", "ignore", "-c", USES[name], str(ROOT / "docs" / "adr")]
    environment = os.environ | {"PYTHONPATH": str(copy / "src")}
    done = subprocess.run(command, env=environment, cwd=copy, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    if name == "command":
        assert re.fullmatch(r"\d+\.\d MB\n", done.stdout)


ROOMS = {room for floor in FLOORS for room in floor if not room.startswith("__")} - {"errors"}


def test_every_room_is_drawn() -> None:
    drawing = PAGE.split("## The layers")[1].split("```")[1]
    assert set(re.findall(r"([a-z]+)/", drawing)) == ROOMS


def test_every_room_is_in_the_readme() -> None:
    source = (ROOT / "README.md").read_text().split("## The source")[1].split("```")[1].partition("\ntests/")[0]
    assert {"errors", *ROOMS} == set(re.findall(r"(?:^  |\S   +)([a-z]+)(?:/|\.py) ", source, re.MULTILINE))


def test_the_files_that_it_names_exist() -> None:
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py|(?:[a-z_]+/)+)`", PAGE)
    assert len(named) > 15
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "src" / "slimtune" / name).exists(), name


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere_on_every_page() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
            assert not anchor or anchor in anchors(page.parent / target if target else page), (page.name, anchor)
