"""`prepare_model_for_kbit_training`, which flows written for `peft` call between loading and attaching."""

from __future__ import annotations

from typing import Any

from slimtune.bases import claim


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """Freeze a quantized model and have it checkpoint its layers; gives back the same object.

    Nothing is cast: `peft` makes float32 of all that isn't quantized, which doubles embeddings, output layer and norms
    and computes the logits in float32. Norms compute in float32 inside transformers, the loss does here, and adapters
    are held in it. `get_peft_model` needs no preparation; without checkpointing there is nothing left of this.

    Args:
        gradient_checkpointing_kwargs: of `torch.utils.checkpoint`; by default not reentrant, which computes nothing
            for the embeddings.

    Raises:
        DamagedBaseError: what is stored of a weight doesn't fit together.
    """
    claim(model)
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {"use_reentrant": False}
        if options.get("use_reentrant", True):
            # Gradients come only through inputs that need them.
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model
