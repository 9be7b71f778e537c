"""The optimizers that `training.optim` names, as a simulated step runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from slimtune.plan.setting import Setting
from slimtune.recipe.optimizers import BITSANDBYTES, OFFLOADED, PAGED, TORCHAO
from slimtune.train.optimizer import OffloadedAdamW

LEARNING_RATE = 1e-4
"""Any will do: memory doesn't depend on it."""
_PAGED_FROM = 100_000
"""bitsandbytes pages the state of parameters of at least so many numbers."""
_TORCH: dict[str, Any] = {
    "adamw_torch": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


def optimizer_for(setting: Setting, parameters: list[nn.Parameter]) -> Any:
    """The optimizer that training takes under this name."""
    name = setting.optimizer
    if name in (*BITSANDBYTES, *PAGED):
        return _bitsandbytes(name, parameters)
    if name in TORCHAO:
        return _torchao(name, parameters)
    if name == OFFLOADED:
        return OffloadedAdamW(parameters, lr=LEARNING_RATE)
    if name == "adafactor":
        return transformers.Adafactor(parameters, lr=LEARNING_RATE, scale_parameter=False, relative_step=False)
    if name in _TORCH:
        # On a GPU torch updates all tensors at once, which takes more of its memory.
        return _TORCH[name](parameters, lr=LEARNING_RATE, foreach=setting.device == "cuda")
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def is_elsewhere(setting: Setting, parameter: Tensor, state: Tensor) -> bool:
    """Whether a tensor of the optimizer's state lies in main memory, not on the device."""
    if setting.optimizer == OFFLOADED:
        return True
    is_paged = setting.optimizer in PAGED and parameter.numel() >= _PAGED_FROM
    return is_paged and state.untyped_storage().nbytes() >= parameter.numel()


def _bitsandbytes(name: str, parameters: list[nn.Parameter]) -> Any:
    import bitsandbytes

    optim: Any = bitsandbytes.optim
    kinds: dict[str, Any] = {"ademamix": optim.AdEMAMix, "lion": optim.Lion, "rmsprop": optim.RMSprop}
    kind = next((made for part, made in kinds.items() if part in name), optim.AdamW)
    # Not as paged: fake tensors have no pages. What would be paged is told apart afterwards.
    optimizer: Any = kind(parameters, lr=LEARNING_RATE, optim_bits=8 if "8bit" in name else 32)
    optimizer.fill_qmap()
    return optimizer


def _torchao(name: str, parameters: list[nn.Parameter]) -> Any:
    from torchao import optim

    kind = optim.AdamW8bit if name.endswith("8bit") else optim.AdamW4bit
    buffer: Callable[..., Tensor] = kind([nn.Parameter(torch.zeros(1))])._new_buffer
    return _Compiled(parameters, buffer)


class _Compiled(torch.optim.Optimizer):
    """The state of torchao's AdamW without its step, which is compiled into one kernel and allocates nothing."""

    def __init__(self, parameters: list[nn.Parameter], buffer: Callable[..., Tensor]) -> None:
        super().__init__(parameters, {})
        self.buffer = buffer

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state of what has none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    signed, unsigned = (self.buffer(parameter, is_signed) for is_signed in (True, False))
                    self.state[parameter] = {"step": torch.zeros(()), "exp_avg": signed, "exp_avg_sq": unsigned}
