"""Optimizers that transformers lacks: AdamW with its state in main memory, and the two learning rates of LoRA+.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354) lets B learn faster than A, by groups of parameters for any optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from slimtune.errors import ConfigError


class OffloadedAdamW(torch.optim.Optimizer):
    """torch's AdamW, step for step, computed on the CPU with both moments in main memory.

    One tensor at a time, its weight and its gradient go to main memory and the new weight comes back. The gradient is
    taken when the step is made, so that clipping and accumulation count. Loshchilov & Hutter 2017, arXiv:1711.05101.
    """

    # Written by hand, for torchao's CPUOffloadOptimizer (0.18) copies a gradient in a hook of the backward pass, before
    # it is clipped, keeps weights and gradients in main memory too, and runs on CUDA and XPU alone. bitsandbytes' paged
    # optimizers move their state only when the GPU is full, and torch and transformers have none.

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As any optimizer's. torch puts the state on the device of the parameters, so it is moved back."""
        super().load_state_dict(dict(state_dict))
        for parameter, state in self.state.items():
            self.state[parameter] = {name: tensor.cpu() for name, tensor in state.items()}

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        weight = parameter.detach().cpu()
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight)}
            state |= {"exp_avg_sq": torch.zeros_like(weight)}
        beta1, beta2 = group["betas"]
        # torch's fused kernel for the CPU: one pass over weight, gradient and both moments, in place.
        adamw(
            [weight], [gradient.cpu()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], fused=True,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip
        if weight.device != parameter.device:
            parameter.copy_(weight)


def lora_plus_groups(
    model: nn.Module, lr: float, loraplus_lr_ratio: float, weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
) -> list[dict[str, Any]]:  # fmt: skip
    """Parameter groups with lr for A, `lr * loraplus_lr_ratio` for B, and a small lr of their own for embeddings.

    Biases and other one-dimensional parameters learn like B and are not decayed.

    Raises:
        ConfigError: nothing is trainable, or the ratio is not positive.
    """
    if loraplus_lr_ratio <= 0:
        raise ConfigError(f"loraplus_lr_ratio must be positive, found {loraplus_lr_ratio}; the paper suggests 16")
    fast = lr * loraplus_lr_ratio
    groups = {
        key: {"params": [], "lr": rate, "weight_decay": decay}
        for key, rate, decay in (
            ("A", lr, weight_decay),
            ("embedding", loraplus_lr_embedding, weight_decay),
            ("B", fast, weight_decay),
            ("B without decay", fast, 0.0),
        )
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group(name, parameter)]["params"].append(parameter)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise ConfigError(
            "nothing is trainable; attach an adapter with get_peft_model, or load it with is_trainable=True"
        )
    return filled


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0, loraplus_lr_embedding: float = 1e-6, **kwargs: Any,
) -> torch.optim.Optimizer:  # fmt: skip
    """An optimizer over `lora_plus_groups`; name and arguments are `peft`'s. Raises: ConfigError."""
    groups = lora_plus_groups(model, lr, loraplus_lr_ratio, loraplus_weight_decay, loraplus_lr_embedding)
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]


def _group(name: str, parameter: torch.Tensor) -> str:
    if "lora_embedding_" in name:
        return "embedding"
    if "lora_B" not in name and parameter.ndim > 1:
        return "A"
    return "B" if parameter.ndim > 1 else "B without decay"
