"""Whether a module with a forward of its own still computes a fold right, found by trying."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from slimtune.adopt import run
from slimtune.bases import base_of
from slimtune.delta import Delta, Dense, deltas_of, standing_in
from slimtune.difference import Difference
from slimtune.errors import MergeError


def check_fold(module: Any, names: tuple[str, ...], folded: Dense) -> None:
    """Compare the module under these adapters with the module under the folded tensors, on a probe input.

    A subclass may compute something in which a change of the weight is no change of the output by as much, as behind
    a non-linear function. Where the forward is that of the kind itself, nothing needs to be tried.

    Raises:
        MergeError: the two differ by more than rounding.
    """
    base = base_of(module)
    deltas = [delta for name, delta in deltas_of(module).items() if name in names]
    # Other parameters in the module's own forward are what they are when merged.
    exact = (Delta.forward, Difference.forward)
    changed = any(type(delta).forward not in exact and not delta.reweighs for delta in deltas)
    if not changed or base.is_textbook(module):
        return
    frozen, was_training = functools.partial(type(module).adopted_from.forward, module), module.training
    module.eval()
    try:
        with torch.no_grad():
            x = _probe(module, base.kind)
            with module.adapter_switch.using(active=names, merged=(), enabled=True):
                expected = run(module, frozen, x)
            with standing_in(module, folded):
                merged = frozen(x)
            error = (merged - expected).double().norm()
            change, size = (expected - frozen(x)).double().norm(), expected.double().norm()
    finally:
        module.train(was_training)
    if not error <= 0.01 * change + 4 * torch.finfo(module.weight.dtype).eps * size:
        raise MergeError(
            f"{type(module).__name__} has a forward of its own, in which a merged adapter is not what it was: on a "
            f"probe it misses by {float(error / change):.0%} of the change; exclude the module or keep the adapter "
            "apart"
        )


def _probe(module: Any, kind: str) -> Tensor:
    """A fixed input that the module's kind takes."""
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    if kind == "embedding":
        return torch.arange(min(module.num_embeddings, 64), device=weight.device)
    if kind == "conv":
        reach = [d * (k - 1) + 4 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        shape: tuple[int, ...] = (1, module.in_channels, *reach)
    else:
        shape = (4, base_of(module).features(module)[0])
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
