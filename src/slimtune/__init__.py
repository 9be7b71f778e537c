"""slimtune: fine-tune large models on small hardware.

The public names are imported on first use: `import slimtune` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LoraConfig": "methods.lora",
    "PeftConfig": "delta",
    "TaskType": "delta",
    "PeftModel": "model",
    "get_peft_model": "model",
    "get_peft_model_state_dict": "model",
    "set_peft_model_state_dict": "model",
    "AutoPeftModel": "auto",
    "AutoPeftModelForCausalLM": "auto",
    "AutoPeftModelForFeatureExtraction": "auto",
    "AutoPeftModelForQuestionAnswering": "auto",
    "AutoPeftModelForSeq2SeqLM": "auto",
    "AutoPeftModelForSequenceClassification": "auto",
    "AutoPeftModelForTokenClassification": "auto",
    "load": "loading",
    "lora_plus_groups": "train.lora_plus",
    "create_loraplus_optimizer": "train.lora_plus",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from slimtune.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from slimtune.delta import PeftConfig, TaskType
    from slimtune.loading import load
    from slimtune.methods.lora import LoraConfig
    from slimtune.model import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from slimtune.train.lora_plus import create_loraplus_optimizer, lora_plus_groups


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimtune' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"slimtune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
