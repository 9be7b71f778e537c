"""Names, data and answers in Markdown: as text that a page shows, and not as marks that it obeys."""

from __future__ import annotations

import re

from slimtune.console.screen import one_line


def escaped(text: str) -> str:
    """Text on one line that is no Markdown: no heading, link, image, emphasis, code, tag or cell of a table."""
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", one_line(" ".join(text.split()))).replace("<", "&lt;")


def code(text: str) -> str:
    """Text as code, behind more backticks than it has in a row."""
    # A run of n backticks inside ends only at a fence of more than n (CommonMark, 6.1).
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    inner = one_line(" ".join(text.split())).replace("<", "&lt;")
    # A space at either end keeps a backtick of the text from joining the fence; a page shows it without them.
    return f"{fence}{inner}{fence}" if len(fence) == 1 else f"{fence} {inner} {fence}"
