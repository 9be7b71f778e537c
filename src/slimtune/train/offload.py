"""AdamW whose state lives in main memory: for full tuning on a device that holds weights and gradients, but no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class OffloadedAdamW(torch.optim.Optimizer):
    """torch's AdamW, step for step, computed on the CPU with both moments in main memory.

    One tensor at a time, its weight and its gradient go to main memory and the new weight comes back. The gradient is
    taken when the step is made, so that clipping and accumulation count. Loshchilov & Hutter 2017, arXiv:1711.05101.
    """

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
        """As any optimizer's; torch puts the state beside the parameters, whence it goes back to main memory."""
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
        adamw(
            [weight], [gradient.cpu()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], fused=True,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip
        if weight.device != parameter.device:
            parameter.copy_(weight)
