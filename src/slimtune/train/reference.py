"""The base as the reference model of preference tuning: the tuned model with its adapters off, not a second copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from slimtune.adapters.forward import check_head
from slimtune.core.delta import deltas_of
from slimtune.errors import ConfigError, listing


class WithoutAdapter(nn.Module):
    """An adopted model with its adapters off, as a model of its own that holds no tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        # In a tuple, so that its parameters aren't counted, moved or stored a second time.
        self.shared = (model,)
        self.config = model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base computes, dropout off."""
        with _base_alone(self.shared[0]) as model:
            return model(*args, **kwargs)

    def base_model(self, *args: Any, **kwargs: Any) -> Any:
        """What the base computes up to its last hidden state; TRL's fused head asks a model for it by this name."""
        with _base_alone(self.shared[0]) as model:
            return model.base_model(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The frozen head."""
        return self.shared[0].get_output_embeddings()


@contextmanager
def _base_alone(model: Any) -> Iterator[Any]:
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield model
    finally:
        model.train(was_training)


def check_trl_reaches(model: Any, fused_head: bool) -> None:
    """See that no delta is passed by where TRL takes the layers' last hidden state, not what the model puts out.

    Args:
        fused_head: whether TRL multiplies by the head's weight itself too, in place of calling the head.

    Raises: ConfigError, for adapters around the whole model, and with a fused head for those on it or one in few bits.
    """
    if deltas_of(model):
        kinds = listing(str(model.peft_config[name].peft_type) for name in deltas_of(model))
        raise ConfigError(
            f"TRL reads a model's layers past what {kinds} puts around the whole model, which would not be trained; "
            f"choose a method inside of the layers (lora)"
        )
    if fused_head:
        check_head(model, otherwise=", or choose task orpo")


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Undo afterwards what TRL changes in a model: its forward, the dropout of its modules, its id of padding."""
    forwards = {name: vars(model).get(name) for name in ("forward", "instance_forward")}
    dropout = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    configs = [model.config.get_text_config(), model.generation_config]
    padding = [config.pad_token_id for config in configs]
    tags = getattr(model, "model_tags", None)
    try:
        with warnings.catch_warnings():
            # TRL asks transformers for checkpointing by names of which some versions say that they will change.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            yield
    finally:
        for name, forward in forwards.items():
            vars(model).pop(name, None)
            if forward is not None:
                vars(model)[name] = forward
        for module, p in dropout.items():
            module.p = p
        for config, pad_id in zip(configs, padding, strict=True):
            config.pad_token_id = pad_id
        model.model_tags = tags
