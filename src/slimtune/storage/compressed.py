"""compressed-tensors' account of a quantized model: `quantization_config` in config.json, written and read.

    config_groups: {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64, ...}}}
    ignore: ["lm_head"]

Targets and what is ignored are names of modules, names of their classes, or regular expressions behind `re:`. What is
written here is read by vLLM, SGLang and transformers; of what others write, symmetric integers in 4 and 8 bits are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.errors import ConfigError, DamagedBaseError

METHOD = "compressed-tensors"
PACKED_FORMAT = "pack-quantized"


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of some modules are stored.

    Attributes:
        bits: 4 or 8.
        group_size: how many inputs share a scale; None for a scale a row.
        targets: which modules, as the format has it.
    """

    bits: int
    group_size: int | None
    targets: tuple[str, ...] = ("Linear",)

    @property
    def name(self) -> str:
        """As people call it."""
        return f"W{self.bits}A16" + (f" in groups of {self.group_size}" if self.group_size else "")


def write_config(schemes: Sequence[WeightScheme], ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model that is stored so."""
    return {
        "quant_method": METHOD,
        "format": PACKED_FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": _group(scheme) for number, scheme in enumerate(schemes)},
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(scheme: WeightScheme) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False,
        "strategy": "channel" if scheme.group_size is None else "group", "group_size": scheme.group_size,
        # Columns are put back into their order after GPTQ, so that no g_idx is needed.
        "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    # The format stands in each group as well: vLLM reads it there where groups differ in their bits.
    return {
        "targets": list(scheme.targets), "weights": weights, "input_activations": None, "output_activations": None,
        "format": PACKED_FORMAT,
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
    weights = group["weights"]
    format_name = group.get("format") or stored.get("format")
    bits, strategy = weights["num_bits"], weights.get("strategy")
    faults = [
        *([f"{weights.get('type')} in {bits} bits"] if weights.get("type") != "int" or bits not in (4, 8) else []),
        *([] if weights.get("symmetric", True) else ["zero points"]),
        *([f"the strategy {strategy}"] if strategy not in ("group", "channel") else []),
        *(["groups by activation order"] if weights.get("actorder") in ("group", True) else []),
        *(["quantized inputs"] if group.get("input_activations") else []),
        *([f"the format {format_name}"] if format_name != PACKED_FORMAT else []),
    ]
    if faults:
        raise ConfigError(
            f"the model's weights are stored by compressed-tensors with {' and '.join(faults)}, which isn't read here; "
            "symmetric integers in 4 or 8 bits are: load the model in 16 bits and quantize it with slimtune quantize"
        )
    return WeightScheme(bits, weights["group_size"] if strategy == "group" else None, tuple(group["targets"]))


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
        re.match(pattern.removeprefix("re:"), name) if pattern.startswith("re:") else pattern in (name, kind)
        for pattern in patterns
    )
