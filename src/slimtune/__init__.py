"""slimtune: fine-tune large models on small hardware.

The public names are imported on first use: `import slimtune` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slimtune.console.noise import leave_out_noise

__version__ = "0.1.0"

_HOME = {
    "PeftConfig": "core.config",
    "TaskType": "core.config",
    "ConstraintConfig": "core.constraint",
    "PeftModel": "adapters.model",
    "get_peft_model": "adapters.model",
    "get_peft_model_state_dict": "adapters.adapter",
    "set_peft_model_state_dict": "adapters.adapter",
    "PEFT_TYPE_TO_CONFIG_MAPPING": "adapters.compat",
    "PeftType": "adapters.compat",
    "PeftMixedModel": "adapters.compat",
    "PeftModelForCausalLM": "adapters.compat",
    "PeftModelForSeq2SeqLM": "adapters.compat",
    "PeftModelForSequenceClassification": "adapters.compat",
    "PeftModelForTokenClassification": "adapters.compat",
    "PeftModelForQuestionAnswering": "adapters.compat",
    "PeftModelForFeatureExtraction": "adapters.compat",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": "adapters.compat",
    "get_peft_config": "adapters.compat",
    "inject_adapter_in_model": "adapters.compat",
    "load_peft_weights": "adapters.compat",
    "get_base_model_state_dict": "adapters.compat",
    "set_base_model_state_dict": "adapters.compat",
    "cast_mixed_precision_params": "adapters.compat",
    "rescale_adapter_scale": "adapters.compat",
    "disable_input_dtype_casting": "adapters.compat",
    "prepare_model_for_compiled_hotswap": "adapters.compat",
    "hotswap_adapter": "adapters.compat",
    "BaseTunerLayer": "adapters.compat",
    "LoraLayer": "adapters.compat",
    "AuxiliaryTrainingWrapper": "adapters.compat",
    "ModulesToSaveWrapper": "adapters.compat",
    "get_layer_status": "adapters.model_views",
    "get_model_status": "adapters.model_views",
    "AutoPeftModel": "models.auto",
    "AutoPeftModelForCausalLM": "models.auto",
    "AutoPeftModelForFeatureExtraction": "models.auto",
    "AutoPeftModelForQuestionAnswering": "models.auto",
    "AutoPeftModelForSeq2SeqLM": "models.auto",
    "AutoPeftModelForSequenceClassification": "models.auto",
    "AutoPeftModelForTokenClassification": "models.auto",
    "PromptEncoderReparameterizationType": "methods.prompt.p_tuning",
    "PromptTuningInit": "methods.prompt.prompt_tuning",
    "EvaConfig": "methods.lora.eva",
    "LoftQConfig": "methods.lora.loftq",
    "initialize_lora_eva_weights": "adapters.eva",
    "replace_lora_weights_loftq": "adapters.loftq",
    "dequantize": "quantization.dequantize",
    "load": "models.load",
    "check_shares": "models.prefix_trial",
    "shared_prefixes": "models.shared_prefixes",
    "short_attention": "models.short_attention",
    "Quantization": "quantization.config",
    "parts": "quantization.report",
    "QuantizeConfig": "slim.quantize",
    "quantize_": "slim.quantize",
    "prepare_model_for_kbit_training": "quantization.prepare",
    "Engine": "engine.engine",
    "Request": "engine.request",
    "SamplingParams": "engine.request",
    "load_diffusers_lora": "models.diffusers",
    "save_diffusers_lora": "models.diffusers",
    "lora_plus_groups": "train.optimizer",
    "create_loraplus_optimizer": "train.optimizer",
}

if TYPE_CHECKING:
    # What type checkers and editors see; at run time a method's file alone enrols its config.
    from slimtune.adapters.adapter import get_peft_model_state_dict as get_peft_model_state_dict
    from slimtune.adapters.adapter import set_peft_model_state_dict as set_peft_model_state_dict
    from slimtune.adapters.compat import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from slimtune.adapters.compat import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
    from slimtune.adapters.compat import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
    from slimtune.adapters.compat import BaseTunerLayer as BaseTunerLayer
    from slimtune.adapters.compat import LoraLayer as LoraLayer
    from slimtune.adapters.compat import ModulesToSaveWrapper as ModulesToSaveWrapper
    from slimtune.adapters.compat import PeftMixedModel as PeftMixedModel
    from slimtune.adapters.compat import PeftModelForCausalLM as PeftModelForCausalLM
    from slimtune.adapters.compat import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from slimtune.adapters.compat import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from slimtune.adapters.compat import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from slimtune.adapters.compat import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from slimtune.adapters.compat import PeftModelForTokenClassification as PeftModelForTokenClassification
    from slimtune.adapters.compat import PeftType as PeftType
    from slimtune.adapters.compat import cast_mixed_precision_params as cast_mixed_precision_params
    from slimtune.adapters.compat import disable_input_dtype_casting as disable_input_dtype_casting
    from slimtune.adapters.compat import get_base_model_state_dict as get_base_model_state_dict
    from slimtune.adapters.compat import get_peft_config as get_peft_config
    from slimtune.adapters.compat import hotswap_adapter as hotswap_adapter
    from slimtune.adapters.compat import inject_adapter_in_model as inject_adapter_in_model
    from slimtune.adapters.compat import load_peft_weights as load_peft_weights
    from slimtune.adapters.compat import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
    from slimtune.adapters.compat import rescale_adapter_scale as rescale_adapter_scale
    from slimtune.adapters.compat import set_base_model_state_dict as set_base_model_state_dict
    from slimtune.adapters.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
    from slimtune.adapters.loftq import replace_lora_weights_loftq as replace_lora_weights_loftq
    from slimtune.adapters.model import PeftModel as PeftModel
    from slimtune.adapters.model import get_peft_model as get_peft_model
    from slimtune.adapters.model_views import get_layer_status as get_layer_status
    from slimtune.adapters.model_views import get_model_status as get_model_status
    from slimtune.core.config import PeftConfig as PeftConfig
    from slimtune.core.config import TaskType as TaskType
    from slimtune.core.constraint import ConstraintConfig as ConstraintConfig
    from slimtune.engine.engine import Engine as Engine
    from slimtune.engine.request import Request as Request
    from slimtune.engine.request import SamplingParams as SamplingParams
    from slimtune.methods.adalora import AdaLoraConfig as AdaLoraConfig
    from slimtune.methods.bitfit import BitFitConfig as BitFitConfig
    from slimtune.methods.bottleneck import BottleneckConfig as BottleneckConfig
    from slimtune.methods.full import FullConfig as FullConfig
    from slimtune.methods.ia3 import IA3Config as IA3Config
    from slimtune.methods.last_layer import LastLayerConfig as LastLayerConfig
    from slimtune.methods.ln_tuning import LNTuningConfig as LNTuningConfig
    from slimtune.methods.lora.config import LoraConfig as LoraConfig
    from slimtune.methods.lora.eva import EvaConfig as EvaConfig
    from slimtune.methods.lora.loftq import LoftQConfig as LoftQConfig
    from slimtune.methods.lycoris.loha import LoHaConfig as LoHaConfig
    from slimtune.methods.lycoris.lokr import LoKrConfig as LoKrConfig
    from slimtune.methods.prompt.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from slimtune.methods.prompt.p_tuning import (
        PromptEncoderReparameterizationType as PromptEncoderReparameterizationType,
    )
    from slimtune.methods.prompt.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from slimtune.methods.prompt.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from slimtune.methods.prompt.prompt_tuning import PromptTuningInit as PromptTuningInit
    from slimtune.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from slimtune.methods.vera import VeraConfig as VeraConfig
    from slimtune.models.auto import AutoPeftModel as AutoPeftModel
    from slimtune.models.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from slimtune.models.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from slimtune.models.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from slimtune.models.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from slimtune.models.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from slimtune.models.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from slimtune.models.diffusers import load_diffusers_lora as load_diffusers_lora
    from slimtune.models.diffusers import save_diffusers_lora as save_diffusers_lora
    from slimtune.models.load import load as load
    from slimtune.models.prefix_trial import check_shares as check_shares
    from slimtune.models.shared_prefixes import shared_prefixes as shared_prefixes
    from slimtune.models.short_attention import short_attention as short_attention
    from slimtune.plan.plan import plan as plan
    from slimtune.quantization.config import Quantization as Quantization
    from slimtune.quantization.dequantize import dequantize as dequantize
    from slimtune.quantization.prepare import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from slimtune.quantization.report import parts as parts
    from slimtune.slim.quantize import QuantizeConfig as QuantizeConfig
    from slimtune.slim.quantize import quantize_ as quantize_
    from slimtune.train.optimizer import create_loraplus_optimizer as create_loraplus_optimizer
    from slimtune.train.optimizer import lora_plus_groups as lora_plus_groups


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
        from slimtune.core.config import methods

        value = next((config for config in methods().values() if config.__name__ == name), None)
    else:
        value = None
    if value is None:
        raise AttributeError(f"module 'slimtune' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from slimtune.core.config import methods

    return ["__version__", "plan", *_HOME, *(config.__name__ for config in methods().values())]
