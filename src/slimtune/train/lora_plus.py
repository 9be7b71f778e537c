"""LoRA+: a learning rate of its own for B (Hayou et al. 2024, arXiv:2402.12354), as optimizer parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimtune.errors import ConfigError


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
    found = [group for group in groups.values() if group["params"]]
    if not found:
        raise ConfigError(
            "nothing is trainable; attach an adapter with get_peft_model, or load it with is_trainable=True"
        )
    return found


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
