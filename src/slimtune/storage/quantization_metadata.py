"""What transformers and diffusers note of a quantized model: taken out of one that no longer is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

MODEL_MARKS = (
    "hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit",
    "is_4bit_serializable", "is_8bit_serializable",
)  # fmt: skip
CONFIG_MARKS = ("quantization_config", "_is_quantized", "_pre_quantization_dtype")
"""Where transformers and diffusers note that a model is quantized; a plain one could not be saved or trained then."""


def strip_quantization_metadata(model: nn.Module) -> None:
    """Take the quantization out of what a model and its configs say of themselves."""
    part: Any
    for part in model.modules():
        frozen = vars(part).get("_internal_dict")
        if isinstance(frozen, dict):
            # The config of diffusers, which can't be changed; `part.config` is made of it.
            kept = {name: value for name, value in frozen.items() if name not in CONFIG_MARKS}
            part._internal_dict = type(frozen)(kept)
        for owner, marks in ((part, MODEL_MARKS), (getattr(part, "config", None), CONFIG_MARKS)):
            for name in marks if owner is not None else ():
                vars(owner).pop(name, None)
    mend_saving(model)


def mend_saving(model: nn.Module) -> None:
    """Let a model that was loaded from a quantized folder be saved again.

    transformers writes a model by undoing what it did when it read it, and has nothing that undoes the reading of
    codes: it raises NotImplementedError. They are written as they are.
    """
    part: Any
    for part in model.modules():
        conversions = vars(part).get("_weight_conversions")
        if conversions:
            part._weight_conversions = [one for one in conversions if not _reads_codes(one)]


def _reads_codes(conversion: Any) -> bool:
    return any(getattr(step, "hf_quantizer", None) is not None for step in getattr(conversion, "operations", ()))
