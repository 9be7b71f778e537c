"""What the inputs of linear layers look like on some data, a block of the model after the other.

The blocks of most models are a chain: each takes what the one before gave. Then a block runs alone on the stored
outputs of the blocks before it, which may be quantized already, so that only one block's moments are held at a time and
each block is fitted to the inputs that it will have. A model whose blocks are no chain (an encoder with a decoder) is
one block.

    E[x x^T] (in, in), or its diagonal E[x_i^2] alone where no method asks for more
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass
class Block:
    """A part of the model and the calls that calibration makes of it, one for each batch.

    Attributes:
        path: of the module; empty for the whole model.
        calls: positional and named arguments of each.
        dtype: what the block computes in while it is worked on.
    """

    path: str
    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    def run(self, number: int) -> Any:
        """What the block gives for a batch: its hidden states, where it is one of a chain."""

        def cast(value: Any) -> Any:
            return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        args, kwargs = tree_map(cast, self.calls[number])
        return hidden_of(self.module(*args, **kwargs))

    def linears(self, among: Sequence[str]) -> dict[str, nn.Linear]:
        """The linear layers in it whose path in the model is one of these, by their path here."""
        prefix = f"{self.path}." if self.path else ""
        return {
            name.removeprefix(prefix): self.module.get_submodule(name.removeprefix(prefix))  # type: ignore[misc]
            for name in among
            if name.startswith(prefix)
        }


@dataclass
class Moments:
    """The second moments of the inputs that some linear layers share.

    Attributes:
        names: of the layers, by their paths in the block.
        square: the sum of x x^T, (in, in), or of x^2, (in,), in float32.
        tokens: how many inputs that is the sum of.
    """

    names: list[str]
    square: Tensor
    tokens: int = 0

    @property
    def importance(self) -> Tensor:
        """E[x_i^2], (in,)."""
        return (self.square.diagonal() if self.square.dim() == 2 else self.square) / max(1, self.tokens)

    def scaled(self, factors_I: Tensor) -> None:
        """The moments of x / factors from now on."""
        outer = torch.outer(factors_I, factors_I) if self.square.dim() == 2 else factors_I.square()
        self.square /= outer


def hidden_of(output: Any) -> Any:
    """The hidden states among what a block gives, or the logits of a whole model."""
    logits = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) else output[0] if logits is None else logits


@torch.no_grad()
def blocks_of(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The blocks of a model with their calls on these batches; the whole model as one block where they are no chain.

    The first block has its inputs; those of the others come from the block before, once that is done (`pass_on`).
    """
    layers = _chain(model)
    if layers and batches:
        blocks = [Block(path, module) for path, module in layers]
        one_row = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batches[0].items()}
        outputs = _outputs_of_chain(model, blocks, one_row)
        if outputs is not None:
            _record(model, blocks, outputs, batches)
            return blocks
    return [Block("", model, [((), dict(batch)) for batch in batches])]


def _chain(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of the outermost list of modules with linear layers in them, where there is one such list."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in lists)
        has_linear = any(isinstance(part, nn.Linear) for part in module.modules())
        if isinstance(module, nn.ModuleList) and len(module) > 1 and has_linear and not inside:
            lists.append((path, module))
    if len(lists) != 1:
        return []
    path, layers = lists[0]
    return [(f"{path}.{number}", layer) for number, layer in enumerate(layers)]


def _outputs_of_chain(model: nn.Module, blocks: list[Block], batch: Mapping[str, Any]) -> list[Any] | None:
    """What each block gives for a batch; None where they aren't called once each, with what the one before gave."""
    outputs: list[Any] = []
    is_chain = True

    def before(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal is_chain
            in_turn = len(outputs) == number and bool(args)
            is_chain &= in_turn and (number == 0 or args[0] is hidden_of(outputs[-1]))

        return hook

    handles = [block.module.register_forward_pre_hook(before(number)) for number, block in enumerate(blocks)]
    handles += [block.module.register_forward_hook(lambda m, a, output: outputs.append(output)) for block in blocks]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return outputs if is_chain and len(outputs) == len(blocks) else None


class _AllCalledError(Exception):
    """The last block was called: what follows it is not needed."""


def _record(
    model: nn.Module, blocks: list[Block], outputs: Sequence[Any], batches: Sequence[Mapping[str, Any]]
) -> None:
    """Note how the model calls its blocks on all batches, without running them: each gives back what it is given.

    Args:
        outputs: of each block, for its form.
    """

    def stand_in(number: int) -> Any:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            blocks[number].calls.append(((hidden if number == 0 else None, *args), kwargs))
            if number == len(blocks) - 1:
                raise _AllCalledError
            return (hidden, *outputs[number][1:]) if isinstance(outputs[number], tuple) else hidden

        return forward

    try:
        for number, block in enumerate(blocks):
            block.module.forward = stand_in(number)
        for batch in batches:
            with suppress(_AllCalledError):
                model(**batch)
    finally:
        for block in blocks:
            del block.module.forward


@torch.no_grad()
def pass_on(block: Block, following: Block | None) -> None:
    """Run a block as it is now on all its calls and give the results to the next one; its own calls are let go."""
    for number in range(len(block.calls) if following else 0):
        hidden = block.run(number)
        rest = following.calls[number]  # type: ignore[union-attr]
        following.calls[number] = ((hidden, *rest[0][1:]), rest[1])  # type: ignore[union-attr]
    block.calls.clear()


@torch.no_grad()
def moments_of(block: Block, linears: Mapping[str, nn.Linear], is_full: bool) -> list[Moments]:
    """The moments of the inputs of linear layers on all calls; those that take the very same tensor share them.

    Args:
        is_full: E[x x^T], or the diagonal alone.
    """
    groups: dict[str, Moments] = {}
    current: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            (x,) = args[:1]
            if name not in groups:
                shared = next((other for other, seen in current.items() if seen is x), None)
                if shared is not None:
                    groups[name] = groups[shared]
                    groups[name].names.append(name)
                else:
                    width = x.shape[-1]
                    zeros = torch.zeros((width, width) if is_full else (width,), device=x.device)
                    groups[name] = Moments([name], zeros)
            current[name] = x
            moments = groups[name]
            if moments.names[0] != name:
                return
            x_TI = x.reshape(-1, x.shape[-1]).float()
            moments.tokens += x_TI.shape[0]
            if is_full:
                moments.square.addmm_(x_TI.t(), x_TI)
            else:
                moments.square += x_TI.square().sum(0)

        return note

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        for number in range(len(block.calls)):
            current.clear()
            block.run(number)
    finally:
        for handle in handles:
            handle.remove()
    # One entry for each group: a group stands under each of its names.
    return [moments for name, moments in groups.items() if moments.names[0] == name]


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without a cache of keys and values, and as before afterwards."""
    was_training, config = model.training, getattr(model, "config", None)
    used_cache = getattr(config, "use_cache", None)
    model.eval()
    if config is not None and used_cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(was_training)
        if config is not None and used_cache is not None:
            config.use_cache = used_cache
