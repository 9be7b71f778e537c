"""What pages say, in the languages of their readers: one file a language, all with the same keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.storage.text_files import parse

FOLDER = Path(__file__).with_name("texts")
DEFAULT = "en"


@dataclass(frozen=True)
class Texts:
    """The texts of a language, by `section.key`; called with a key: `t("runs.title")`."""

    language: str
    by_key: Mapping[str, str]

    def __call__(self, key: str, /, **values: Any) -> str:
        """The text of a key with values in its braces. Raises: KeyError, for a key that no language has."""
        return self.by_key[key].format(**values)

    def __contains__(self, key: str) -> bool:
        return key in self.by_key


def load() -> dict[str, Texts]:
    """The texts of all languages, by the language's code."""
    return {
        path.stem: Texts(path.stem, dict(_flat(parse(path.read_text(encoding="utf-8")))))
        for path in sorted(FOLDER.glob("*.yaml"))
    }


def choose(accepted: str, known: Iterable[str]) -> str:
    """The language for a reader, by the header Accept-Language of the browser."""
    wanted: list[tuple[float, str]] = []
    for part in accepted.split(","):
        tag, _, weight = part.partition(";q=")
        try:
            wanted.append((float(weight or 1), tag.strip().lower().partition("-")[0]))
        except ValueError:
            continue
    known = set(known)
    best = [language for _, language in sorted(wanted, key=lambda each: -each[0]) if language in known]
    return best[0] if best else DEFAULT


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), str(value)
