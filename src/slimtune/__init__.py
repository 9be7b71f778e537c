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
    "get_peft_model_state_dict": "saving",
    "set_peft_model_state_dict": "saving",
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
    # What type checkers and editors see; at run time a method's file alone enrols its config.
    from slimtune.auto import AutoPeftModel as AutoPeftModel
    from slimtune.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from slimtune.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from slimtune.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from slimtune.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from slimtune.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from slimtune.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from slimtune.config import PeftConfig as PeftConfig
    from slimtune.config import TaskType as TaskType
    from slimtune.diffusion import load_diffusers_lora as load_diffusers_lora
    from slimtune.diffusion import save_diffusers_lora as save_diffusers_lora
    from slimtune.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
    from slimtune.loading import load as load
    from slimtune.loftq import replace_lora_weights_loftq as replace_lora_weights_loftq
    from slimtune.methods.adalora import AdaLoraConfig as AdaLoraConfig
    from slimtune.methods.bitfit import BitFitConfig as BitFitConfig
    from slimtune.methods.bottleneck import BottleneckConfig as BottleneckConfig
    from slimtune.methods.full import FullConfig as FullConfig
    from slimtune.methods.ia3 import IA3Config as IA3Config
    from slimtune.methods.last_layer import LastLayerConfig as LastLayerConfig
    from slimtune.methods.ln_tuning import LNTuningConfig as LNTuningConfig
    from slimtune.methods.loha import LoHaConfig as LoHaConfig
    from slimtune.methods.lokr import LoKrConfig as LoKrConfig
    from slimtune.methods.lora import LoraConfig as LoraConfig
    from slimtune.methods.lora_starts import EvaConfig as EvaConfig
    from slimtune.methods.lora_starts import LoftQConfig as LoftQConfig
    from slimtune.methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from slimtune.methods.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from slimtune.methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from slimtune.methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from slimtune.methods.prompt_tuning import PromptTuningInit as PromptTuningInit
    from slimtune.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from slimtune.methods.vera import VeraConfig as VeraConfig
    from slimtune.model import PeftModel as PeftModel
    from slimtune.model import get_peft_model as get_peft_model
    from slimtune.plan.ask import plan as plan
    from slimtune.quantized.dequantize import dequantize as dequantize
    from slimtune.quantized.preparing import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from slimtune.quantized.report import parts as parts
    from slimtune.quantized.settings import Quantization as Quantization
    from slimtune.saving import get_peft_model_state_dict as get_peft_model_state_dict
    from slimtune.saving import set_peft_model_state_dict as set_peft_model_state_dict
    from slimtune.train.lora_plus import create_loraplus_optimizer as create_loraplus_optimizer
    from slimtune.train.lora_plus import lora_plus_groups as lora_plus_groups


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
