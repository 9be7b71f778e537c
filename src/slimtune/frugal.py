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

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        if args or kwargs or not _is_learning(module, x):
            return super().forward(x, *args, **kwargs)
        weight, formula = module.weight, formula_of(module)
        is_frozen = type(weight) in PLAIN_TENSORS and not weight.requires_grad and weight.dtype == x.dtype
        # Of float64, autograd keeps half: norms compute in float32.
        if formula is None or not is_frozen or x.dtype == torch.float64:
            return super().forward(x)
        return frozen_norm(x, weight, getattr(module, formula.epsilon), formula)


class GateActivation(Adopted):
    """Mixed in front of the activation of a gate."""

    adopted_from: ClassVar[type[nn.Module]]

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        # A hook is to see a tensor. Autocast is not in force where the backward pass computes the activation again.
        is_seen = module._forward_hooks or args or kwargs
        if is_seen or not _is_learning(module, x) or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        return LazyActivation(x, functools.partial(type(module).adopted_from.forward, module))


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


def _is_learning(module: Any, x: Any) -> bool:
    """Whether a gradient passes through a module that is itself."""
    return (
        type(x) in PLAIN_TENSORS
        and x.requires_grad
        and torch.is_grad_enabled()
        and not ("deltas" in module._modules or "instance_forward" in module.__dict__)
        and not is_traced()
    )
