"""What a library is missing for is said at once, with the extra that brings it: before anything is read or computed."""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner, Result

import slimtune
from slimtune.cli import app
from slimtune.cli.doctor import FEATURES
from slimtune.errors import has_library
from slimtune.quantization.config import KINDS, TORCHAO_KINDS, library_of
from small_text_model import save_base

RECIPE = """\
model: {name: base}
data: {train: rows.jsonl, held_out: 0.2}
compare: {methods: [lora, qlora], seeds: 1}
output: tuned
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    rows = [{"prompt": f"say {number}", "completion": str(number)} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def typed(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize(
    ("library", "extra", "words"),
    [
        ("bitsandbytes", "quantized", "plan base --base nf4"),
        ("bitsandbytes", "quantized", "plan base training.optim=adamw_8bit"),
        ("bitsandbytes", "quantized", "plan --table"),
        ("torchao", "torchao", "plan base --base int8-torchao"),
        ("bitsandbytes", "quantized", "train base rows.jsonl --output made --quantize nf4"),
        ("accelerate", "quantized", "quantize base --output made"),
        ("bitsandbytes", "quantized", "compare recipe.yaml --output made"),
        ("jinja2", "compare", "compare recipe.yaml --output made"),
        ("matplotlib", "compare", "compare recipe.yaml --output made --dry-run"),
        ("scipy", "compare", "compare recipe.yaml --output made"),
    ],
)
def test_a_library_that_is_missing_is_named_before_any_work(
    library: str, extra: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    result = typed(*words.split())
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert f"needs {library}: run `pip install 'slimtune[{extra}]'`" in said
    assert len(said.split(". ")) == 1
    assert not (folder / "made").exists()


def test_a_plan_without_bitsandbytes_says_what_it_leaves_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = typed("plan", "base", "--device", "RTX 3060", "--method", "lora", "--max-length", "16")
    assert result.exit_code == 0, result.output
    assert "left out: a base in int8, nf4, which needs bitsandbytes" in " ".join(result.output.split())
    assert "run it:" in result.output
    assert "NF4" not in result.output


def test_doctor_knows_every_extra() -> None:
    assert FEATURES.keys() == PROJECT["optional-dependencies"].keys() - {"dev", "docs", "all"}


PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def provided(extras: str) -> set[str]:
    """The libraries that a plain install with these extras has."""
    names, lines = set(), list(PROJECT["dependencies"])
    for extra in extras.split(","):
        lines += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, lines):
        # An extra may be made of others.
        names |= {requirement.name} if requirement.name != "slimtune" else provided(",".join(requirement.extras))
    return names


def required() -> list[tuple[str, str, str]]:
    """(place, library, extras) of all calls of `require` in the sources."""
    libraries = [(kind, library_of(kind)) for kind in (*KINDS, *TORCHAO_KINDS)]
    calls = [(f"quantize={kind}", *library) for kind, library in libraries if library]
    for path in sorted(Path(slimtune.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require"):
                continue
            said = [node.args[0], *(keyword.value for keyword in node.keywords if keyword.arg == "extra")]
            place = f"{path.parent.name}/{path.name}"
            if place != "quantization/config.py":  # where they come from `library_of`
                calls.append((f"{place}:{node.lineno}", *(ast.literal_eval(value) for value in said)))
    return calls


@pytest.mark.parametrize(("place", "library", "extras"), required())
def test_the_extra_that_is_named_brings_the_library(place: str, library: str, extras: str) -> None:
    assert library in provided(extras), place
    assert has_library(library), "it is installed here, by the name under which it is looked for"


def test_a_missing_library_has_its_sentence_from_one_place() -> None:
    package = Path(slimtune.__file__).parent
    with_own = {path.name for path in package.rglob("*.py") if "pip install 'slimtune[" in path.read_text()}
    assert with_own == {"errors.py", "doctor.py"}


def test_a_library_that_is_there_and_cannot_be_imported_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gguf").mkdir()
    (folder / "gguf/__init__.py").write_text("from numpy import nothing_of_that_name")
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    result = typed("export", "base", "--to", "gguf", "--output", "made")
    assert result.exit_code == 1, result.output
    said = " ".join(result.stderr.split())
    assert "a library can't be imported: cannot import name 'nothing_of_that_name' from 'numpy'" in said
