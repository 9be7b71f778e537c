"""The commands of the docs' pages as a reader types them, and the files that are there when they do.

A page goes on from where the README's command line ends: `orders/` and `my-adapter` are there, unless it makes orders
of its own. What else a command reads, an earlier one of the page has made, or a block that begins with its name, as
`# judge.py`, or one of another page that it says to come after: `<!-- after: tasks.md -->`. Above a block that can't
run on any machine stands `<!-- needs: WHAT -->`; its commands are parsed like all others.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from slimtune.cli import app
from slimtune.recipe.recipe import Recipe
from slimtune.recipe.shipped import text_of
from slimtune.storage.source import CLASSIC, PACKAGED
from slimtune.storage.text_files import parse as parse_yaml

DOCS = Path(__file__).parents[1] / "docs"
FROM_README = ("orders", "my-adapter")
"""Folders that the commands of the README leave."""
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL
)
HEREDOC = re.compile(r"^(cat > \S+ <<'END'\n.*?^END)\n", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"[\w.]+=.*", re.DOTALL)
OUTPUTS = ("output", "plot", "answers", "keys")
"""Options that name a file or a folder to write."""


@dataclass(frozen=True)
class Step:
    """One thing that a reader does: type a command, or save a file.

    Attributes:
        text: the command, or the text of the file.
        file: the name under which it is saved; empty for a command.
        needs: what has to be there that isn't on any machine; empty for none.
    """

    text: str
    file: str = ""
    needs: str = ""

    @property
    def words(self) -> list[str]:
        """The arguments of a command of slimtune; empty for another program's."""
        command, _, _ = self.text.partition(" > ")
        words = shlex.split(command, comments=True) if not self.file else []
        return words[1:] if words[:1] == ["slimtune"] else []


def paths() -> list[Path]:
    """The pages that have commands; decisions and reports have none."""
    pages = [path for path in DOCS.rglob("*.md") if path.parent.name not in ("adr", "report", "report-classifier")]
    return sorted(path for path in pages if any(step.words for step in steps(path)))


def story(page: Path) -> list[Step]:
    """The steps of a page behind those of the pages that it comes after."""
    before = re.findall(r"^<!-- after: (\S+) -->$", page.read_text(), re.MULTILINE)
    return [step for path in (*(DOCS / name for name in before), page) for step in steps(path)]


def steps(page: Path) -> Iterator[Step]:
    """What a reader of a page does from top to bottom."""
    for block in BLOCK.finditer(page.read_text()):
        language, body, needs = block["language"], block["body"], block["needs"] or ""
        if named := re.match(r"# ([\w-]+\.(?:py|yaml))\n", body):
            yield Step(body, named[1], needs)
        elif language in ("", "shell"):
            while body:
                if here := HEREDOC.match(body):
                    yield Step(here[1], needs=needs)
                    body = body[here.end() :]
                    continue
                line, _, body = re.sub(r"\\\n\s*", " ", body, count=0).partition("\n")
                if line.startswith(("slimtune ", "printf ", "cat ", "python ", "pip ", "mv ")):
                    yield Step(line, needs=needs)


class Desk:
    """What is there when a command is typed.

    Attributes:
        made: files and folders.
        recipes: the folders that recipes write, by the recipe's file.
    """

    def __init__(self, told: list[Step]) -> None:
        makes_orders = any(step.words[:1] == ["demo-data"] for step in told)
        self.made = set(FROM_README) - ({"orders"} if makes_orders else set())
        self.recipes: dict[str, str] = {}

    def has(self, name: str) -> bool:
        """Whether a name is that of a file or folder that was made, or of something inside of such a folder."""
        return any(name == made or name.startswith(f"{made}/") for made in self.made)

    def take(self, step: Step) -> str:
        """Note what a step makes; what is wrong with it, in words, or an empty text."""
        if step.file:
            self.made.add(step.file)
            return ""
        self.made |= set(re.findall(r" > (\S+)", step.text))
        if not step.words:
            return ""
        name, given, problem = parsed(step.words)
        if problem:
            return problem
        missing = [word for word in inputs(name, given) if not (step.needs or self.has(word))]
        self._note(name, given, step.words)
        return f"reads {', '.join(missing)}, which nothing before it on the page makes" if missing else ""

    def _note(self, name: str, given: dict[str, Any], words: list[str]) -> None:
        self.made |= {str(given[option]) for option in OUTPUTS if given.get(option)}
        if name == "recipe init":
            self.made.add(str(given["path"]))
            self.recipes[str(given["path"])] = parse_yaml(text_of(given["purpose"]))["output"]
        if name in ("train", "compare") and not given.get("output"):
            own = [word.partition("=")[2] for word in words if word.startswith("output=")]
            source = str(given.get("source", given.get("recipe")))
            self.made |= {*(own or [self.recipes.get(source, f"{source}'s output")])}


def parsed(words: list[str]) -> tuple[str, dict[str, Any], str]:
    """The command's name, its parameters as the real parser reads them, and what it says of a mistake."""
    group, read = recording()
    read.clear()
    try:
        group.main(words, prog_name="slimtune", standalone_mode=False)
    except Exception as error:
        return "", {}, f"{type(error).__name__}: {getattr(error, 'message', error)}"
    return (*read[0], "") if read else ("", {}, "no command was reached")


@functools.cache
def recording() -> tuple[Any, list[tuple[str, dict[str, Any]]]]:
    """The command line with its real parser, whose commands do nothing but note their name and what they were given."""
    group: Any = typer.main.get_command(app)
    read: list[tuple[str, dict[str, Any]]] = []

    def stand_in(command: Any, name: str) -> None:
        for sub, part in getattr(command, "commands", {}).items():
            stand_in(part, f"{name} {sub}".strip())
        if not hasattr(command, "commands"):
            getattr(command, "whole", command).callback = lambda **given: read.append((name, given))

    stand_in(group, "")
    return group, read


def inputs(name: str, given: dict[str, Any]) -> list[str]:
    """What a command reads: files, folders of models and adapters; not names of the Hub and of packages."""
    found = []
    for option, value in given.items():
        for word in value if isinstance(value, list | tuple) else [value]:
            text = str(word)
            is_name = (name, option) in NAMES or (name == "slim" and given["example"])
            if word is None or option in OUTPUTS or is_name:
                continue
            is_setting = bool(SETTING.fullmatch(text)) and "/" not in text.partition("=")[0]
            if is_setting and option in ("rest", "overrides"):
                check_setting(text)
                found += re.findall(r"[\w./-]+\.(?:jsonl|csv|yaml|txt)", text.partition("=")[2])
            elif (option in MODELS and text not in (*PACKAGED, *CLASSIC)) or is_file(text):
                found.append(text.partition(".py:")[0] + ".py" if ".py:" in text else text.rpartition("=")[2])
    return found


NAMES = (
    ("recipe init", "path"),
    ("plan", "base"),
    ("recipe show", "name"),
    ("serve-key", "adapter"),
    ("studio", "folder"),
)
"""Parameters that look like files or models and are made, or are names of other things."""

MODELS = ("model", "adapter", "source", "tuned", "base", "student", "teacher", "folder", "against", "recipe")
"""Parameters that take the folder of a model, of an adapter, or a recipe."""


def is_file(text: str) -> bool:
    """Whether a word is a file of data, code or settings by its looks."""
    return bool(re.fullmatch(r"[\w./-]+\.(?:jsonl|json|csv|yaml|yml|txt|py(?::.*)?)", text))


def check_setting(text: str) -> None:
    """Raises: AssertionError, for a setting of no section or of a key that its section hasn't."""
    section, _, key = text.partition("=")[0].partition(".")
    sections = Recipe.sections()
    assert section in (*sections, "task", "output", "method"), text
    if section in sections and section != "method" and key:
        assert key.partition(".")[0] in sections[section].__dataclass_fields__, text
