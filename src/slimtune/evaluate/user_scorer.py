"""A user's own function as a scorer: the file is run, because it was asked for by name."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError, did_you_mean
from slimtune.evaluate.tasks import Question


def load_scorer(spec: str) -> Callable[[str, Question], dict[str, float]]:
    """The scorer that `path.py:function` names, called as `function(answer, expected)` or with the turns as a third.

    It returns a number, of which more is better, or true or false.

    Raises:
        ConfigError: the file or the function isn't there, doesn't run, or returns no number.
    """
    path, _, name = spec.rpartition(":")
    function = function_of(Path(path), name, "scorer")
    takes_turns = _positional(function, spec) == 3

    def score(answer: str, question: Question) -> dict[str, float]:
        arguments = (answer, question.expected, question.turns) if takes_turns else (answer, question.expected)
        try:
            value = function(*arguments)
        except Exception as error:
            raise ConfigError(
                f"the scorer {spec} raised {type(error).__name__}: {error} for the answer {answer!r} to "
                f"{question.user_text!r}; mend it"
            ) from error
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(
                f"the scorer {spec} returned {value!r} for the answer {answer!r} to {question.user_text!r}, "
                f"which is no finite number; return a number, or true or false"
            )
        return {name: float(value)}

    return score


def function_of(path: Path, name: str, role: str) -> Callable[..., Any]:
    """A function of a user's file, which is run for it; raises ConfigError if it isn't there or doesn't run.

    Args:
        role: what it is wanted as, for complaints.
    """
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = did_you_mean(path.name, siblings) or "; pass path.py:function"
        raise ConfigError(f"no file {path} with a {role}{near}")
    spec = importlib.util.spec_from_file_location(f"slimtune_user_{role}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and the like look their own module up.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"the {role}'s file {path} can't be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        there = f"found {', '.join(functions)}" if functions else "found none"
        raise ConfigError(f"{path} has no function '{name}', {there}{did_you_mean(name, functions)}")
    return function


def _positional(function: Callable[..., Any], spec: str) -> int:
    """How many arguments the function takes, 2 or 3."""
    # Tried by `bind`, which knows defaults, *args and keyword-only arguments.
    for arguments in (("answer", "expected"), ("answer", "expected", [])):
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError:
            continue
        return len(arguments)
    raise ConfigError(
        f"the scorer {spec} must take (answer, expected) or (answer, expected, turns), "
        f"but is {function.__name__}{inspect.signature(function)}"
    )
