"""Texts outside of what models are usually tuned on, one small set a domain, and the user's own.

`prose`, `german`, `facts` and `chat` were written for this purpose and ship with the package; `arithmetic` is drawn
from templates, the same at each call; `code` is the source of functions of the Python standard library, read from the
interpreter that runs, so that it differs a little from one version of Python to the next.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import random
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from slimtune.data.reading import read_rows
from slimtune.data.rows import Document, Pair
from slimtune.data.sources import READERS, kind_of, text_of
from slimtune.errors import ConfigError, DataError, did_you_mean
from slimtune.evaluate.language_loss import Text

MODULES = (
    "textwrap", "bisect", "heapq", "statistics", "random", "fractions", "shutil", "fnmatch", "difflib", "calendar",
    "colorsys", "functools", "contextlib", "posixpath", "glob", "ast", "queue", "sched", "urllib.parse", "html",
)  # fmt: skip
"""Of the standard library, written in Python, of which the code is read."""
FUNCTION_LINES = range(8, 31)
_PROBLEMS = 48


def texts(names: Sequence[str] | None = None, limit: int | None = None) -> dict[str, list[Text]]:
    """The shipped texts by domain; all domains without names, and the first `limit` texts of each.

    Raises:
        ConfigError: there is no such domain.
        DataError: the interpreter came without the source of its library.
    """
    for name in names or ():
        if name not in DOMAINS:
            near = did_you_mean(name, DOMAINS) or f"; there are {', '.join(DOMAINS)}"
            raise ConfigError(f"no domain '{name}'{near}")
    return {name: read()[:limit] for name, read in DOMAINS.items() if names is None or name in names}


def read_texts(path: Path) -> list[Text]:
    """The user's texts: rows with `text`, or conversations, of a data file; paragraphs of any other text file.

    Raises:
        DataError: with the line at fault.
    """
    if kind_of(path) == ".txt" or kind_of(path) not in READERS:
        return paragraphs(text_of(path), str(path))
    return [row.text if isinstance(row, Document) else row for row in read_rows(path)]


def paragraphs(text: str, where: str) -> list[Text]:
    """What blank lines part; raises DataError where there is nothing."""
    parts = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n")]
    if not any(parts):
        raise DataError(f"{where} holds no text; write paragraphs, with blank lines between them")
    return [part for part in parts if part]


def _shipped(name: str) -> str:
    return files("slimtune").joinpath("evaluate/texts", name).read_text(encoding="utf-8")


def _shipped_paragraphs(name: str) -> Callable[[], list[Text]]:
    return lambda: paragraphs(_shipped(name), name)


def _shipped_pairs(name: str) -> Callable[[], list[Text]]:
    return lambda: [Pair.model_validate(json.loads(line)) for line in _shipped(name).splitlines()]


def _arithmetic() -> list[Text]:
    """Word problems with two numbers, worked out in the answer."""
    # Drawn by Python's generator, whose sequence for a seed is the same in all versions.
    rng = random.Random(0)
    problems: list[Text] = []
    for number in range(_PROBLEMS):
        a, b = rng.randint(12, 99), rng.randint(2, 11)
        question, answer = _PROBLEM_KINDS[number % len(_PROBLEM_KINDS)](a, b)
        problems.append(Pair(prompt=question, completion=answer))
    return problems


_PROBLEM_KINDS: tuple[Callable[[int, int], tuple[str, str]], ...] = (
    lambda a, b: (f"What is {a} plus {b}?", f"{a} + {b} = {a + b}"),
    lambda a, b: (f"What is {a} minus {b}?", f"{a} - {b} = {a - b}"),
    lambda a, b: (f"What is {a} times {b}?", f"{a} * {b} = {a * b}"),
    lambda a, b: (f"What is {a * b} divided by {b}?", f"{a * b} / {b} = {a}"),
    lambda a, b: (
        f"A box holds {a} pencils. How many pencils are in {b} boxes?",
        f"{b} boxes hold {b} * {a} = {a * b} pencils.",
    ),
    lambda a, b: (
        f"Anna has {a} stamps and gives {b} of them away. How many has she left?",
        f"She has {a} - {b} = {a - b} stamps left.",
    ),
)


def _code() -> list[Text]:
    """The first two functions of each module that are neither trivial nor long."""
    functions_read: list[Text] = []
    try:
        for name in MODULES:
            source = inspect.getsource(importlib.import_module(name))
            lines = source.splitlines()
            functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
            # Source lines and not `ast.unparse`, which drops the comments that are half of a code's text.
            code = [lines[function.lineno - 1 : function.end_lineno] for function in functions]
            functions_read += ["\n".join(own) for own in code if len(own) in FUNCTION_LINES][:2]
    except (OSError, TypeError) as error:
        raise DataError(
            f"the source of Python's standard library isn't installed here ({error}); leave the domain 'code' out"
        ) from error
    return functions_read


DOMAINS: dict[str, Callable[[], list[Text]]] = {
    "prose": _shipped_paragraphs("prose.txt"),
    "facts": _shipped_pairs("facts.jsonl"),
    "arithmetic": _arithmetic,
    "code": _code,
    "chat": _shipped_pairs("chat.jsonl"),
    "german": _shipped_paragraphs("german.txt"),
}
"""What reads each domain's texts."""
