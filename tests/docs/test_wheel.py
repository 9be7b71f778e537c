"""From an empty folder, with nothing but a wheel: the README's lines are typed from top to bottom (soak)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def section(title: str, language: str = "") -> list[str]:
    text = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.soak
def test_the_readme_is_typed_from_top_to_bottom(tmp_path: Path) -> None:
    """As it stands but for two lines: the install takes the wheel, and the comparison of 22 minutes is a dry run."""
    dist, venv, folder = tmp_path / "dist", tmp_path / "venv", tmp_path / "empty"
    folder.mkdir()
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(dist), str(ROOT)], ROOT)
    run([sys.executable, "-m", "venv", str(venv)], folder)
    (wheel,) = dist.glob("*.whl")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean |= {
        "PATH": os.pathsep.join([str(venv / "bin"), clean["PATH"]]), "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    (install,) = section("Install")
    for line in install.splitlines():
        run(shlex.split(line.replace("'.[", f"'{wheel}["), comments=True), folder, clean)
    for code in section("Six lines", "python"):
        named = "from slimtune.storage.source import resolve\nbase_folder = resolve('smollm2-135m-instruct')\n"
        run(["python", "-c", named + code], folder, clean)
    (compared,) = section("Did it work?")
    (typed,) = section("The command line")
    for line in [*compared.splitlines(), *typed.splitlines()]:
        words = shlex.split(line, comments=True)
        words += ["--dry-run"] if words[1] == "compare" else []
        run(words, folder, clean)
    assert (folder / "merged" / "model.safetensors").is_file()


def run(words: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """A command, which has to end well; what it prints is shown."""
    print("$", *words, flush=True)
    done = subprocess.run(words, cwd=folder, env=environment, input="/exit\n", text=True, check=False)
    assert done.returncode == 0, words
