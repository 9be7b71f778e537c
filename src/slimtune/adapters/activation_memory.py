"""Parts of a frozen model that keep less for the backward pass than autograd would: norms, and activations of gates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapters.adopt import AdapterState, Adopted, adopt
from slimtune.core.roles import has_gate
from slimtune.ops.autograd import PLAIN_TENSORS, is_traced
from slimtune.ops.frozen_norm import formula_of, frozen_norm
from slimtune.ops.gated import LazyActivation

_ACTIVATIONS = (nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.Tanh)


class _Frugal(Adopted):
    """A part that is computed in its own way where a gradient passes through it, and by its class elsewhere."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        if "deltas" in module._modules or "instance_forward" in module.__dict__:
            return super().forward(*args, **kwargs)
        # The class's own and not `super()`: the mixin's next class is `Adopted`, which would look for deltas again.
        own = functools.partial(self.adopted_from.forward, module)
        # Inference and frozen prefixes take the plain path: there is no backward pass that could keep anything.
        if kwargs or not _passes_gradients(*args):
            return own(*args, **kwargs)
        return self.frugally(own, *args)

    def frugally(self, own: Callable[[Tensor], Tensor], x: Tensor) -> Any:
        raise NotImplementedError


class FrozenNorm(_Frugal):
    """Mixed in front of a root mean square norm."""

    def frugally(self, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        module: Any = self
        weight, formula = module.weight, formula_of(module)
        # Of float64, autograd keeps half: norms compute in float32.
        is_alike = type(weight) in PLAIN_TENSORS and weight.dtype == x.dtype != torch.float64
        if formula is None or weight.requires_grad or not is_alike:
            return own(x)
        return frozen_norm(x, weight, getattr(module, formula.epsilon), formula)


class GateActivation(_Frugal):
    """Mixed in front of the activation of a gate."""

    def frugally(self, own: Callable[[Tensor], Tensor], x: Tensor) -> Any:
        module: Any = self
        # A hook is to see a tensor. Autocast is not in force where the backward pass computes the activation again.
        if module._forward_hooks or torch.is_autocast_enabled(x.device.type):
            return own(x)
        return LazyActivation(x, own)


def adopt_frugal(model: nn.Module, adapter_state: AdapterState) -> None:
    """Let the model's norms and gates keep less; what they compute stays the same."""
    for parent in list(model.modules()):
        is_gated = has_gate(parent)
        for child in parent.children():
            if is_gated and _is_activation(child):
                adopt(child, adapter_state, GateActivation)
            elif formula_of(child) is not None:
                adopt(child, adapter_state, FrozenNorm)


def _is_activation(module: Any) -> bool:
    known = type(module) in _ACTIVATIONS or type(module).__module__ == "transformers.activations"
    # A parameter (PReLU) would need a gradient of its own, and an inplace function has no input left to be called again
    # on.
    return known and not list(module.parameters()) and not getattr(module, "inplace", False)


def _passes_gradients(*inputs: Any) -> bool:
    """Whether the only input is a tensor through which a gradient passes."""
    if len(inputs) != 1 or type(inputs[0]) not in PLAIN_TENSORS or not inputs[0].requires_grad:
        return False
    return torch.is_grad_enabled() and not is_traced()
