"""What files and models say is shown as text: on consoles of rich, on plain lines, in JSON and in logs."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from slimtune.console.failures import sentence_of
from slimtune.console.noise import set_up_logging
from slimtune.console.screen import finite, one_line, open_screen, plain_table, print_json, printable, say
from slimtune.errors import ConfigError

SOURCE = Path(__file__).parents[2] / "src/slimtune"
EVIL = "a\x1b[31mb\x07\x9b2Jc\u202ed\u2066e\u2028f\x7f"
SHOWN = r"a\x1b[31mb\x07\x9b2Jc\u202ed\u2066e\u2028f\x7f"


def test_what_steers_a_terminal_is_shown_and_the_rest_stays() -> None:
    assert printable(EVIL) == SHOWN
    plain = (
        "two\tcolumns\nand lines, na\u00efve \U0001f469\u200d\U0001f4bb \u0645\u06cc\u200c\u062e\u0648 \u3000 [red]x[/]"
    )
    assert printable(plain) == plain
    assert one_line("a\nb\tc\rd") == r"a\nb\tc\rd"
    assert printable(printable(EVIL)) == SHOWN


def test_everything_on_a_console_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    screen = open_screen()
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    screen.print(EVIL, markup=False)
    screen.print(f"[bold]{EVIL}[/]")
    screen.print(table, plain_table([(EVIL, EVIL)]), soft_wrap=False)
    screen.rule(EVIL)
    with screen.status(EVIL):
        pass
    say(EVIL)
    say(EVIL, to_errors=True)
    print_json({"a": EVIL})
    written = capsys.readouterr()
    for text in (written.out, written.err):
        assert SHOWN in text
        assert not set(text) & set("\x1b\x07\x9b\u202e\u2066\u2028\x7f")


def test_colours_of_our_own_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    open_screen().print("[red]a\x1b[2Jb[/]")
    assert capsys.readouterr().out == "\x1b[31ma\\x1b[2Jb\x1b[0m\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_is_json(value: float, capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [value, 1.5, (value,)], "b": {"c": value}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None]],
        "b": {"c": None},
    }
    assert finite(True) is True


def test_logs_and_warnings_are_text(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        set_up_logging()
        logging.getLogger("a.library").warning("tensor %s is \x1b[1mnot\x1b[0m there", "w\x1b]0;x\x07")
    finally:
        logging.setLogRecordFactory(before)
        logging.captureWarnings(False)
    assert [record.getMessage() for record in caplog.records] == [r"tensor w\x1b]0;x\x07 is not there"]


def named(kind: type[Exception], name: str) -> Exception:
    return type(name, (kind,), {})("CUDA out of memory")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("no tensor 'a\nb\x1b[0m'; look"), r"no tensor 'a\nb\x1b[0m'; look"),
        (ConfigError(), "ConfigError"),
        (MemoryError(), "main memory ran out"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "main",
        ),
        (RuntimeError("can't start new thread"), "main memory ran out"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "main memory ran out"),
        (named(RuntimeError, "OutOfMemoryError"), "the device has not enough memory"),
        (FileNotFoundError(2, "No such file", "a\x1bb"), r"a\x1bb: No such file"),
    ],
)
def test_failures_are_sentences(error: Exception, said: str) -> None:
    sentence = sentence_of(error)
    assert sentence is not None
    assert sentence.startswith(said)
    assert "\n" not in sentence


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), KeyError("y")])
def test_errors_of_slimtune_itself_keep_their_traceback(error: Exception) -> None:
    assert sentence_of(error) is None


def calls(path: Path) -> set[str]:
    """The names of functions that a file calls, and those of classes."""
    nodes: list[Any] = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {node.id for node in nodes if isinstance(node, ast.Name)}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_is_printed_past_the_boundary(path: Path) -> None:
    allowed = {
        "console/screen.py": {"print", "Console"},
        # peft's method of this name prints; a log is a file.
        "adapters/model.py": {"print"},
        "compare/process.py": {"print"},
    }
    assert calls(path) & {"print", "Console"} <= allowed.get(str(path.relative_to(SOURCE)), set())
