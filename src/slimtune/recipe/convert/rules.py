"""What becomes of another tool's key, and the sections of a recipe that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slimtune.errors import ConfigError, did_you_mean

OFF = (None, False, "", 0, "none", "None", [], {})
"""Values with which a key asks for nothing."""


@dataclass(frozen=True)
class Rule:
    """What becomes of a key.

    Attributes:
        place: of the value in a recipe, such as training.epochs.
        read: makes their value ours; raises ConfigError for one that has no counterpart.
        without_effect: why it changes nothing here.
        refused: why it can't be had, unless its value is one of `neutral`.
        kinds: of which its value must be, or empty; for keys that are looked at together.
    """

    place: str = ""
    read: Callable[[Any], Any] = lambda value: value
    without_effect: str = ""
    refused: str = ""
    neutral: tuple[Any, ...] = OFF
    kinds: tuple[type, ...] = ()


def to(place: str, read: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The value goes to a place in the recipe."""
    return Rule(place, read)


def idle(why: str) -> Rule:
    """The value changes nothing here."""
    return Rule(without_effect=why)


def refused(why: str, *neutral: Any) -> Rule:
    """The value would change the result, unless it is off or one of `neutral`."""
    return Rule(refused=why, neutral=(*OFF, *neutral))


def by_hand(*kinds: type) -> Rule:
    """For keys that are looked at together, where that has not said more of them."""
    return Rule(without_effect="beside the other keys it changes nothing", kinds=kinds)


def each(rule: Rule, *names: str) -> dict[str, Rule]:
    """The same for several keys."""
    return dict.fromkeys(names, rule)


@dataclass
class Imported:
    """A recipe made of another tool's file.

    Attributes:
        sections: of the recipe.
        translated: their keys, and where each went.
        without_effect: their keys that change nothing here, and why.
        different: what is not quite the same here.
        refused: their keys that would change the result and have no counterpart, and why.
    """

    tool: str
    sections: dict[str, Any] = field(default_factory=dict)
    translated: dict[str, str] = field(default_factory=dict)
    without_effect: dict[str, str] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def put(self, place: str, value: Any, *keys: str) -> None:
        """Set a value of the recipe, which comes from these keys."""
        inner = self.sections
        *sections, last = place.split(".")
        for name in sections:
            inner = inner.setdefault(name, {})
        inner[last] = value
        self.translated |= dict.fromkeys(keys, place)

    def switch(self, values: Mapping[str, Any], key: str, place: str, value: Any) -> bool:
        """Set a value of the recipe if the key is on; says whether it is."""
        if taken(values, key):
            self.put(place, value, key)
        elif key in values:
            self.without_effect[key] = "it is off"
        return bool(taken(values, key))

    def apply_rules(self, values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
        """Apply the rule of each key that isn't dealt with yet."""
        for key, value in values.items():
            if key in self.translated or key in self.without_effect or key in self.refused:
                continue
            rule = rules.get(key)
            if rule is None:
                near = did_you_mean(key, rules)
                # Refused and not passed over: a key of a newer version may change anything.
                self.refused[key] = f"{self.tool} has no such key that is known here{near}"
            elif value is None or value == "":
                self.without_effect[key] = "it is empty"
            else:
                self._apply(rule, key, value)

    def _apply(self, rule: Rule, key: str, value: Any) -> None:
        if rule.without_effect:
            self.without_effect[key] = rule.without_effect
        elif rule.refused:
            # With the type: 0 == False and 1 == True in Python, and in these files they are different answers.
            is_neutral = any(value is one or (type(value) is type(one) and value == one) for one in rule.neutral)
            reasons = self.without_effect if is_neutral else self.refused
            reasons[key] = "as here" if is_neutral else rule.refused
        else:
            try:
                self.put(rule.place, rule.read(value), key)
            except (ConfigError, TypeError, ValueError) as error:
                self.refused[key] = str(error)

    def done(self) -> Imported:
        """Return itself; raises ConfigError with every key that was refused."""
        if self.refused:
            why = "; ".join(f"{key}: {reason}" for key, reason in self.refused.items())
            count = f"{len(self.refused)} keys" if len(self.refused) > 1 else "one key"
            raise ConfigError(f"{count} of this {self.tool} file would change the result and can't be had here: {why}")
        return self


def one_of(names: Mapping[str, str] | tuple[str, ...], what: str) -> Callable[[Any], str]:
    """Reads a name that is known under the same or another name; raises ConfigError."""
    known = dict(names) if isinstance(names, Mapping) else {name: name for name in names}

    def read(value: Any) -> str:
        if value not in known:
            raise ConfigError(f"there is no {what} '{value}' here{did_you_mean(str(value), known)}")
        return known[value]

    return read


def taken(values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A value; an empty one counts as not given."""
    value = values.get(key)
    return default if value is None or value == "" else value


def check_kinds(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raises: ConfigError, for a value of another kind than its key takes."""
    for key, value in values.items():
        kinds = rules[key].kinds if key in rules else ()
        # `bool` is an `int` to isinstance: "lora_rank: true" would be a rank of 1.
        is_right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)) if kinds else True
        if not is_right and value is not None and value != "":
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise ConfigError(f"{key} takes {wanted}, found {value!r}")


def given(values: Mapping[str, Any], *keys: str) -> list[str]:
    """Those of the keys that are there."""
    return [key for key in keys if key in values]


def names(value: Any) -> list[str]:
    """Names from a list, or from a text with commas; raises ConfigError."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise ConfigError(f"names are a list, or a text with commas between them, found {value!r}")
    return [str(part).strip() for part in parts if str(part).strip()]


def with_fields(kind: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The format of a source, with those of its columns that are called otherwise."""
    renamed = {ours: theirs for ours, theirs in fields.items() if ours != theirs}
    return {"format": kind, **({"fields": renamed} if renamed else {})}
