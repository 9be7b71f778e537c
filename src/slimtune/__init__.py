"""slimtune: fine-tune large models on small hardware.

The public names are imported on first use: `import slimtune` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slimtune.noise import leave_out_noise

__version__ = "0.1.0"

_HOME = {
    "PeftConfig": "config",
    "TaskType": "config",
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
    "PromptEncoderReparameterizationType": "methods.p_tuning",
    "PromptTuningInit": "methods.prompt_tuning",
    "EvaConfig": "methods.lora_starts",
    "LoftQConfig": "methods.lora_starts",
    "initialize_lora_eva_weights": "eva",
    "replace_lora_weights_loftq": "loftq",
    "dequantize": "quantized.dequantize",
    "load": "loading",
    "Quantization": "quantized.settings",
    "parts": "quantized.report",
    "prepare_model_for_kbit_training": "quantized.preparing",
    "load_diffusers_lora": "diffusion",
    "save_diffusers_lora": "diffusion",
    "lora_plus_groups": "train.lora_plus",
    "create_loraplus_optimizer": "train.lora_plus",
}

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
    from slimtune.config import PeftConfig, TaskType
    from slimtune.diffusion import load_diffusers_lora, save_diffusers_lora
    from slimtune.eva import initialize_lora_eva_weights
    from slimtune.loading import load
    from slimtune.loftq import replace_lora_weights_loftq
    from slimtune.methods.lora import LoraConfig
    from slimtune.methods.lora_starts import EvaConfig, LoftQConfig
    from slimtune.methods.p_tuning import PromptEncoderReparameterizationType
    from slimtune.methods.prompt_tuning import PromptTuningInit
    from slimtune.model import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from slimtune.plan.ask import plan
    from slimtune.quantized.dequantize import dequantize
    from slimtune.quantized.preparing import prepare_model_for_kbit_training
    from slimtune.quantized.report import parts
    from slimtune.quantized.settings import Quantization
    from slimtune.train.lora_plus import create_loraplus_optimizer, lora_plus_groups


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    leave_out_noise()
    if name == "plan":
        return importlib.import_module("slimtune.plan")  # a package that is called
    if name in _HOME:
        value = getattr(importlib.import_module(f"slimtune.{_HOME[name]}"), name)
    elif name.endswith("Config"):
        # A method is enrolled by its file being there; its config needs no entry here.
        from slimtune.config import methods

        value = next((config for config in methods().values() if config.__name__ == name), None)
    else:
        value = None
    if value is None:
        raise AttributeError(f"module 'slimtune' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from slimtune.config import methods

    return ["__version__", "plan", *_HOME, *(config.__name__ for config in methods().values())]
