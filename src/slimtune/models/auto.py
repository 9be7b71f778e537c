"""An adapter and its base in one call: `AutoPeftModelForCausalLM.from_pretrained(adapter_folder)`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar

from slimtune.adapters.embeddings import resize_as_stored
from slimtune.adapters.model import PeftModel
from slimtune.core.config import PeftConfig
from slimtune.errors import AdapterFileError
from slimtune.storage.peft_format import adapter_folder

BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class AutoPeftModel:
    """Loads the base that an adapter's config names, by the transformers class that the config names."""

    auto_class: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, adapter_name: str = "default", is_trainable: bool = False,
        config: PeftConfig | None = None, revision: str | None = None, **base: Any,
    ) -> Any:  # fmt: skip
        """The base model with the adapter attached.

        Args:
            revision: of the adapter's repository; the base's revision is the one in the config.
            base: what the transformers class's `from_pretrained` takes (dtype, device_map, ...), and the Hub's
                `token`, `cache_dir` and `subfolder`, which go to the adapter too. Weights are read from safetensors
                unless `use_safetensors=False` is given.

        Raises:
            AdapterFileError: the adapter can't be read, or names no base.
        """
        shared = {name: base[name] for name in ("token", "cache_dir", "subfolder") if name in base}
        base.pop("subfolder", None)
        # The adapter chooses what is loaded here, and reading a pickle can run code.
        base.setdefault("use_safetensors", True)
        adapter: dict[str, Any] = shared | ({"revision": revision} if revision else {})
        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **adapter)
        if not config.base_model_name_or_path:
            raise AdapterFileError(
                f"'{pretrained_model_name_or_path}' doesn't say which base it is for; load the base "
                "yourself and give it to PeftModel.from_pretrained"
            )
        model = cls._base_class(config).from_pretrained(
            config.base_model_name_or_path, **base, **({"revision": config.revision} if config.revision else {})
        )
        folder = adapter_folder(pretrained_model_name_or_path, **adapter)
        resize_as_stored(model, folder)
        return PeftModel.from_pretrained(
            model,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            **adapter,
        )

    @classmethod
    def _base_class(cls, config: PeftConfig) -> Any:
        model_class = named_class(config, cls.auto_class)
        if model_class is None:
            raise AdapterFileError(
                "the adapter's config names no transformers class for its base; use the AutoPeftModelFor"
                "... class of the task"
            )
        return model_class


def named_class(config: PeftConfig, auto_class: str | None = None) -> Any:
    """The transformers class that an adapter's config names, else the one for its task, or None."""
    import transformers

    named = (config.auto_mapping or {}).get("base_model_class")
    model_class = getattr(transformers, str(auto_class or named or BY_TASK.get(str(config.task_type))), None)
    # Only transformers' own classes: a config must not choose what code is imported.
    return model_class if inspect.isclass(model_class) and hasattr(model_class, "from_pretrained") else None


def own_auto_class(config: Any) -> Any:
    """The automatic class by which a model's folder offers a class of its own, None where it brings no such code."""
    import transformers

    offered = getattr(config, "auto_map", None) or {}
    with_head = [name for name in offered if name.startswith(("AutoModelFor", "AutoModelWith"))]
    # A folder may bring code for several heads; which of them its weights have, `architectures` says.
    stored = [name for name in with_head if str(offered[name]).rpartition(".")[2] in (config.architectures or [])]
    name = next(iter(stored + with_head), None)
    return getattr(transformers, str(name), None)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """An adapter together with its base, a decoder that writes text."""

    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An adapter together with its base, a model with an encoder and a decoder."""

    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """An adapter together with its base, a classifier of whole texts."""

    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """An adapter together with its base, a classifier of tokens."""

    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An adapter together with its base, a model that finds answers in a passage."""

    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An adapter together with its base, a model without a head."""

    auto_class = "AutoModel"
