"""Parts of a frozen model that keep less for the backward pass than autograd would: norms, and activations of gates."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import nn

from slimtune.adopt import Adopted, Switch, adopt
from slimtune.bases.dense import PLAIN_TENSORS
from slimtune.ops.frozen_norm import formula_of, frozen_norm
from slimtune.ops.gated import LazyActivation
from slimtune.ops.tracing import is_traced
from slimtune.structure import has_gate

_ACTIVATIONS = (nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.Tanh)


class FrozenNorm(Adopted):
    """Mixed in front of a root mean square norm."""

    adopted_from: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        if not _is_itself(module):
            return super().forward(*args, **kwargs)
        if kwargs or not _passes_gradients(*args):
            return self.adopted_from.forward(module, *args, **kwargs)
        (x,) = args
        weight, formula = module.weight, formula_of(module)
        # Of float64, autograd keeps half: norms compute in float32.
        is_alike = type(weight) in PLAIN_TENSORS and weight.dtype == x.dtype != torch.float64
        if formula is None or weight.requires_grad or not is_alike:
            return self.adopted_from.forward(module, x)
        return frozen_norm(x, weight, getattr(module, formula.epsilon), formula)


class GateActivation(Adopted):
    """Mixed in front of the activation of a gate."""

    adopted_from: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        if not _is_itself(module):
            return super().forward(*args, **kwargs)
        # A hook is to see a tensor. Autocast is not in force where the backward pass computes the activation again.
        is_seen = module._forward_hooks or kwargs or not _passes_gradients(*args)
        if is_seen or torch.is_autocast_enabled(args[0].device.type):
            return self.adopted_from.forward(module, *args, **kwargs)
        return LazyActivation(args[0], functools.partial(self.adopted_from.forward, module))


def adopt_frugal(model: nn.Module, switch: Switch) -> None:
    """Let the model's norms and gates keep less; what they compute stays the same."""
    for parent in list(model.modules()):
        is_gated = has_gate(parent)
        for child in parent.children():
            if is_gated and _is_activation(child):
                adopt(child, switch, GateActivation)
            elif formula_of(child) is not None:
                adopt(child, switch, FrozenNorm)


def _is_activation(module: Any) -> bool:
    known = type(module) in _ACTIVATIONS or type(module).__module__ == "transformers.activations"
    return known and not list(module.parameters()) and not getattr(module, "inplace", False)


def _is_itself(module: Any) -> bool:
    """Whether the module computes what its class does."""
    return not ("deltas" in module._modules or "instance_forward" in module.__dict__)


def _passes_gradients(*inputs: Any) -> bool:
    """Whether the only input is a tensor through which a gradient passes."""
    if len(inputs) != 1 or type(inputs[0]) not in PLAIN_TENSORS or not inputs[0].requires_grad:
        return False
    return torch.is_grad_enabled() and not is_traced()
