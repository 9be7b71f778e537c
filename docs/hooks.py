"""What the site adds to the pages: the README as its first page, and links that leave the docs as plain text."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
START = "start.md"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|mailto:|#)([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the repository's README.md as a page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, START, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to the README to its page; make text of those to other files of the repository, as the Dockerfile."""
    folder = posixpath.dirname(page.file.src_uri)

    def linked(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
        if path == "../README.md":
            return f"[{text}]({posixpath.relpath(START, folder or '.')})"
        return match[0] if files.get_file_from_path(path) else text

    return LINK.sub(linked, markdown)
