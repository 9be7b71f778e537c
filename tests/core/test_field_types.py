"""Each field of each config, of each wrong type: a sentence that names the field, from the annotations alone."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from damages import VALUES
from slimtune import LoraConfig
from slimtune.core.config import PeftConfig, methods
from slimtune.core.constraint import ConstraintConfig
from slimtune.core.field_types import check_types, fits
from slimtune.errors import ConfigError, SlimtuneError


@pytest.mark.parametrize("peft_type", methods())
def test_every_field_of_every_type_is_taken_or_refused(peft_type: str) -> None:
    config = methods()[peft_type]
    for field in dataclasses.fields(config):
        for value in (*VALUES, [None], {"a": "b"}, {"q_proj": 10**30}):
            try:
                PeftConfig.from_dict({"peft_type": peft_type, field.name: value}).to_dict()
            except SlimtuneError as error:
                assert "\n" not in str(error)  # noqa: PT017 - most values are taken


@pytest.mark.parametrize(
    ("value", "hint", "is_fitting"),
    [
        (1, int, True), (True, int, False), (1.0, int, False), (1, float, True), (10**400, float, False),
        ("a", list[str], False), (("a",), list[str], True), ({"a"}, list[str], True), ([1], list[str], False),
        ({"a": 1}, dict[str, int], True), ({"a": "1"}, dict[str, int], False), (None, dict[str, int], True),
        (None, int | None, True), ([[0, 1]], list[list[int]], True), ([0, 1], list[list[int]], False),
        (object(), Any, True),
    ],
)  # fmt: skip
def test_what_fits(value: Any, hint: Any, is_fitting: bool) -> None:
    assert fits(value, hint) is is_fitting


@pytest.mark.parametrize("changes", [{"peft_type": "LORA", "modules_to_save": 7}, {"peft_type": "LORA", "r": []}])
def test_the_sentence_names_the_field(changes: dict[str, Any]) -> None:
    name = list(changes)[1]
    with pytest.raises(ConfigError, match=rf"\b{name}\b"):
        PeftConfig.from_dict(changes)


@dataclasses.dataclass
class Settings:
    """Fields of the kinds whose types are told in words."""

    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    names: list[str] | None = None
    share: float = 0.5


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            Settings(ranks={"a": "4"}),
            "ranks must be a mapping of names to a whole number, found {'a': '4'}; correct it",
        ),
        (Settings(options=3), "options must be a mapping, found 3; correct it"),
        (Settings(names=[1]), "names must be a list of text or None, found [1]; correct it"),
        (Settings(share="x" * 58), f"share must be a number, found '{'x' * 58}'; correct it"),
        (Settings(share="x" * 59), f"share must be a number, found '{'x' * 56}...; correct it"),
    ],
)
def test_the_sentence_says_what_the_field_takes(settings: Settings, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_types(settings)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("config", [*(config() for config in methods().values()), LoraConfig(init_lora_weights="eva")])
def test_every_config_is_written_as_json_and_read_as_it_was(config: PeftConfig) -> None:
    again = PeftConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert type(again) is type(config)


def test_the_size_of_a_group_is_written_in_where_there_are_groups() -> None:
    assert ConstraintConfig(num_bits=4).group_size == 64
    assert ConstraintConfig(num_bits=8).group_size is None


@pytest.mark.parametrize("fields", [{}, {"peft_type": ""}, {"peft_type": None}])
def test_a_config_that_names_no_method(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="peft_type must name a method"):
        PeftConfig.from_dict(fields)
