"""A model's linear layers in few bits after training, in place: AWQ's scaling, GPTQ's codes, a searched range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.bases.int4 import LinearInt4
from slimtune.bases.int8 import EmbeddingInt8, LinearInt8, LinearW8A8, positive_rows
from slimtune.bases.integer import HoldsCodes
from slimtune.bases.packed import as_linear
from slimtune.console.progress import Watch
from slimtune.core.frozen import walk
from slimtune.errors import ConfigError, DataError, check_choice, listing
from slimtune.ops.grid import SCALE_DTYPE, GridWeight, rounded
from slimtune.quantization.config import INTEGER_GROUPS
from slimtune.quantization.integer import config_of, note_quantization
from slimtune.quantization.linears import group_size_for, quantized_linears
from slimtune.recipe.validation import STRICT
from slimtune.slim.awq import Pair, apply_awq, find_pairs
from slimtune.slim.calibrate import Block, Moments, blocks_of, in_evaluation, moments_of, pass_on
from slimtune.slim.gptq import gptq_codes

BITS = {"W4A16": 4, "W8A16": 8, "W8A8": 8}
METHODS = ("awq+gptq", "awq", "gptq", "rtn")
STRATEGIES = ("group", "channel", "tensor")
HEADS = ("keep", "int8")


@dataclass(frozen=True)
class QuantizeConfig:
    """How a model is quantized.

    Attributes:
        scheme: W4A16 (weights in 4 bits, inputs as they are), W8A16, or W8A8 (inputs in 8 bits too, each token with a
            scale of its own).
        method: awq+gptq (the best), awq, gptq, or rtn (rounded to the nearest, which takes no data); by default
            awq+gptq in 4 bits and rtn in 8, where it loses next to nothing.
        group_size: how many inputs share a scale: 32, 64, 128 or 256, where the strategy is group.
        head: keep the output layer and the embedding, or have them in int8.
        ignore: more linear layers to leave as they are: names, ends of paths or regular expressions.
        strategy: what shares a scale: a group of inputs (W4A16's default), a channel, which is a row of the weight
            (the default in 8 bits), or the whole tensor.
        symmetric: no zero points, which all engines read.

    Raises:
        ConfigError: a value that can't be.
    """

    scheme: str = "W4A16"
    method: str | None = None
    group_size: int | None = None
    head: str = "keep"
    ignore: Sequence[str] = ()
    strategy: str | None = None
    symmetric: bool = True

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_choice("scheme", self.scheme, tuple(BITS))
        check_choice("head", self.head, HEADS)
        check_choice("symmetric", self.symmetric, (True, False))
        if self.method is None:
            object.__setattr__(self, "method", "awq+gptq" if self.bits == 4 else "rtn")
        check_choice("method", self.method, METHODS)
        if self.strategy is None:
            if self.bits == 8 and self.group_size is not None:
                beside = "" if self.rounds_inputs else ", or pass strategy group"
                raise ConfigError(f"{self.scheme} has a scale for each row; leave group_size out{beside}")
            object.__setattr__(self, "strategy", "group" if self.bits == 4 else "channel")
        check_choice("strategy", self.strategy, STRATEGIES)
        if self.strategy == "group" and self.group_size is None:
            object.__setattr__(self, "group_size", 64)
        if self.strategy != "group" and self.group_size is not None:
            raise ConfigError(f"strategy {self.strategy} has no groups; leave group_size out")
        check_choice("group_size", self.group_size, (None, *INTEGER_GROUPS))
        if self.rounds_inputs and (self.strategy == "group" or not self.symmetric):
            raise ConfigError("W8A8 takes a scale for each channel or one for the tensor, and no zero points")
        if isinstance(self.ignore, str) or not all(isinstance(name, str) for name in self.ignore):
            raise ConfigError(f"ignore must be a list of module names, found {self.ignore!r}")

    @property
    def bits(self) -> int:
        """Of a code."""
        return BITS[self.scheme]

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs are rounded, too."""
        return self.scheme == "W8A8"

    @property
    def needs_data(self) -> bool:
        """Whether the method looks at the inputs of the layers."""
        return self.method != "rtn"

    def group(self, inputs: int) -> int:
        """How many of a layer's inputs share a scale."""
        return self.group_size or inputs


@torch.no_grad()
def quantize_(
    model: Any,
    config: QuantizeConfig | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
    watch: Watch = Watch(),  # noqa: B008 - it has no state
) -> Any:
    """Quantize a model in place and give it back; `save_pretrained` writes it as compressed-tensors.

    Args:
        batches: what the model is called with to see the inputs of its layers, such as {"input_ids": (rows, tokens)},
            without padding; needed by all methods but rtn.

    Raises:
        ConfigError: it is quantized already or has adapters, has no linear layer, or groups don't divide a width.
        DataError: the method needs batches and there are none.
    """
    config = config or QuantizeConfig()
    _refuse_changed(model)
    names = quantized_linears(model, config.ignore)
    if config.group_size is not None:
        group_size_for(model, names, config.group_size)
    if config.needs_data and not batches:
        raise DataError(f"{config.method} looks at the inputs of the layers; pass batches, or method='rtn'")
    for name in names:
        as_linear(model.get_submodule(name))
    with in_evaluation(model):
        if config.needs_data:
            _fit(model, names, config, batches, watch)
        else:
            watch.start("rounding layers", len(names))
            for name in names:
                _hold(model.get_submodule(name), config, None)
                watch.step(1)
    if config.head == "int8":
        _quantize_ends(model)
    note_quantization(model, config_of(model))
    return model


def _refuse_changed(model: Any) -> None:
    """Raises: ConfigError, for a model that isn't plain."""
    if hasattr(model, "peft_config"):
        raise ConfigError(
            f"the model has the adapters {listing(model.peft_config)}; merge them first with merge_and_unload()"
        )
    quantized = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    if quantized or any(isinstance(module, HoldsCodes) for _, module in walk(model)):
        raise ConfigError(
            "the model is quantized already, and rounding it twice loses more than once; load the model in 16 bits, or "
            "expand this one with slimtune.dequantize"
        )


def _fit(
    model: Any, names: Sequence[str], config: QuantizeConfig, batches: Sequence[Mapping[str, Any]], watch: Watch
) -> None:
    """Quantize layers by what their inputs look like, a block after the other."""
    method = str(config.method)
    blocks = blocks_of(model, batches)
    watch.start("quantizing layers", len(names))
    pairs: list[Pair] | None = None
    left = set(names)
    for number, block in enumerate(blocks):
        own = next(block.module.parameters()).dtype
        # In float32, scaled weights are rounded once, to codes; and bf16 takes very long without instructions for it.
        block.module.float()
        linears = block.linears(names)
        moments = moments_of(block, linears, is_full="gptq" in method)
        if "awq" in method:
            # Blocks are alike: what the first one showed holds for all whose modules have the same names.
            pairs = find_pairs(block, moments) if pairs is None or not _has(block, pairs) else pairs
            apply_awq(block, moments, pairs, config.group, config.bits)
        for group in moments:
            _hold_group(block, group, config)
            watch.step(len(group.names))
        prefix = f"{block.path}." if block.path else ""
        left -= {f"{prefix}{name}" for group in moments for name in group.names}
        pass_on(block, blocks[number + 1] if number + 1 < len(blocks) else None)
        _compute_in(block.module, own)
    # Outside of the blocks, or never called on this data: rounded to the nearest.
    for name in sorted(left):
        _hold(model.get_submodule(name), config, None)
        watch.step(1)


def _compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    module.to(dtype)
    for part in module.modules():
        if isinstance(part, HoldsCodes):
            part.compute_dtype = dtype
            part.weight_scale = part.weight_scale.to(SCALE_DTYPE)


def _has(block: Block, pairs: Sequence[Pair]) -> bool:
    paths = {name for name, _ in block.module.named_modules()}
    return all({pair.before, *pair.names} <= paths for pair in pairs)


def _hold_group(block: Block, group: Moments, config: QuantizeConfig) -> None:
    """Quantize the layers that share their inputs."""
    modules: list[Any] = [block.module.get_submodule(name) for name in group.names]
    if "gptq" not in str(config.method):
        for module in modules:
            _hold(module, config, group.importance)
        return
    grids = [_rounded(module.weight, config, group.importance) for module in modules]
    # Below each other: GPTQ works on rows, and one pass over the inputs serves all of them.
    weight_OI = torch.cat([module.weight for module in modules]).float()
    scales_OG = torch.cat([grid.scales for grid in grids])
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    codes_OI = gptq_codes(weight_OI, scales_OG, group.square, config.bits, torch.cat(zeros) if zeros else None)
    rows = [module.out_features for module in modules]
    for module, codes, grid in zip(modules, codes_OI.split(rows), grids, strict=True):
        _class_for(config).take(module, codes.clone(), grid.scales, grid.zeros)


def _hold(module: Any, config: QuantizeConfig, importance_I: Tensor | None) -> None:
    """Quantize a layer, each weight rounded to the nearest code."""
    _class_for(config).take(module, *_rounded(module.weight, config, importance_I))


def _rounded(weight_OI: Tensor, config: QuantizeConfig, importance_I: Tensor | None) -> GridWeight:
    weight_OI = weight_OI.float()
    if config.strategy == "tensor":
        # As one row; the scale then stands for each row.
        one = None if importance_I is None else importance_I.repeat(weight_OI.shape[0])
        row, rows = weight_OI.reshape(1, -1), weight_OI.shape[0]
        grid = (
            positive_rows(row)
            if config.rounds_inputs
            else rounded(row, row.numel(), config.bits, one, config.symmetric)
        )
        zeros_OG = None if grid.zeros is None else grid.zeros.expand(rows, 1).contiguous()
        return GridWeight(grid.codes.view(weight_OI.shape), grid.scales.expand(rows, 1).contiguous(), zeros_OG)
    if config.rounds_inputs:
        return positive_rows(weight_OI)
    return rounded(weight_OI, config.group(weight_OI.shape[1]), config.bits, importance_I, config.symmetric)


def _class_for(config: QuantizeConfig) -> type[HoldsCodes]:
    if config.rounds_inputs:
        return LinearW8A8
    return LinearInt4 if config.bits == 4 else LinearInt8


def _quantize_ends(model: Any) -> None:
    """Have the embedding and the output layer in int8, tied ones with the very same codes. Raises: ConfigError."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    # Exactly these: a subclass may compute something else.
    kinds = [type(end) for end in (embedding, head) if end is not None]
    if kinds not in ([nn.Embedding, nn.Linear], [nn.Embedding]):
        ends = listing(type(end).__name__ for end in (embedding, head) if end is not None)
        raise ConfigError(f"head int8 takes a plain embedding and output layer, found {ends}; pass head='keep'")
    is_tied = head is not None and head.weight is embedding.weight
    for module, kind in ((embedding, EmbeddingInt8), *([] if head is None or is_tied else [(head, LinearInt8)])):
        kind.take(module, *positive_rows(module.weight))
    if head is not None and is_tied:
        LinearInt8.take(head, embedding.weight.data, embedding.weight_scale)
        # The very same tensors, not equal ones.
        head._parameters["weight"], head._buffers["weight_scale"] = embedding.weight, embedding.weight_scale
