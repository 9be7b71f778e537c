"""The site is built from the pages without a warning, and its API pages show every public name with its help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slimtune

ROOT = Path(__file__).parents[2]
pytest.importorskip("material", reason="the site needs pip install 'slimtune[docs]'")
CONSTANTS = {"__version__", "PEFT_TYPE_TO_CONFIG_MAPPING", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        name = name.parent if name.name == "README" else name
        assert (site / name / "index.html").is_file(), name


def test_the_readme_is_its_first_page_and_its_links_stay_in_the_site(site: Path) -> None:
    shown = (site / "start" / "index.html").read_text()
    assert "Six lines" in shown
    (main,) = re.findall(r"<article.*?</article>", shown, re.DOTALL)
    for target in re.findall(r'href="([^"]+)"', main):
        if not target.startswith(("http", "#")):
            assert (site / "start" / target.partition("#")[0]).exists(), target


def test_pages_need_nothing_from_elsewhere(site: Path) -> None:
    text = (site / "index.html").read_text()
    assert not re.findall(r'(?:src|rel="stylesheet" href)="(https?:[^"]+)"', text)


def test_every_public_name_has_its_help(site: Path) -> None:
    shown = "".join(path.read_text() for path in (site / "api").rglob("index.html"))
    for name in set(slimtune.__all__) - CONSTANTS:
        assert f'id="slimtune.{name}"' in shown, name
