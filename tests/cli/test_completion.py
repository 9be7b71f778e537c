"""Completion in real shells: commands, options, methods, recipes, devices, models, and nothing heavy at a Tab."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slimtune.cli import proposals
from slimtune.export.formats import FORMATS
from slimtune.plan.devices import devices, find
from slimtune.quantization.config import KINDS, TORCHAO_KINDS
from slimtune.recipe.method import methods, names
from small_text_model import write_lines

HERE = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
CASES = {
    "slimtune tra": {"train"},
    "slimtune train x --me": {"--method"},
    "slimtune train x --method lo": {"loha", "lokr", "lora"},
    "slimtune compare r.yaml --methods full,qlo": {"full,qlora"},
    "slimtune recipe init --for compare": {"compare", "compare-classification"},
    "slimtune plan m --device RTX-40": {name.replace(" ", "-") for name in devices() if name.startswith("RTX 40")},
    "slimtune chat a --device c": {"cpu", "cuda"},
    "slimtune chat ad": {"adapter"},
    "slimtune completion ": {"bash", "zsh", "fish"},
}


def in_bash(folder: Path, lines: list[str]) -> list[set[str]]:
    """What bash proposes behind each line, by the script as it is printed."""
    words = [f'{line}""' if line.endswith(" ") else line for line in lines]
    asks = "\n".join(
        f"COMP_WORDS=({word}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _slimtune_completion slimtune; "
        'echo "${COMPREPLY[*]}"'
        for word in words
    )
    script = f'eval "$(slimtune completion bash)"\ncomplete -p slimtune\n{asks}\n'
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=HERE, capture_output=True, text=True, check=True)
    assert not done.stderr
    registered, *answers = done.stdout.splitlines()
    assert "-F _slimtune_completion slimtune" in registered
    return [set(answer.split()) for answer in answers]


def test_bash_proposes_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapters").mkdir()
    write_lines(tmp_path / "adapter" / "adapter_config.json", {})
    assert dict(zip(CASES, in_bash(tmp_path, list(CASES)), strict=True)) == CASES


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_proposes_what_there_is(tmp_path: Path) -> None:
    line = "slimtune train x --method lo"
    script = f"slimtune completion fish | source; complete -C '{line}'"
    done = subprocess.run(["fish", "-c", script], cwd=tmp_path, env=HERE, capture_output=True, text=True, check=True)
    assert {answer.split("\t")[0] for answer in done.stdout.splitlines()} == CASES[line]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_takes_the_script_and_is_told_what_there_is(tmp_path: Path) -> None:
    script = 'autoload -Uz compinit; compinit -u -d dump; eval "$(slimtune completion zsh)"; print $_comps[slimtune]'
    done = subprocess.run(["zsh", "-fc", script], cwd=tmp_path, env=HERE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "_slimtune_completion"
    asked = HERE | {"_SLIMTUNE_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "slimtune train x --method lo"}
    done = subprocess.run(["slimtune"], env=asked, capture_output=True, text=True, check=True)
    assert all(f'"{name}"' in done.stdout for name in ("loha", "lokr", "lora"))


def test_another_shell_is_a_mistake(run: object) -> None:
    result = run("completion", "tcsh")  # type: ignore[operator]
    assert result.exit_code == 2
    assert "bash, zsh, fish" in result.stderr


def test_proposals_are_what_is_taken() -> None:
    assert names() == list(methods())
    assert [find(name).name for name in proposals.devices("")[2:]] == list(devices())
    assert proposals.quantizations("") == [*KINDS, *TORCHAO_KINDS]
    assert proposals.formats("") == list(FORMATS)


def test_a_tab_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom slimtune.cli import proposals\n"
        "for name in ('methods', 'lists_of_methods', 'recipes', 'devices', 'models'): getattr(proposals, name)('')\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
