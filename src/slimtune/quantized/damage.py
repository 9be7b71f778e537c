"""What bitsandbytes stored is checked before it is used: its kernels read past the end of what is too short."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from bitsandbytes.utils import unpack_tensor_to_dict

from slimtune.errors import DamagedBaseError

_STATE = ".quant_state.bitsandbytes__"
_ALWAYS = ("absmax", "quant_map")
_NESTED = ("nested_absmax", "nested_quant_map")


def check_4bit(module: Any, state: Any) -> None:
    """Codes, scales and tables of a 4-bit module in the numbers that its shape asks for. Raises: DamagedBaseError."""
    shape = (module.out_features, module.in_features)
    if state is None:
        raise DamagedBaseError("it has no state (quant_state)")
    if tuple(state.shape or ()) != shape:
        raise DamagedBaseError(f"it was quantized from {state.shape}, not from {shape}")
    count, size = math.prod(shape), module.weight.element_size()
    blocks = _blocks(count, state.blocksize)
    _expect("codes in bytes", module.weight.numel() * size, -(-((count + 1) // 2) // size) * size)
    _expect("scales (absmax)", state.absmax.numel(), blocks)
    _expect("entries of the table (quant_map)", state.code.numel(), 16)
    if state.nested:
        inner = state.state2
        _expect("scales of scales (nested_absmax)", inner.absmax.numel(), _blocks(blocks, inner.blocksize))
        _expect("entries of the table of scales (nested_quant_map)", inner.code.numel(), 256)


def check_8bit(module: Any, scales: Any) -> None:
    """Codes and scales of an int8 module in the numbers that its shape asks for. Raises: DamagedBaseError."""
    shape = (module.out_features, module.in_features)
    if tuple(module.weight.shape) != shape:
        raise DamagedBaseError(f"its codes are {tuple(module.weight.shape)}, not {shape}")
    if scales is None:
        raise DamagedBaseError("it has no scales (SCB)")
    _expect("scales (SCB)", scales.numel(), module.out_features)


def _blocks(count: int, size: Any) -> int:
    if not isinstance(size, int) or size < 1:
        raise DamagedBaseError(f"its block size is {size!r}")
    return -(-count // size)


def _expect(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise DamagedBaseError(f"it has {found:,} {what}, not {wanted:,}")


def check_files(folder: Path) -> None:
    """See that each 4-bit weight of a folder has what it is expanded with; only names and states are read.

    Raises:
        DamagedBaseError: something is missing, or a state can't be read.
    """
    names: set[str] = set()
    states: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no mapping
                names.add(name)
                if _STATE in name:
                    states[name.partition(_STATE)[0]] = stored.get_tensor(name)
    marked = {name.removesuffix(f".{part}") for name in names for part in _ALWAYS if name.endswith(f".{part}")}
    for weight in sorted(marked | states.keys()):
        _check_parts(weight, states, names)


def _check_parts(weight: str, states: Mapping[str, Any], names: set[str]) -> None:
    wanted = {weight, *(f"{weight}.{part}" for part in _ALWAYS)}
    if weight not in states:
        raise _damaged(weight, "its state (quant_state) is missing")
    try:
        state = unpack_tensor_to_dict(states[weight])
        unsaid = {"quant_type", "blocksize", "dtype", "shape"} - state.keys()
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(weight, f"its state (quant_state) can't be read: {error}") from error
    if unsaid:
        raise _damaged(weight, f"its state (quant_state) doesn't say {', '.join(sorted(unsaid))}")
    if "nested_blocksize" in state:
        wanted |= {f"{weight}.{part}" for part in _NESTED}
    if wanted - names:
        raise _damaged(weight, f"{', '.join(sorted(wanted - names))} is missing")


def _damaged(weight: str, what: str) -> DamagedBaseError:
    return DamagedBaseError(f"the quantized weight '{weight}' is damaged: {what}; fetch the model again")
