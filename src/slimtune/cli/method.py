"""The method's options of `train` as a configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from slimtune.errors import ConfigError, did_you_mean

METHODS = ("lora", "full")
INITS: dict[str, bool | str] = {"default": True, "random": False, "gaussian": "gaussian"}

SHOWN = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern",
    "alpha_pattern", "modules_to_save", "bias", "init_lora_weights", "use_rslora",
)  # fmt: skip


def lora_config(
    rank: int,
    target_modules: str,
    alpha: float | None = None,
    dropout: float = 0.0,
    exclude_modules: str | None = None,
    layers: str | None = None,
    rank_pattern: Sequence[str] = (),
    alpha_pattern: Sequence[str] = (),
    modules_to_save: str | None = None,
    bias: str = "none",
    init: str = "default",
    use_rslora: bool = False,
) -> Any:
    """The LoraConfig that the options mean; raises ConfigError for a value that can't be."""
    from slimtune import LoraConfig

    if init not in INITS:
        raise ConfigError(f"no initialisation '{init}'; pass one of {', '.join(INITS)}{did_you_mean(init, INITS)}")
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=names_or_regex(target_modules),
        exclude_modules=names_or_regex(exclude_modules),
        layers_to_transform=_numbers(layers),
        rank_pattern={name: int(value) for name, value in _pairs(rank_pattern, "rank-pattern")},
        alpha_pattern=dict(_pairs(alpha_pattern, "alpha-pattern")),
        modules_to_save=_names(modules_to_save),
        bias=bias,
        init_lora_weights=INITS[init],
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )


def names_or_regex(value: str | None) -> list[str] | str | None:
    """`all-linear` and regular expressions as they are, anything else as names between commas."""
    if value is None or value == "all-linear" or re.search(r"[*+?()\[\]|^$\\]", value):
        return value
    return _names(value)


def method_table(name: str, config: Any) -> dict[str, Any]:
    """The method as the model card shows it: the fields that say something."""
    if config is None:
        return {"method": name}
    values = {field: getattr(config, field) for field in SHOWN}
    return {"method": name} | {field: value for field, value in values.items() if value not in (None, {})}


def _names(value: str | None) -> list[str] | None:
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def _numbers(value: str | None) -> list[int] | None:
    try:
        return None if value is None else [int(number) for number in value.split(",")]
    except ValueError as error:
        raise ConfigError(f"--layers takes numbers between commas, found '{value}'; pass for example 0,1,2") from error


def _pairs(values: Sequence[str], option: str) -> list[tuple[str, float]]:
    found = []
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            found.append((name, float(number)))
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(f"--{option} takes NAME=NUMBER, found '{value}'; pass for example q_proj=4")
    return found
