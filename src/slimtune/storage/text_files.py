"""JSON that others wrote: as long and as deep as such files are, and no more."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import ConfigError, did_you_mean, first_line

MOST_BYTES = 2**26
"""Indexes of the largest models have some megabytes."""


def open_file(path: str | os.PathLike[str]) -> Any:
    """The bytes of a file. Raises: OSError, for a pipe or a device too, which has no end or makes the reader wait."""
    # A pipe that nobody writes to would wait in `open` already.
    if Path(path).exists() and not Path(path).is_dir() and not Path(path).is_file():
        raise OSError(None, "it is a pipe or a device, not a file; write what it gives into a file", os.fspath(path))
    return Path(path).open("rb")


def read_json(path: Path) -> Any:
    """The value in a file. Raises: OSError; ValueError, for what is not JSON, too long or nested too deeply."""
    return parse_json(_read(path, MOST_BYTES))


def read_text(path: Path) -> str:
    """The text in a file. Raises: OSError; ValueError, for what is not UTF-8 or too long."""
    return _read(path, MAX_BYTES).decode("utf-8")


def _read(path: Path, most: int) -> bytes:
    with open_file(path) as file:
        # One more than allowed tells a longer file, without `stat`: a file may grow meanwhile.
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises: ValueError, for what is not JSON or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


MAX_BYTES = 1_000_000
"""No recipe or template is longer; a few lines of aliases can stand for gigabytes, so those are refused altogether."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses aliases and keys that come twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases. Raises: yaml.YAMLError."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not taken", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping in which no key comes twice. Raises: yaml.YAMLError."""
        names = [str(key.value) for key, _ in node.value]
        twice = next((index for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            mark = node.value[twice][0].start_mark
            raise yaml.MarkedYAMLError(problem=f"the key '{names[twice]}' is there twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number or a switch."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that occurs twice twice."""
        return True


# Floats as YAML 1.2 has them (1e-4 is one), and no dates: a folder may be called 2026-01-31.
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] in ("null", "bool", "int", "merge")]
        for first, pairs in _kind.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
# No numbers to the base of sixty: a pattern is called 2:4. What writes still quotes such texts, for other readers.
_INT = re.compile(r"^[-+]?(0b[01_]+|0[0-7_]*|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _INT if tag.endswith(":int") else pattern) for tag, pattern in pairs]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def parse(text: str) -> Any:
    """The value that a YAML text stands for; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def is_yaml(name: str) -> bool:
    """Whether this names a YAML file."""
    return Path(name).suffix.lower() in (".yaml", ".yml")


def read_mapping(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping that a YAML file holds; raises ConfigError with the line at fault."""
    try:
        value = parse(read_text(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"the {what} {path}{where} is not YAML: {error.problem}; correct it") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the {what} {path} is not YAML text ({first_line(error)}); pass a YAML file") from error
    except OSError as error:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        otherwise = "; write one with slimtune recipe init" if what == "recipe" else "; check its name"
        advice = did_you_mean(path.name, siblings) or otherwise
        raise ConfigError(f"the {what} {path} can't be read: {error.strerror}{advice}") from error
    if value is None:
        raise ConfigError(f"the {what} {path} is empty; slimtune recipe init writes one to begin with")
    if not isinstance(value, dict):
        raise ConfigError(f"the {what} {path} is a {type(value).__name__}, not sections with settings in them")
    return value


def dump(value: Any) -> str:
    """A value as YAML that `parse` reads back, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
