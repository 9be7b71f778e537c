"""What the README shows is so: its Python runs, its commands and files exist, its figures are the measured ones."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.storage.source import resolve
from small_text_model import save_base

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_the_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"base_folder": resolve("smollm2-135m-instruct")})
    assert list(tmp_path.glob("*/adapter_model.safetensors"))


def test_the_first_block_has_six_statements_at_most() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 6


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^slimtune (\w+)", README, re.MULTILINE))))
def test_the_commands_exist(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output


def test_the_tree_names_what_is_there() -> None:
    tree = README.split("## The source")[1]
    names = re.findall(r"(?:^|\s{2,})([a-z_]+\.py|[a-z_]+/)(?=\s{2,})", tree)
    assert len(names) > 15
    for name in names:
        assert any((ROOT / top / name).exists() for top in ("", "src/slimtune", "docs")), name


def test_every_module_of_the_core_is_in_the_tree() -> None:
    tree = README.split("## The source")[1]
    for path in (ROOT / "src/slimtune").glob("*.py"):
        assert path.name in tree or path.name.startswith("__"), path.name


def test_the_figures_are_those_of_the_last_benchmarks() -> None:
    shown = "".join(path.read_text() for path in (ROOT / "docs/speed.md", *(ROOT / "docs/figures").glob("*.md")))
    measured = list((ROOT / "benchmarks/results").glob("lora-*.md"))
    assert measured
    for path in measured:
        for row in path.read_text().splitlines():
            if row.startswith("|"):
                assert row in shown, path.name


def test_the_short_table_of_speed_repeats_the_whole_one() -> None:
    section = README.split("## Speed and memory")[1].split("\n## ")[0]
    numbers = re.findall(r"\d\.\d+(?= s| GB)", section)
    whole = "".join((ROOT / "docs" / name).read_text() for name in ("speed.md", "figures/quantized.md"))
    assert len(numbers) == 20
    assert all(re.search(rf"\b{number}\d? (s|GB)", whole) for number in numbers)


def test_what_the_comparison_said_is_quoted_from_its_report() -> None:
    report = " ".join((ROOT / "docs" / "report" / "report.md").read_text().replace("*", "").split())
    quoted = " ".join(line.removeprefix("> ") for line in README.splitlines() if line.startswith("> "))
    assert "Choose full" in quoted
    for part in quoted.split(" [...] "):
        assert part in report


def test_the_commands_of_the_command_line_run_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On files that a command of the page made; only the models are a tiny one, and a step is enough."""
    block = README.split("## The command line")[1].split("```")[1].strip()
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "tiny")
    for line in block.splitlines():
        words = shlex.split(re.sub("smollm2-135m-instruct|llama-2-7b", "tiny", line), comments=True)[1:]
        words += {"train": ["--max-steps", "1"], "evaluate": ["--limit", "2", "--max-new-tokens", "4"]}.get(
            words[0], []
        )
        result = CliRunner().invoke(app, words, input="/exit\n")
        assert result.exit_code == 0, (words, result.output)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_every_extra_is_in_the_table_of_extras() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = README.split("## Install")[1].split("\n## ")[0]
    shown = set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE))
    assert shown == declared.keys() - {"dev", "docs", "reasoning"}
