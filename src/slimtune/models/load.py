"""A base model by folder, Hub id or packaged name, or an adapter together with its base."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimtune.errors import AdapterFileError, ConfigError, ModelNotFoundError, did_you_mean, require
from slimtune.models.device import DTYPES, computing_dtype, pick_device
from slimtune.ops.freed_memory import return_freed_memory
from slimtune.quantization.config import (
    INTEGER_KINDS,
    QUANTIZED_BASE,
    Quantization,
    few_tokens_read_codes,
    settings_of,
    stored_by_bitsandbytes,
    stored_by_compressed_tensors,
)
from slimtune.storage.foreign import MEND, reading_model, refuse_special_files
from slimtune.storage.source import base_of, folder_of, is_adapter, no_weight_bar
from slimtune.storage.text_files import read_json

if TYPE_CHECKING:
    from slimtune.quantization.config import Quantize, Settings

Task = Literal["text", "seq2seq", "classification", "token-classification", "features"]
"""What a model is loaded for: to write text, to write it behind an encoder, to label texts, to label their tokens, or
for its last hidden states."""

Work = Literal["batches", "tokens"]
"""Products with many tokens at once, or with few."""

_LABELS: dict[Task | None, tuple[str, str]] = {
    "classification": ("ForSequenceClassification", "gives texts no labels"),
    "token-classification": ("ForTokenClassification", "gives tokens no tags"),
}
"""What the class of a model that gives labels is called, and what one without such a head lacks."""

_HEAD_FIELDS = ("id2label", "label2id", "pad_token_id")
"""What the configuration of a classifier says beyond that of its base."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, whatever for.

    Attributes:
        dtype: auto (as stored, see `computes`), bfloat16, float16 or float32.
        device: auto (CUDA, then Apple's, then the CPU) or a device of torch's.
        trust_remote_code: run Python code that comes with the model.
        quantize: the base while it is read, as `slimtune.load` takes it.
        computes: batches, where the model trains or is scored; tokens, where it writes one after the other. `auto` is
            then the dtype that the device is quick in, see `computing_dtype_of`. None for a model that is written.
    """

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    quantize: Quantize | None = None
    computes: Work | None = None


def load(
    source: str | os.PathLike[str],
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantize: Quantize | None = None,
) -> tuple[Any, Any]:
    """The model and its tokenizer (None where it has none) for a folder, a Hub id, a packaged name or an adapter.

    A Hub id may have a revision behind it, `organisation/name@revision`. An adapter, by folder or id, brings its base
    with the adapter attached.

    Args:
        dtype: auto (as stored), bfloat16, float16 or float32.
        device: auto (CUDA, then Apple's, then the CPU) or a device of torch's.
        trust_remote_code: run Python code that comes with the model.
        quantize: the base while it is read: "nf4", "fp4", "int8", "int4", "int8-torchao" or "int4-torchao", a
            `Quantization`, or what transformers takes, a `BitsAndBytesConfig` or `TorchAoConfig`.

    Raises:
        ModelNotFoundError: no such model, or none with safetensors weights.
        AdapterFileError: a damaged adapter, or one that names no base.
        MissingDependencyError: the packaged model, or a library that quantizes, is not installed.
        ConfigError: a dtype, device or quantization that can't be.
    """
    return load_model(source, None, LoadOptions(dtype, device, trust_remote_code, quantize))


def load_model(
    source: str | os.PathLike[str],
    task: Task | None = None,
    options: LoadOptions = LoadOptions(),
    labels: Sequence[str] | None = None,
) -> tuple[Any, Any]:
    """As `load`, with the head that a task needs, and always with a tokenizer where there is a task.

    Args:
        task: None for the model as it is stored.
        labels: for the two classifications, those that a new head is to give; a base that has a head of as many keeps
            it. Without them, the model has to have such a head already, and comes in evaluation mode.

    Raises:
        ConfigError: a model that can't do the task.
    """
    source = os.fspath(source)
    if task == "features":
        model, tokenizer = _load_base(source, options, "AutoModel")
        model.eval()
    elif labels is not None:
        model, tokenizer = _load_with_new_head(source, f"AutoModel{_LABELS[task][0]}", labels, options)
    elif is_adapter(source):
        from slimtune.adapters.model import PeftModel

        base, tokenizer = load_base(source, options=options)
        model = PeftModel.from_pretrained(base, folder_of(source))
    else:
        model, tokenizer = _load_base(source, options)
    if labels is None:
        _check_does(model, task, source, tokenizer)
    if task is not None and tokenizer is None:
        raise ModelNotFoundError(f"{source} has no tokenizer; save the tokenizer into the folder of the model")
    return model, tokenizer


def _check_does(model: Any, task: Task | None, source: str, tokenizer: Any) -> None:
    """See that a model can do a task by the head that it has. Raises: ConfigError."""
    kind = type(model).__name__
    if task in ("text", "seq2seq") and not model.can_generate():
        raise ConfigError(f"{source} is a {kind}, which writes no text; pass a causal language model instead")
    if task == "seq2seq" and tokenizer is not None and not model.config.is_encoder_decoder:
        raise ConfigError(f"{source} is a {kind}, which has no encoder; leave task out, or pass text")
    if task in _LABELS:
        head, lacks = _LABELS[task]
        if tokenizer is None or not kind.endswith(head):
            raise ConfigError(f"{source} is a {kind}, which {lacks}; train it on such first")
        model.eval()


def load_base(adapter: str, base: str | None = None, options: LoadOptions = LoadOptions()) -> tuple[Any, Any]:
    """The base of an adapter, of the class that it was trained as, and the tokenizer that it was trained with.

    Args:
        base: in place of the one that the adapter names.
    """
    from slimtune.adapters.embeddings import resize_as_stored
    from slimtune.core.config import PeftConfig
    from slimtune.models.auto import named_class

    source = base or base_of(adapter)
    adapter = folder_of(adapter)
    head = _head_of(Path(adapter) / "config.json")
    model_class = named_class(PeftConfig.from_pretrained(adapter))
    model, tokenizer = _load_base(source, options, model_class, **head)
    resize_as_stored(model, Path(adapter))
    return model, load_tokenizer(adapter, options.trust_remote_code) or tokenizer


def _head_of(path: Path) -> dict[str, Any]:
    """What the configuration beside an adapter says of its head; an adapter for a language model has none."""
    try:
        if not path.is_file():
            return {}
        stored = read_json(path)
        fields = {name: stored[name] for name in _HEAD_FIELDS if stored.get(name) is not None}
        if "id2label" in fields:
            # JSON has no whole numbers as keys.
            fields["id2label"] = {int(number): label for number, label in fields["id2label"].items()}
        return fields
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{path} can't be read: {error}; restore the adapter") from error


def _load_with_new_head(source: str, auto_class: str, labels: Sequence[str], options: LoadOptions) -> tuple[Any, Any]:
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model, tokenizer = _load_base(source, options, auto_class, ignore_mismatched_sizes=True, **names)
    # Llama's and others' have none. The end of text serves: padding is masked, and a classifier reads the token before
    # it.
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer is not None and getattr(model.config, "pad_token_id", None) is None:
        # A decoder is read at its last token, which it finds by what is padding.
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _load_base(source: str, options: LoadOptions, model_class: Any = None, **config: Any) -> tuple[Any, Any]:
    """A whole model and its tokenizer, where it has one.

    Args:
        model_class: of transformers, or its name; by default the one that the model's config names.
        config: what is to be in the model's config in place of what is stored.
    """
    settings = None if options.quantize is None else settings_of(options.quantize)
    folder = folder_of(source, code=options.trust_remote_code)
    model = _read_model(folder, options, model_class, settings, config)
    if folder != source:
        # The name holds on every machine, the cache's folder on this one only.
        model.name_or_path = model.config.name_or_path = source
    tokenizer = load_tokenizer(folder, options.trust_remote_code)
    # The codes as they were read, and the tokenizer's file while it was parsed.
    return_freed_memory()
    return model, tokenizer


def _read_model(
    source: str, options: LoadOptions, model_class: Any, settings: Settings | None, config_fields: dict[str, Any]
) -> Any:
    import transformers

    from slimtune.models.auto import own_auto_class

    dtype, trusts = options.dtype, options.trust_remote_code
    if dtype not in DTYPES:
        raise ConfigError(f"no dtype '{dtype}'; pass one of {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    device = pick_device(options.device)
    if isinstance(model_class, str):
        model_class = getattr(transformers, model_class)
    config = read_model_config(source, trusts)
    if options.computes is not None and dtype == "auto":
        # Where codes are read as they are, few tokens in bf16 are faster than any product in float32 (ADR 24).
        is_quick = options.computes == "tokens" and few_tokens_read_codes(config, settings)
        dtype = dtype if is_quick else computing_dtype_of(config, device)
    chosen = model_class or (own_auto_class(config) if trusts else None) or class_of(config)
    # safetensors alone: a pickle can run code while it is read.
    how = config_fields | {"trust_remote_code": trusts, "dtype": dtype, "use_safetensors": True}
    # A class that was chosen brings a head of its own, which transformers would report as missing.
    with no_weight_bar(), _no_report() if model_class else contextlib.nullcontext():
        if settings is not None:
            return _quantized(chosen, source, config, settings, device, **how)
        return read_as_stored(chosen, source, config, device, **how)


def computing_dtype_of(config: Any, device: str) -> str:
    """`computing_dtype` of the model with this configuration."""
    is_quantized = getattr(config, "quantization_config", None) is not None
    if is_quantized and not (stored_by_bitsandbytes(config) or stored_by_compressed_tensors(config)):
        # The kernels of other libraries take the dtype that they were made for.
        return "auto"
    return computing_dtype(dtype_named_by(config), device)


def dtype_named_by(config: Any) -> str | None:
    """The dtype of the stored weights by a model's configuration, such as bfloat16; None where it names none."""
    dtype = getattr(config, "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def read_as_stored(model_class: Any, source: str, config: Any, device: str, **options: Any) -> Any:
    """`model_class.from_pretrained` of a folder in the numbers that it is stored in, plain or in codes of any kind.

    Args:
        config: of the folder.
    """
    if stored_by_compressed_tensors(config):
        require("accelerate", extra="quantized", purpose=QUANTIZED_BASE)
        from slimtune.quantization.integer import load_compressed

        return load_compressed(model_class, source, config, device, **options)
    if stored_by_bitsandbytes(config):
        require("accelerate", extra="quantized", purpose=QUANTIZED_BASE)
        require("bitsandbytes", extra="quantized", purpose=QUANTIZED_BASE)
        from slimtune.quantization.load import load_as_stored

        return load_as_stored(model_class, source, device, **options)
    with reading_model("the model", source):
        # Read on the CPU and moved whole: `device_map` would need accelerate, which a plain install hasn't.
        return model_class.from_pretrained(source, **options).to(device)


def read_model_config(source: str, trust_remote_code: bool = False) -> Any:
    """The configuration in a model's folder. Raises: ModelNotFoundError."""
    from transformers import AutoConfig

    refuse_special_files(source)
    with reading_model("the configuration can't be read, so that", source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    named = getattr(config, "architectures", None) or []
    if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ModelNotFoundError(f"the configuration of '{source}' names {named!r:.60} as architectures; {MEND}")
    return config


def _quantized(
    chosen: Any,
    source: str,
    config: Any,
    settings: Any,
    device: str,
    **options: Any,
) -> Any:
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{source} is quantized already; load it without quantize, or pass the folder in 16 bits")
    if type(settings).__name__ == "TorchAoConfig":
        require("accelerate", extra="torchao", purpose=QUANTIZED_BASE)
        from slimtune.bases.torchao import load_quantized as load_by_torchao

        return load_by_torchao(chosen, source, settings, device, **options)
    require("accelerate", extra="quantized", purpose=QUANTIZED_BASE)
    if isinstance(settings, Quantization) and settings.kind in INTEGER_KINDS:
        from slimtune.quantization.integer import load_integer

        return load_integer(chosen, source, settings, device, **options)
    require("bitsandbytes", extra="quantized", purpose=QUANTIZED_BASE)
    from slimtune.quantization.load import load_quantized

    return load_quantized(chosen, source, settings, device, **options)


def class_of(config: Any) -> Any:
    """The class of transformers that a config names, or else the one for language models."""
    import transformers

    named = [getattr(transformers, name, None) for name in config.architectures or []]
    classes = [kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
    return next(iter(classes), transformers.AutoModelForCausalLM)


@contextmanager
def _no_report() -> Iterator[None]:
    """Load without transformers' table of the tensors that were not in the file."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or Hub id, or None where there is none; raises ModelNotFoundError."""
    from transformers import AutoTokenizer

    # Without weights: `slimtune plan` needs no more of a model of many gigabytes.
    path = Path(source) if Path(source).is_dir() else Path(folder_of(source, weights=False, code=trust_remote_code))
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    # Looked for first: None is then a model without a tokenizer, and an error of AutoTokenizer a damaged one.
    if not any((path / name).is_file() for name in names):
        return None
    refuse_special_files(path)
    with reading_model("the tokenizer in", source):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        # Tried at once: what a config says of lengths and of spaces isn't read before the first text.
        tokenizer.decode(tokenizer("a")["input_ids"])
    return tokenizer
