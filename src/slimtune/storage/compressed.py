"""compressed-tensors' account of a quantized model: `quantization_config` in config.json, written and read.

    config_groups: {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64, ...}}}
    ignore: ["lm_head"]

Targets and what is ignored are names of modules, names of their classes, or regular expressions behind `re:`. What is
written here is read by vLLM, SGLang and transformers; of what others write, integers in 4 and 8 bits are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.errors import ConfigError, DamagedBaseError

METHOD = "compressed-tensors"
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
CODES = "weight"
"""The tensors of one weight in a file: codes, as PACKED with their SHAPE or as they are, and what they stand for."""
PARTS = (PACKED, SCALE, SHAPE, ZERO)
"""Those that no plain module has."""
PACKED_FORMAT, PLAIN_FORMAT, MIXED_FORMAT = "pack-quantized", "int-quantized", "mixed-precision"
"""Codes several an int32; codes as int8; groups of modules that differ."""


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of some modules are stored.

    Attributes:
        bits: 4 or 8.
        group_size: how many inputs share a scale; None for a scale a row.
        targets: which modules, as the format has it.
        format: PACKED_FORMAT or PLAIN_FORMAT.
        symmetric: whether there are no zero points.
        rounds_inputs: whether inputs are rounded to 8 bits, too, each token with a scale of its own.
        is_whole: whether one scale is that of all rows.
    """

    bits: int
    group_size: int | None
    targets: tuple[str, ...] = ("Linear",)
    format: str = PACKED_FORMAT
    symmetric: bool = True
    rounds_inputs: bool = False
    is_whole: bool = False

    @property
    def name(self) -> str:
        """As people call it."""
        form = f"W{self.bits}A{8 if self.rounds_inputs else 16}"
        form += f" in groups of {self.group_size}" if self.group_size else ""
        return form + ("" if self.symmetric else " with zero points")


def write_config(schemes: Sequence[WeightScheme], ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model that is stored so."""
    formats = {scheme.format for scheme in schemes} or {PACKED_FORMAT}
    return {
        "quant_method": METHOD,
        "format": MIXED_FORMAT if len(formats) > 1 else formats.pop(),
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": _group(scheme) for number, scheme in enumerate(schemes)},
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


_PLAIN_FIELDS = {"type": "int", "group_size": None, "actorder": None, "block_structure": None, "observer_kwargs": {}}
_TOKENS = _PLAIN_FIELDS | {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token", "observer": None}
"""Inputs in 8 bits, the scale of each token taken from itself."""


def _group(scheme: WeightScheme) -> dict[str, Any]:
    strategy = "group" if scheme.group_size else "tensor" if scheme.is_whole else "channel"
    # Columns are put back into their order after GPTQ, so that no g_idx is needed.
    weights = _PLAIN_FIELDS | {
        "num_bits": scheme.bits, "symmetric": scheme.symmetric, "dynamic": False, "strategy": strategy,
        "group_size": scheme.group_size, "observer": "minmax",
    }  # fmt: skip
    # The format stands in each group as well: vLLM reads it there where groups differ in their bits.
    return {
        "targets": list(scheme.targets), "weights": weights, "format": scheme.format,
        "input_activations": dict(_TOKENS) if scheme.rounds_inputs else None, "output_activations": None,
    }  # fmt: skip


def is_compressed(stored: Any) -> bool:
    """Whether a `quantization_config`, as a mapping or an object, is one of compressed-tensors."""
    method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    return str(getattr(method, "value", method)) == METHOD


def read_config(stored: Mapping[str, Any]) -> tuple[list[WeightScheme], list[str]]:
    """The schemes of a `quantization_config`, and the modules that are left as they are.

    Raises:
        ConfigError: weights are stored in a way that isn't read here.
        DamagedBaseError: it is none of compressed-tensors.
    """
    try:
        groups = [_scheme(group, stored) for group in stored["config_groups"].values()]
        return groups, [str(name) for name in stored.get("ignore") or ()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DamagedBaseError(
            f"the quantization_config of compressed-tensors can't be read ({error!r}); fetch the model again"
        ) from error


def _scheme(group: Mapping[str, Any], stored: Mapping[str, Any]) -> WeightScheme:
    weights, inputs = group["weights"], group.get("input_activations")
    format_name = str(group.get("format") or stored.get("format"))
    bits, strategy, symmetric = weights["num_bits"], weights.get("strategy"), bool(weights.get("symmetric", True))
    is_known = weights.get("type") == "int" and bits in (4, 8)
    # As vLLM has it: inputs in 8 bits beside weights of a scale a row or one for all.
    rounds_inputs = bool(inputs) and all(inputs.get(name) == _TOKENS[name] for name in _DECISIVE)
    rounds_inputs = rounds_inputs and bits == 8 and symmetric and strategy != "group"
    faults = [
        *([] if is_known else [f"{weights.get('type')} in {bits} bits"]),
        *([] if strategy in ("group", "channel", "tensor") else [f"the strategy {strategy}"]),
        *(["groups by activation order"] if weights.get("actorder") in ("group", True) else []),
        *(["inputs that are quantized otherwise than in 8 bits a token"] if inputs and not rounds_inputs else []),
        *([] if format_name in (PACKED_FORMAT, PLAIN_FORMAT) else [f"the format {format_name}"]),
    ]
    if faults:
        raise ConfigError(
            f"the model's weights are stored by compressed-tensors with {' and '.join(faults)}, which isn't read here; "
            "integers in 4 or 8 bits are: load the model in 16 bits and quantize it with slimtune quantize"
        )
    group_size = weights["group_size"] if strategy == "group" else None
    targets = tuple(group["targets"])
    return WeightScheme(bits, group_size, targets, format_name, symmetric, rounds_inputs, strategy == "tensor")


_DECISIVE = ("num_bits", "type", "symmetric", "dynamic", "strategy")
"""The fields that say how inputs are quantized."""


def scheme_for(name: str, kind: str, schemes: Sequence[WeightScheme], ignore: Sequence[str]) -> WeightScheme | None:
    """How the weight of a module is stored; None for one that is left as it is.

    Args:
        name: the module's path.
        kind: the name of its class.
    """
    if _matches(name, kind, ignore):
        return None
    return next((scheme for scheme in schemes if _matches(name, kind, scheme.targets)), None)


def _matches(name: str, kind: str, patterns: Sequence[str]) -> bool:
    return any(
        # `match`, anchored at the start alone: that is what the format's own reader does.
        re.match(pattern.removeprefix("re:"), name) if pattern.startswith("re:") else pattern in (name, kind)
        for pattern in patterns
    )
