"""What pages need is in the package: templates, texts, files for the browser, and the licences of those of others."""

from __future__ import annotations

import tomllib
from pathlib import Path

from slimtune.studio.app import HERE

ROOT = Path(__file__).parents[2]


def test_every_file_of_the_studio_is_packaged() -> None:
    package = ROOT / "src" / "slimtune"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["slimtune"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in HERE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert len(files) > 20
    assert files - packaged == set()


def test_every_file_of_others_has_its_licence_and_its_version() -> None:
    table = (HERE / "static" / "README.md").read_text()
    vendored = [path.name for path in (HERE / "static" / "vendor").iterdir() if path.suffix in (".js", ".css")]
    assert len(vendored) == 4
    for name in vendored:
        assert f"`{name}`" in table
        owner = {"hx-sse": "htmx"}.get(name.split(".")[0], name.split(".")[0])
        assert (HERE / "static" / "vendor" / f"{owner}.LICENSE").stat().st_size > 300, name
