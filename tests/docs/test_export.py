"""The page on exporting: its commands run, and it names what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from export.test_export import adapter
from slimtune.cli import app
from slimtune.export.formats import FORMATS
from slimtune.export.gguf.architectures import ARCHITECTURES
from slimtune.export.gguf.quantize import KINDS
from small_text_model import save_base

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter(save_base(tmp_path / "base"), tmp_path / "my-adapter")
    # Those that need what isn't on any machine run in tests/export.
    here = re.sub(r"<!-- needs: .*? -->\n```.*?```", "", PAGE, flags=re.DOTALL)
    commands = re.findall(r"^slimtune .*$", here, re.MULTILINE)
    assert len(commands) == 6
    for line in commands:
        result = CliRunner().invoke(app, [*shlex.split(line)[1:], *(["--max-kl", "1"] if "Q8_0" in line else [])])
        assert result.exit_code == 0, (line, result.output)
        assert "use it:" in result.output


def test_it_names_every_format_type_and_architecture() -> None:
    named = set(re.findall(r"`([\w-]+)`", PAGE))
    assert named >= {*FORMATS, *ARCHITECTURES}
    assert all(kind in PAGE for kind in KINDS)
