"""A model that reads pictures or sounds beside texts, by its part for texts, which is what tuning on texts runs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from slimtune.errors import PlanError

_KEPT = "_slimtune_whole"
_PARTS = ("vision_config", "audio_config", "thinker_config")
_INHERITED = ("dtype", "quantization_config", "name_or_path")


@dataclass(frozen=True)
class WholeModel:
    """The model that a part for texts is of.

    Attributes:
        kind: the name of its configuration's class.
        text_class: the class that the part for texts is built of.
        other_parameters: of the parts that loading it holds in memory beside the part for texts; 0 where that part is
            loaded alone.
        is_loaded: whether transformers loads it for writing text, as `slimtune train` does.
    """

    kind: str
    text_class: type
    other_parameters: int
    is_loaded: bool

    def note(self, nbytes: int) -> str:
        """What the plan is of, in a line."""
        said = f"a {self.kind} is planned for its part for texts"
        if self.other_parameters:
            return f"{said}; its other parts, {nbytes / 1e9:.2f} GB of weights, lie beside it"
        return said if self.is_loaded else f"{said}; to train, save that part by itself"


def text_part(config: Any) -> Any:
    """The configuration of the part for texts of a model that reads more than texts; others as they are.

    Raises:
        PlanError: there is no part that writes text.
    """
    if not any(hasattr(config, part) for part in _PARTS):
        return config
    part = copy.deepcopy(config.get_text_config(decoder=True))
    loaded: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text_class = _text_class(config, part, loaded)
    if text_class is None:
        raise PlanError(
            f"a {type(config).__name__} is for a model that reads pictures or sounds, and its get_text_config() gives "
            "no part that writes text, whose step could be planned"
        )
    for name in _INHERITED:
        if getattr(part, name, None) in (None, "") and getattr(config, name, None) not in (None, ""):
            setattr(part, name, getattr(config, name))
    is_whole = loaded is not None and loaded.config_class is type(config)
    beside = _beside(config, part) if is_whole else 0
    setattr(part, _KEPT, WholeModel(type(config).__name__, text_class, beside, loaded is not None))
    return part


def whole_of(config: Any) -> WholeModel | None:
    """The model that a configuration is the part for texts of, None where it is a model by itself."""
    return getattr(config, _KEPT, None)


def _text_class(config: Any, part: Any, loaded: Any) -> Any:
    """What the part for texts is built of: its own class, the one that loading takes, or its decoder with a head."""
    own = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(part), None)
    if own is not None or (loaded is not None and loaded.config_class is type(part)):
        return own or loaded
    writes = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return TextDecoder if writes and type(part) in transformers.MODEL_MAPPING else None


def _beside(config: Any, part: Any) -> int:
    """Parameters of the whole model that its part for texts doesn't have."""
    with torch.device("meta"):
        whole, own = (transformers.AutoModel.from_config(copy.deepcopy(c)) for c in (config, part))
    return sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in own.parameters())


class TextDecoder(LlamaForCausalLM):
    """The decoder of a part for texts with a head, where transformers has none by itself (Qwen2-VL, Mllama)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = transformers.AutoModel.from_config(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
