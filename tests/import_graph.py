"""The import graph of `src`, read from the sources: imports inside of functions and for type checkers count too.

`python tests/import_graph.py` prints how the house stands: files, lines, comments, floors, circles, the rooms' arrows.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"

FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(rooms.split())
    for rooms in (
        "errors", "console metrics ops storage", "core", "bases methods", "fused quantization", "adapters", "models",
        "data engine export", "evaluate", "recipe", "train", "plan", "pipeline", "compare serve", "slim", "studio",
        "__init__", "cli", "__main__",
    )
)  # fmt: skip
"""The rooms from the ground up. A room imports from floors below its own: never upwards, never its neighbour."""

Graph = Mapping[str, frozenset[str]]


@cache
def files() -> dict[str, Path]:
    """The source files by module name; a package goes by the name of its folder."""
    paths = sorted(SOURCE.rglob("slimtune/**/*.py"))
    return {".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


@cache
def graph() -> Graph:
    """The modules that each module imports."""
    return {name: frozenset(imported(path.read_text(), set(files())) - {name}) for name, path in files().items()}


def imported(source: str, modules: set[str]) -> set[str]:
    """Those of `modules` that a source imports anywhere. Raises: ValueError, for a relative import."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: imports are absolute here")
            parent = str(node.module)
            # A name is a module of the package, or else something that the package itself defines.
            names |= {f"{parent}.{n.name}" if f"{parent}.{n.name}" in modules else parent for n in node.names}
    return names & modules


def room_of(module: str) -> str:
    """The folder of a module below `slimtune`, or the file itself where it stands at the root."""
    return module.split(".")[1] if "." in module else "__init__"


def floor_of(module: str) -> int:
    """The number of the floor that a module's room is on."""
    return next(number for number, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def circles(of: Graph) -> list[list[str]]:
    """Loops of modules that import each other: one of each tangle, none where there is none."""
    rest, loops = dict(of), []
    while True:
        try:
            TopologicalSorter(rest).prepare()
        except CycleError as error:
            loop = list(dict.fromkeys(error.args[1]))
            loops.append(loop)
            rest = {name: known - set(loop) for name, known in rest.items() if name not in loop}
        else:
            return loops


def height(of: Graph) -> int:
    """The length of the longest chain of imports, which has no circle."""
    heights: dict[str, int] = {}
    for name in TopologicalSorter(of).static_order():
        heights[name] = 1 + max((heights[known] for known in of[name]), default=0)
    return max(heights.values())


def comment_share(paths: list[Path]) -> float:
    """Lines that are a comment, or end in one, among the lines that aren't empty; docstrings are no comments."""
    comments = lines = 0
    for path in paths:
        text = path.read_text()
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        # What tools are told is no comment.
        comments += sum(
            t.type == tokenize.COMMENT and not t.string.startswith(("# noqa", "# type:", "# pyright", "# fmt"))
            for t in tokens
        )
        lines += sum(bool(line.strip()) for line in text.splitlines())
    return comments / lines


def main() -> None:
    """Print the figures."""
    by_room: dict[str, list[Path]] = defaultdict(list)
    for name, path in files().items():
        by_room[room_of(name)].append(path)

    def lines(paths: list[Path]) -> int:
        return sum(len(path.read_text().splitlines()) for path in paths)

    everything = list(files().values())
    print(f"files {len(everything)}, at the root {len(list((SOURCE / 'slimtune').glob('*.py')))}")
    print(f"lines {lines(everything):,}; comments {comment_share(everything):.1%}")
    core = [*chain(*(by_room[room] for room in ("core", "methods", "bases", "adapters"))),
            files()["slimtune.storage.peft_format"]]  # fmt: skip
    print(f"core, methods, bases, adapters and storage/peft_format.py: {lines(core):,} lines")
    loops = circles(graph())
    print(f"circles {len(loops)}" + "".join(f"\n  {' <-> '.join(loop)}" for loop in loops))
    if not loops:
        print(f"longest chain of imports: {height(graph())}")
    for number, rooms in enumerate(FLOORS):
        for room in sorted(rooms & by_room.keys()):
            below = sorted({room_of(k) for n in files() if room_of(n) == room for k in graph()[n]} - {room})
            own = by_room[room]
            print(f"{number:2} {room:12} {len(own):3} files {lines(own):6,} lines {comment_share(own):5.1%}  {below}")


if __name__ == "__main__":
    sys.exit(main())
