"""The blocks of a transformer and the layers in them by role, and a smaller model of the same class from its tensors.

Which layer does what is told from its name (`core.roles`), as for adapters; what a width is called in a config is the
table below.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimtune.console.progress import Watch
from slimtune.core.roles import Role, role_of
from slimtune.errors import ConfigError
from slimtune.evaluate.generation import kept_logits

FEED_FORWARD_WIDTH = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
"""What configs call the number of feed-forward neurons: Llama, Qwen, Gemma, BERT and ViT; GPT-2; OPT; Falcon."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Block:
    """One layer of the model: where it is, and its linear layers by role, each with its full name."""

    name: str
    module: nn.Module
    layers: dict[Role, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure:
    """A model as a list of blocks."""

    model: Any
    path: str
    blocks: list[Block]

    @classmethod
    def of(cls, model: Any) -> Structure:
        """Find the blocks. Raises: ConfigError, for a model that has no list of them, or several."""
        lists = {
            path: list(module)
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and any(True for _ in _linears(path, module))
        }
        # Experts are lists within a block.
        outer = {p: m for p, m in lists.items() if not any(p.startswith(f"{other}.") for other in lists)}
        if len(outer) != 1:
            raise ConfigError(
                f"a {type(model).__name__} has {len(outer)} lists of layers ({', '.join(outer) or 'none'}), and layers "
                "are pruned of models with one; prune its parts in Python"
            )
        ((path, modules),) = outer.items()
        return cls(model, path, [_block(f"{path}.{number}", module) for number, module in enumerate(modules)])

    @property
    def config(self) -> Any:
        """The part of the config that is about these blocks."""
        return self.model.config.get_text_config()

    def only(self, block: Block, role: Role) -> str:
        """The name of the one layer with a role in a block. Raises: ConfigError."""
        names = block.layers.get(role, [])
        if len(names) != 1:
            raise ConfigError(
                f"{block.name} of a {type(self.model).__name__} has {len(names)} layers with the role {role}, and its "
                "width is pruned where there is one; mixtures of experts and unknown blocks stay as they are"
            )
        return names[0]


def _block(name: str, module: nn.Module) -> Block:
    block = Block(name, module)
    for path, role in _linears(name, module):
        block.layers.setdefault(role, []).append(path)
    return block


def _linears(prefix: str, module: nn.Module) -> Iterable[tuple[str, Role]]:
    for name, inner in module.named_modules(prefix=prefix):
        role = role_of(name) if isinstance(inner, nn.Linear | Conv1D) else None
        if role is not None:
            yield name, role


def kept(module: nn.Module, tensors: Mapping[str, Tensor], name: str, out: Tensor | None = None,
         into: Tensor | None = None) -> dict[str, Tensor]:  # fmt: skip
    """The parameters of a linear layer with some of its outputs or inputs alone, by their names in the model."""
    turned = isinstance(module.get_submodule(name), Conv1D)
    weight = tensors[f"{name}.weight"]
    for dimension, chosen in ((0, out), (1, into)):
        if chosen is not None:
            weight = weight.index_select(1 - dimension if turned else dimension, chosen)
    result = {f"{name}.weight": weight.contiguous()}
    bias = tensors.get(f"{name}.bias")
    if bias is not None and out is not None:
        result[f"{name}.bias"] = bias.index_select(0, out)
    return result


def rebuilt(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A model of the same class with this config and these tensors; in evaluation mode, where the old one was."""
    smaller = type(model)._from_config(config, dtype=model.dtype)
    smaller.load_state_dict(dict(tensors))
    smaller.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.device).eval()


def state_of(model: Any) -> dict[str, Tensor]:
    """All tensors of the model by name."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def run_through(
    model: Any, batches: Sequence[Batch], hooks: Mapping[nn.Module, Callable[..., None]], before: bool, watch: Watch
) -> None:
    """Run the model on each batch, and call a module's hook with its input, or with its input and its output."""
    run: Any = functools.partial(model, **kept_logits(model, 1))
    watch.start("running batches", len(batches))
    with _hooked(hooks, before):
        for batch in batches:
            # Nobody looks at the logits: of a small model they are half of the work.
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            run(**inputs)
            watch.step(1)


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., None]], before: bool) -> Any:
    handles = []
    for module, hook in hooks.items():
        if before:
            handles.append(module.register_forward_pre_hook(lambda m, args, h=hook: h(args[0])))  # pyright: ignore
        else:
            handles.append(
                module.register_forward_hook(
                    # Blocks get their hidden states by place or by name.
                    lambda m, args, kwargs, out, hook=hook: hook(
                        args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
                    ),
                    with_kwargs=True,
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def importance(
    structure: Structure,
    batches: Sequence[Batch],
    role: Role,
    watch: Watch = Watch(),  # noqa: B008 - it has no state
) -> list[Tensor]:
    """How much each input of the layers with a role moves their output: sqrt(E[x_j^2]) * |W_j|, (in,) a block."""
    model = structure.model
    layers = [model.get_submodule(structure.only(block, role)) for block in structure.blocks]
    squares: dict[nn.Module, Tensor] = {}

    def hook_for(layer: nn.Module) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            squares[layer] = squares.get(layer, 0) + x.float().flatten(0, -2).square().sum(0)

        return add

    run_through(model, batches, {layer: hook_for(layer) for layer in layers}, before=True, watch=watch)
    columns = [_dense_weight(layer).float().norm(dim=0) for layer in layers]
    return [squares[layer].sqrt() * norm for layer, norm in zip(layers, columns, strict=True)]


def _dense_weight(layer: Any) -> Tensor:
    """The weight as (out, in)."""
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
