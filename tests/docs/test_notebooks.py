"""The notebooks: their cells are Python and commands that are taken, and run from top to bottom on a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from doc_pages import Desk, Step
from small_text_model import save_base

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TINY = {"STEPS": "1", "QUESTIONS": "2", "SEEDS": "1", "METHODS": "lora"}
"""What is set in place of the parameters of a notebook, beside the model."""


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def parameters(path: Path) -> dict[str, str]:
    (cell,) = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    return dict(re.findall(r"^%env (\w+)=(.*)$", cell.source, re.MULTILINE))


def test_there_are_two() -> None:
    assert [path.stem for path in PATHS] == ["first_tune", "plan_compare_merge"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_begins_with_an_install_and_holds_no_outputs(path: Path) -> None:
    first, *rest = code_cells(path)
    assert tags(first) == ["install"]
    extras = set(",".join(re.findall(r"\[([\w,-]+)\]", first.source)).split(","))
    assert extras <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    assert not any(cell.outputs or cell.execution_count for cell in (first, *rest))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_cells_are_python_and_commands_that_are_taken(path: Path) -> None:
    lines: list[str] = []
    for cell in code_cells(path):
        compile(TransformerManager().transform_cell(cell.source), path.name, "exec")
        if cell.source.startswith("%%bash"):
            lines += re.sub(r"\\\n\s*", " ", cell.source).splitlines()
    values = parameters(path)
    told = [Step(re.sub(r"\$(\w+)", lambda name: shlex.quote(values[name[1]]), line)) for line in lines]
    desk = Desk(told)
    for step in told:
        assert not (problem := desk.take(step)), (step.text, problem)
    assert sum(bool(step.words) for step in told) >= 4


@pytest.mark.soak
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, as a reader would, but for the install, and on a tiny model with few steps."""
    save_base(tmp_path / "tiny")
    notebook = read(path)
    notebook.cells = [cell for cell in notebook.cells if "install" not in tags(cell)]
    (cell,) = [cell for cell in notebook.cells if "parameters" in tags(cell)]
    values = parameters(path) | {"MODEL": str(tmp_path / "tiny")}
    cell.source = "\n".join(f"%env {name}={TINY.get(name, value)}" for name, value in values.items())
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
