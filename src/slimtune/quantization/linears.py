"""Which linear layers are quantized to integers, and whether groups divide their widths."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from slimtune.bases import base_of
from slimtune.errors import ConfigError, did_you_mean, listing
from slimtune.quantization.config import INTEGER_GROUPS


def group_size_for(model: nn.Module, names: list[str], group_size: int, option: str = "keep") -> None:
    """See that groups divide the widths of these linear layers.

    Args:
        option: what leaves layers out, for the error.

    Raises:
        ConfigError: a width that they don't divide.
    """
    layers = [model.get_submodule(name) for name in names]
    widths = {base_of(layer).features(layer)[0] for layer in layers}
    wrong = sorted(width for width in widths if width % group_size)
    if wrong:
        fitting = [size for size in INTEGER_GROUPS if not any(width % size for width in widths)]
        advice = (
            f"take groups of {' or '.join(map(str, fitting))}" if fitting else f"leave those layers out with {option}"
        )
        raise ConfigError(
            f"groups of {group_size} don't divide linear layers of width {', '.join(map(str, wrong))}; {advice}"
        )


def quantized_linears(model: Any, keep: Any = ()) -> list[str]:
    """The paths of the linear layers that are quantized: all but the output layer and what is to be kept.

    Raises:
        ConfigError: there is none, or a name to keep that none has.
    """
    # One that carries adapters is what it was.
    types = {name: getattr(type(module), "adopted_from", type(module)) for name, module in model.named_modules()}
    linear = [name for name, kind in types.items() if kind in (nn.Linear, Conv1D)]
    for pattern in keep:
        if all(should_convert_module(name, [pattern]) for name in linear):
            last = {name.rpartition(".")[2] for name in linear}
            near = did_you_mean(pattern, [*last, *linear]) or f"; there are {listing(last)}"
            raise ConfigError(f"keep names '{pattern}', but {type(model).__name__} has no such linear layer{near}")
    # By the order in which the model makes its parts: a head comes last, also one with a bias.
    last_module = list(model.named_parameters())[-1][0].rpartition(".")[0]
    is_transformers = hasattr(model, "all_tied_weights_keys")  # of a module of one's own only the last is a head
    in_float32 = getattr(model, "_keep_in_fp32_modules", None)
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, in_float32) if is_transformers else []
    kept = {*skipped, *keep, *({last_module} & set(linear))}
    names = [name for name in linear if should_convert_module(name, list(kept))]
    if not names:
        beside = listing(linear) or "none at all"
        raise ConfigError(f"{type(model).__name__} has no linear layer to quantize beside {beside}; leave it as it is")
    return names
