"""Single weights left out: zeros in the linear layers, chosen by magnitude, by Wanda or by SparseGPT.

    magnitude   |w|
    Wanda       |w_ij| sqrt(E[x_j^2]), the inputs x of calibration data; Sun et al. 2023, arXiv:2306.11695
    SparseGPT   w^2 / U_ii^2, and the weights that stay are changed: `slim/sparsegpt.py`

Blocks are pruned one after the other, each on inputs that come through the pruned ones before it. A model with zeros
keeps its shapes, and no engine is faster for them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapters.constrain import block_layers
from slimtune.bases import base_of
from slimtune.bases.dense import DenseConv, DenseLinear
from slimtune.console.progress import Watch
from slimtune.core.patterns import means
from slimtune.errors import ConfigError, DataError, check_choice, check_number, did_you_mean, listing
from slimtune.slim.calibrate import Moments, blocks_of, in_evaluation, moments_of, pass_on
from slimtune.slim.gptq import inverse_factor
from slimtune.slim.sparsegpt import sparsegpt
from slimtune.slim.sparsity import PATTERNS, Pattern, beyond_pattern, lowest, lowest_in_rows
from slimtune.slim.structure import Batch

SCOPES = {"magnitude": ("matrix", "row", "global"), "wanda": ("row", "matrix"), "sparsegpt": ("matrix",)}
"""Among which weights each method chooses, the default first, as its paper has it."""


@dataclass(frozen=True)
class WeightPruning:
    """Which weights become zero.

    Attributes:
        sparsity: share of zeros; 0.5 for the patterns, which say it themselves.
        pattern: unstructured, or 2:4 or 4:8 along the input.
        method: wanda, magnitude, which looks at no data, or sparsegpt.
        scope: where an unstructured share holds: in each row, in each matrix, or global, over all of them; by default
            row for wanda, matrix for the others.
        ignore: layers to leave as they are, by names or expressions.

    Raises:
        ConfigError: a value that can't be.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    method: str = "wanda"
    scope: str | None = None
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_choice("pattern", self.pattern, tuple(PATTERNS))
        check_choice("method", self.method, tuple(SCOPES))
        if self.groups is None:
            if self.sparsity is None:
                raise ConfigError("sparsity says which share of the weights becomes zero; give one, as 0.5")
            check_number("sparsity", self.sparsity, 0, 1)
            if not 0 < self.sparsity < 1:
                raise ConfigError(f"sparsity is the share of zeros, between 0 and 1, found {self.sparsity:g}")
            check_choice("scope", self.scope, (None, *SCOPES[self.method]))
        else:
            if self.sparsity not in (None, 0.5):
                raise ConfigError(f"pattern {self.pattern} has a sparsity of 0.5, found {self.sparsity}; leave it out")
            if self.scope is not None:
                raise ConfigError(f"scope would change nothing with pattern {self.pattern}; leave it out")
            object.__setattr__(self, "sparsity", 0.5)
        if isinstance(self.ignore, str) or not all(isinstance(name, str) for name in self.ignore):
            raise ConfigError(f"ignore must be a list of module names, found {self.ignore!r}")

    @property
    def groups(self) -> Pattern | None:
        """The pattern, where there is one."""
        return PATTERNS[self.pattern]

    @property
    def share(self) -> float:
        """The sparsity, whoever said it."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def chosen_in(self) -> str:
        """The scope, the method's own where none was said."""
        return self.scope or SCOPES[self.method][0]

    @property
    def needs_data(self) -> bool:
        """Whether the method looks at the inputs of the layers."""
        return self.method != "magnitude"


def zero_weights(
    model: Any,
    batches: Sequence[Batch],
    config: WeightPruning,
    watch: Watch = Watch(),  # noqa: B008 - it has no state
) -> tuple[Any, dict[str, Any]]:
    """A copy of the model with zeros, and what was done.

    Raises:
        ConfigError: a pattern that doesn't divide a layer's inputs, or a model that is as sparse already.
        DataError: the method looks at inputs, and there are no batches.
    """
    layers = pruned_layers(model, config.ignore)
    _check(layers, config)
    if config.needs_data and not batches:
        raise DataError(f"{config.method} looks at the inputs of the layers; pass batches, or method='magnitude'")
    sparser = copy.deepcopy(model)
    with torch.no_grad(), in_evaluation(sparser):
        if config.needs_data:
            _by_inputs(sparser, list(layers), config, batches, watch)
        else:
            _by_magnitude(pruned_layers(sparser, config.ignore), config)
    facts = sparsity_of(pruned_layers(sparser, config.ignore))
    return sparser, {"method": config.method, "pattern": config.pattern, **facts}


def sparsity_of(layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """How many weights of these layers are zero, and what they take dense and as values with the index of a bitmask.

    An index of 2:4 takes as much: two bits for each of half of the weights are one bit a weight.
    """
    weights = [base_of(module).weight(module) for module in layers.values()]
    zeros, total = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
    values = sum(int((weight != 0).sum()) * weight.element_size() for weight in weights)
    return {
        "sparsity": zeros / max(1, total), "zeros": zeros, "weights": total, "layers": len(weights),
        "dense_bytes": sum(weight.nbytes for weight in weights), "value_bytes": values, "index_bytes": -(-total // 8),
    }  # fmt: skip


def sparsity_line(facts: Mapping[str, Any]) -> str:
    """What `sparsity_of` gives, in a sentence."""
    packed = facts["value_bytes"] + facts["index_bytes"]
    return (
        f"{facts['sparsity']:.1%} of {facts['weights']:,} weights in {facts['layers']} layers are zero: "
        f"{facts['dense_bytes'] / 1e6:.1f} MB as they are written, which any engine reads; "
        f"{packed / 1e6:.1f} MB as values ({facts['value_bytes'] / 1e6:.1f}) with their index "
        f"({facts['index_bytes'] / 1e6:.1f}), which none does"
    )


def pruned_layers(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The linear and convolution layers in the repeated blocks, or all where there are no such blocks, by path.

    Raises:
        ConfigError: there is none, or a name to ignore that none has.
    """
    layers = {name: m for name, m in block_layers(model).items() if isinstance(base_of(m), DenseLinear | DenseConv)}
    for name in ignore:
        left = {path: module for path, module in layers.items() if not means(name, path)}
        if len(left) == len(layers):
            last = {path.rpartition(".")[2] for path in layers}
            near = did_you_mean(name, [*last, *layers]) or f"; there are {listing(last)}"
            raise ConfigError(f"ignore names '{name}', but {type(model).__name__} has no such layer{near}")
        layers = left
    if not layers:
        raise ConfigError(f"a {type(model).__name__} has no linear or convolution layer to prune")
    return layers


def _check(layers: Mapping[str, nn.Module], config: WeightPruning) -> None:
    """Raises: ConfigError."""
    convolutions = [name for name, module in layers.items() if isinstance(base_of(module), DenseConv)]
    if convolutions and (config.needs_data or config.groups):
        raise ConfigError(
            f"'{convolutions[0]}' is a convolution, and convolutions are pruned unstructured and by magnitude; pass "
            "method magnitude, or leave them out with ignore"
        )
    if config.groups:
        widths = {name: base_of(module).features(module)[0] for name, module in layers.items()}
        wrong = [name for name, width in widths.items() if width % config.groups.group]
        if wrong:
            raise ConfigError(
                f"pattern {config.pattern} needs inputs divisible by {config.groups.group}, and {listing(wrong, 3)} "
                f"has {widths[wrong[0]]}; leave such layers out with ignore, or prune unstructured"
            )
    before = sparsity_of(layers)["sparsity"]
    if before >= config.share:
        raise ConfigError(
            f"{before:.1%} of the weights are zero already, and sparsity {config.share:g} asks for no more; ask for "
            "more, or prune the model from before"
        )


def _by_magnitude(layers: Mapping[str, nn.Module], config: WeightPruning) -> None:
    weights = [base_of(module).weight(module) for module in layers.values()]
    scores = [weight.detach().float().abs().flatten(1) for weight in weights]
    if config.chosen_in == "global" and config.groups is None:
        everything = torch.cat([each.flatten() for each in scores])
        gone = lowest(everything, round(config.share * everything.numel()))
        pieces = gone.split([each.numel() for each in scores])
    else:
        pieces = [_gone(each, config) for each in scores]
    for weight, piece in zip(weights, pieces, strict=True):
        weight.masked_fill_(piece.view(weight.shape), 0)


def _by_inputs(
    model: nn.Module, names: Sequence[str], config: WeightPruning, batches: Sequence[Batch], watch: Watch
) -> None:
    """Prune layers by what their inputs look like, a block after the other."""
    on_device = [{name: value.to(_device(model)) for name, value in batch.items()} for batch in batches]
    blocks = blocks_of(model, on_device)
    watch.start("pruning layers", len(names))
    left = set(names)
    for number, block in enumerate(blocks):
        own = next(block.module.parameters()).dtype
        # In float32, weights that make up for others are rounded once; and bf16 takes very long without instructions.
        block.module.float()
        for moments in moments_of(block, block.linears(names), is_full=config.method == "sparsegpt"):
            layers = [block.module.get_submodule(name) for name in moments.names]
            _prune_group(layers, moments, config)
            watch.step(len(layers))
            left -= {f"{block.path}.{name}".lstrip(".") for name in moments.names}
        block.module.to(own)
        pass_on(block, blocks[number + 1] if number + 1 < len(blocks) else None)
    if left:
        raise ConfigError(
            f"the calibration data never reached {listing(left, 3)}, so that nothing is known of their inputs; leave "
            "them out with ignore, or prune by magnitude"
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _prune_group(layers: Sequence[nn.Module], moments: Moments, config: WeightPruning) -> None:
    """Prune layers that share their inputs."""
    if not bool(moments.square.isfinite().all()):
        raise ConfigError(
            f"the inputs of '{moments.names[0]}' on the calibration data are not finite, so that nothing can be chosen "
            "by them; pass other data, or method magnitude"
        )
    upper_II = inverse_factor(moments.square) if config.method == "sparsegpt" else None
    for layer in layers:
        weight_OI = base_of(layer).weight(layer)
        if upper_II is None:
            scores = weight_OI.abs() * moments.importance.sqrt()
            weight_OI.masked_fill_(_gone(scores, config), 0)
        else:
            is_dead_I = moments.square.diagonal() == 0
            weight_OI.copy_(sparsegpt(weight_OI, upper_II, is_dead_I, config.share, config.groups))


def _gone(scores_OI: Tensor, config: WeightPruning) -> Tensor:
    """Which weights of one matrix become zero."""
    if config.groups is not None:
        return beyond_pattern(scores_OI, config.groups)
    if config.chosen_in == "row":
        return lowest_in_rows(scores_OI, round(config.share * scores_OI.shape[1]))
    return lowest(scores_OI.flatten(), round(config.share * scores_OI.numel())).view(scores_OI.shape)
