"""How many small faults the tests see: `python -m benchmarks.mutation --work DIR`.

A mutant is the library with one expression or statement changed: a comparison turned, a term's sign, a number, a call
or a `raise` left out. A sample is drawn at random from all that can be made in each room, and each runs against the
tests that run its line when nothing is changed, quickest first. What no test fails on has survived, and what no test
runs counts as survived too. All of it happens in a copy of the tree in DIR; what DIR holds already isn't done again.

It wants `coverage`, which is not among the packages of `.[dev]`: `pip install coverage`.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "adapters", "fused", "storage", "data", "plan")
TESTS = ("core", "storage", "fused", "data", "plan", "adapters", "methods", "parity", "quantization", "cli")
"""The folders of tests that run, the short ones first."""
BUDGET = 12.0
"""Seconds that the tests of one mutant took together when nothing was changed."""
PROCESSOR = 90
"""Seconds of the processor after which a mutant has hung, which its tests would show."""
RECORD = 150
"""The same for a file of tests that runs once, with its lines noted; one that takes longer is left out."""
BYTES = 12 * 2**30
"""Of address space for the tests of one mutant."""

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.MatMult: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the text that stands at bytes `start` to `end` becomes `text`."""

    room: str
    file: str
    kind: str
    line: int
    lines: tuple[int, ...]
    """Lines of which one has to run for the change to be seen; none for what runs when the file is imported."""
    start: int
    end: int
    text: str


def mutants(room: str, root: Path) -> list[Mutant]:
    """All mutants of a room, in the order of the sources."""
    made = []
    for path in sorted((root / "src/slimtune" / room).rglob("*.py")):
        source = path.read_bytes()
        offsets = [0]
        for line in source.splitlines(keepends=True):
            offsets.append(offsets[-1] + len(line))
        for node, lines in _nodes(ast.parse(source), ()):
            for kind, text in _changes(node):
                start = offsets[node.lineno - 1] + node.col_offset
                end = offsets[node.end_lineno - 1] + node.end_col_offset
                file = path.relative_to(root).as_posix()
                made.append(Mutant(room, file, kind, node.lineno, lines or (), start, end, text))
    return made


def _nodes(parent: ast.AST, lines: tuple[int, ...]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Nodes that can be changed, with the lines that run with them: of a signature those of the body."""
    for name, value in ast.iter_fields(parent):
        # Types change nothing when the code runs; positions within an f-string are known from Python 3.12 on.
        if name in ("annotation", "returns", "decorator_list") or isinstance(parent, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if is_docstring or is_for_types or _is_alias(child):
                continue
            inner = lines
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                body = child.body if isinstance(child.body, list) else [child.body]
                inner = tuple(
                    sorted({node.lineno for part in body for node in ast.walk(part) if hasattr(node, "lineno")})
                )
            elif isinstance(child, ast.stmt) and lines:
                inner = tuple(range(child.lineno, (child.end_lineno or child.lineno) + 1))
                if isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try):
                    inner = tuple(range(child.lineno, child.body[0].lineno))
            yield child, inner
            yield from _nodes(child, inner)


def _is_alias(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) and "Literal" in ast.dump(node.value)


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What may stand in the place of a node: the kind of change and the text."""
    swapped = copy.copy(node)
    match node, swapped:
        case ast.Compare(ops=[op, *rest]), ast.Compare():
            swapped.ops = [SWAPS[type(op)](), *rest]
            yield "comparison", f"({ast.unparse(swapped)})"
        case (ast.BoolOp(op=op), ast.BoolOp()) | (ast.BinOp(op=op), ast.BinOp()):
            is_text = isinstance(node, ast.BinOp) and any(isinstance(v, ast.JoinedStr) for v in (node.left, node.right))
            if type(op) in SWAPS and not is_text:
                swapped.op = SWAPS[type(op)]()
                yield "and, or" if isinstance(node, ast.BoolOp) else "arithmetic", f"({ast.unparse(swapped)})"
        case ast.AugAssign(op=op), ast.AugAssign():
            if type(op) in SWAPS:
                swapped.op = SWAPS[type(op)]()
                yield "arithmetic", ast.unparse(swapped)
        case ast.UnaryOp(op=ast.Not()), _:
            yield "negation", f"({ast.unparse(node.operand)})"
        case ast.IfExp(), ast.IfExp():
            swapped.body, swapped.orelse = node.orelse, node.body
            yield "branches", f"({ast.unparse(swapped)})"
        case ast.Constant(value=bool()), _:
            yield "constant", str(not node.value)
        case ast.Constant(value=int() | float()), _:
            yield "constant", repr(node.value + 1 if isinstance(node.value, int) else node.value * 2)
        case ast.Return(value=ast.expr() as value), _:
            if not isinstance(value, ast.Constant):
                yield "returned", "return None"
        case (ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue() | ast.Delete() | ast.Break(), _):
            yield "left out", "pass"


def drawn(root: Path, count: int, seed: int) -> list[Mutant]:
    """The same number from each room, each kind of change alike where a room has enough of it."""
    chosen = []
    for room in ROOMS:
        draw = random.Random(f"{seed} {room}")
        kinds: dict[str, list[Mutant]] = {}
        for mutant in mutants(room, root):
            kinds.setdefault(mutant.kind, []).append(mutant)
        for pool in kinds.values():
            draw.shuffle(pool)
        # Numbers and returns are most of what can be changed, and would be most of the sample.
        turns = sorted(kinds)
        while len(chosen) % count or not chosen or chosen[-1].room != room:
            kind = turns.pop(0)
            if kinds[kind]:
                chosen.append(kinds[kind].pop())
                turns.append(kind)
    return chosen


class Recorder:
    """A plugin of pytest: which lines of the rooms each test runs, how long it takes and whether it passes."""

    def __init__(self, root: Path) -> None:
        import coverage

        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[str(root / "src/slimtune" / room / "*") for room in ROOMS]
        )
        self.took: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.start()
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self.coverage.stop()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration
        if not report.passed:
            self.failed.add(report.nodeid)

    def found(self, root: Path) -> dict[str, Any]:
        data = self.coverage.get_data()
        lines: dict[str, dict[int, list[str]]] = {}
        for file in data.measured_files():
            by_line = data.contexts_by_lineno(file)
            lines[Path(file).relative_to(root).as_posix()] = {
                line: sorted(set(contexts) - {"", *self.failed}) for line, contexts in by_line.items()
            }
        return {"took": self.took, "failed": sorted(self.failed), "lines": lines}


def in_child(work: Any, log: Path, seconds: float | None = None) -> int:
    """Run a function in a process forked from this one; its exit code, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if seconds:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os._exit(work())
    end = time.monotonic() + (10 * seconds if seconds else 10**6)
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGXCPU


def pytest_in(arguments: list[str], plugins: list[Any]) -> int:
    import pytest

    return int(pytest.main([*arguments, "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line"], plugins))


def record(tree: Path, path: Path, output: Path) -> int:
    """Run the tests of a file once and write down which lines each runs."""
    recorder = Recorder(tree)
    pytest_in([str(path)], [recorder])
    output.write_text(json.dumps(recorder.found(tree)))
    return 0


def tests_for(mutant: Mutant, records: list[Mapping[str, Any]]) -> list[str]:
    """The tests that run a mutant's lines, quickest first, as many as there is time for."""
    took: dict[str, float] = {}
    for known in records:
        lines = known["lines"].get(mutant.file, {})
        wanted = map(str, mutant.lines) if mutant.lines else lines
        for test in {test for line in wanted for test in lines.get(line, ())}:
            took[test] = known["took"][test]
    chosen, total = [], 0.0
    for test in sorted(took, key=lambda test: took[test]):
        total += took[test]
        if chosen and (total > BUDGET or len(chosen) == 200):
            break
        chosen.append(test)
    return chosen


def outcome(mutant: Mutant, tree: Path, tests: list[str], log: Path) -> str:
    """What the tests say of a mutant."""
    if not tests:
        return "not run"
    path = tree / mutant.file
    whole = path.read_bytes()
    path.write_bytes(whole[: mutant.start] + mutant.text.encode() + whole[mutant.end :])
    try:
        code = in_child(lambda: pytest_in(["-x", *tests], []), log, PROCESSOR)
    finally:
        path.write_bytes(whole)
    return "survived" if code == 0 else "hung" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "killed"


def main() -> None:
    """Draw, run and print the rate of each room."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder for the copy and for what is measured")
    parser.add_argument("--count", type=int, default=30, help="mutants of each room")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--rooms", nargs="+", default=ROOMS, choices=ROOMS, help="these alone")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="folders of tests that run")
    options = parser.parse_args()
    tree, results = options.work.resolve() / "tree", options.work / "results.jsonl"
    if not tree.exists():
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        for name in filter(None, files.decode().split("\0")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    # The file that is changed is put back when this is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = [each for each in drawn(tree, options.count, options.seed) if each.room in options.rooms]
    prepare(tree)
    records = []
    for path in (path for folder in options.tests for path in sorted((tree / "tests" / folder).glob("test_*.py"))):
        output = options.work.resolve() / "lines" / f"{path.parent.name}-{path.stem}.json"
        output.parent.mkdir(exist_ok=True)
        if not output.exists():
            in_child(lambda path=path, output=output: record(tree, path, output), options.work / "record.log", RECORD)
        if not output.exists():
            output.write_text(json.dumps({"took": {}, "failed": [], "lines": {}}))
        records.append(json.loads(output.read_text()))
        counts = len(records[-1]["took"]), len(records[-1]["failed"])
        print(f"{path.parent.name}/{path.name}: {counts[0]} tests, {counts[1]} not passed", flush=True)
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(each["file"], each["start"], each["text"]) for each in done}
    for mutant in chosen:
        if (mutant.file, mutant.start, mutant.text) in known:
            continue
        tests = tests_for(mutant, records)
        result = outcome(mutant, tree, tests, options.work.resolve() / "mutant.log")
        done.append({**asdict(mutant), "tests": len(tests), "result": result})
        with results.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"{result:9} {mutant.file}:{mutant.line} {mutant.kind}: {mutant.text[:80]!r}", flush=True)
    print(f"\nseed {options.seed}")
    for room in options.rooms:
        counts = Counter(result["result"] for result in done if result["room"] == room)
        print(f"{room:9}" + ", ".join(f"{count} {name}" for name, count in counts.most_common()))


def prepare(tree: Path) -> None:
    """Import what all tests import, but for the library: each mutant's process begins with it."""
    os.chdir(tree)
    os.environ["PYTHONPATH"] = f"{tree / 'src'}"
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree / "src"), *(part for part in sys.path if Path(part or ".").resolve() != ROOT)]
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    assert "slimtune" not in sys.modules


if __name__ == "__main__":
    main()
