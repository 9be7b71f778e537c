"""A base model by folder, Hub id or packaged name, or an adapter together with its base."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.errors import (
    AdapterFileError,
    ConfigError,
    ModelNotFoundError,
    SlimtuneError,
    did_you_mean,
    first_line,
    listing,
)
from slimtune.models.device import DTYPES, pick_device
from slimtune.quantization.config import require, settings_of, stored_by_bitsandbytes
from slimtune.storage.source import PACKAGED, base_of, folder_of, is_adapter, no_weight_bar
from slimtune.storage.text_files import read_json

if TYPE_CHECKING:
    from slimtune.quantization.config import Quantize, Settings

HEAD_FIELDS = ("id2label", "label2id", "pad_token_id")
"""What the configuration of a classifier says beyond that of its base."""


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
        quantize: the base while it is read: "nf4", "fp4", "int8", "int8-torchao" or "int4-torchao", a `Quantization`,
            or what transformers takes, a `BitsAndBytesConfig` or `TorchAoConfig`.

    Raises:
        ModelNotFoundError: no such model, or none with safetensors weights.
        AdapterFileError: a damaged adapter, or one that names no base.
        MissingDependencyError: the packaged model, or a library that quantizes, is not installed.
        ConfigError: a dtype, device or quantization that can't be.
    """
    source = os.fspath(source)
    if is_adapter(source):
        from slimtune.adapters.model import PeftModel

        model, tokenizer = load_base(source, None, dtype, device, trust_remote_code, quantize)
        return PeftModel.from_pretrained(model, folder_of(source)), tokenizer
    return _load(source, dtype, device, trust_remote_code, quantize=quantize)


def load_base(
    adapter: str,
    base: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantize: Quantize | None = None,
) -> tuple[Any, Any]:
    """The base of an adapter, of the class that it was trained as, and the tokenizer that it was trained with.

    Args:
        base: in place of the one that the adapter names.
    """
    from slimtune.core.config import PeftConfig
    from slimtune.models.auto import named_class

    source = base or base_of(adapter)
    adapter = folder_of(adapter)
    head = _head_of(Path(adapter) / "config.json")
    model_class = named_class(PeftConfig.from_pretrained(adapter))
    model, tokenizer = _load(source, dtype, device, trust_remote_code, model_class, quantize, **head)
    return model, load_tokenizer(adapter, trust_remote_code) or tokenizer


def load_classifier(
    source: str,
    labels: Sequence[str],
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantize: Quantize | None = None,
) -> tuple[Any, Any]:
    """A base with a head for these labels, new unless the base has one of that size; raises as `load`."""
    from transformers import AutoModelForSequenceClassification

    return _with_head(AutoModelForSequenceClassification, labels, source, dtype, device, trust_remote_code, quantize)


def load_tagger(source: str, tags: Sequence[str], *how: Any, **options: Any) -> tuple[Any, Any]:
    """A base with a head that gives each token one of these tags, new unless the base has one; raises as `load`."""
    from transformers import AutoModelForTokenClassification

    return _with_head(AutoModelForTokenClassification, tags, source, *how, **options)


def _with_head(
    auto_class: Any, labels: Sequence[str], source: str, dtype: str = "auto", device: str = "auto",
    trust_remote_code: bool = False, quantize: Quantize | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model, tokenizer = _load(
        source, dtype, device, trust_remote_code, auto_class, quantize, ignore_mismatched_sizes=True, **named
    )
    if tokenizer is None:
        raise ModelNotFoundError(f"{source} has no tokenizer; save the tokenizer into the folder of the model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        # A decoder is read at its last token, which it finds by what is padding.
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_trained_classifier(
    source: str,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantize: Quantize | None = None,
) -> tuple[Any, Any]:
    """As `load`, for a model that gives texts labels; raises ConfigError for any other."""
    model, tokenizer = load(source, dtype, device, trust_remote_code, quantize)
    if tokenizer is None or not type(model).__name__.endswith("ForSequenceClassification"):
        raise ConfigError(f"{source} is a {type(model).__name__}, which gives texts no labels; train it on such first")
    return model.eval(), tokenizer


def load_trained_tagger(source: str, *how: Any, **options: Any) -> tuple[Any, Any]:
    """As `load`, for a model that gives each token a tag; raises ConfigError for any other."""
    model, tokenizer = load(source, *how, **options)
    if tokenizer is None or not type(model).__name__.endswith("ForTokenClassification"):
        raise ConfigError(f"{source} is a {type(model).__name__}, which gives tokens no tags; train it on such first")
    return model.eval(), tokenizer


def load_seq2seq(source: str, *how: Any, **options: Any) -> tuple[Any, Any]:
    """As `load`, for a model whose encoder reads a text and whose decoder writes one; raises ConfigError if not."""
    model, tokenizer = load_text_model(source, *how, **options)
    if not model.config.is_encoder_decoder:
        raise ConfigError(f"{source} is a {type(model).__name__}, which has no encoder; leave task out, or pass text")
    return model, tokenizer


def load_encoder(
    source: str,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantize: Quantize | None = None,
) -> tuple[Any, Any]:
    """A base without any head, and its tokenizer, for features; raises as `load`."""
    from transformers import AutoModel

    model, tokenizer = _load(source, dtype, device, trust_remote_code, AutoModel, quantize)
    if tokenizer is None:
        raise ModelNotFoundError(f"{source} has no tokenizer; save the tokenizer into the folder of the model")
    return model.eval(), tokenizer


def _load(
    source: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    model_class: Any = None,
    quantize: Quantize | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    settings = None if quantize is None else settings_of(quantize)
    folder = folder_of(source, code=trust_remote_code)
    model = _load_model(folder, dtype, device, trust_remote_code, model_class, settings, **options)
    if folder != source:
        # The name holds on every machine, the cache's folder on this one only.
        model.name_or_path = model.config.name_or_path = source
    return model, load_tokenizer(folder, trust_remote_code)


def _head_of(path: Path) -> dict[str, Any]:
    """What the configuration beside an adapter says of its head; an adapter for a language model has none."""
    if not path.is_file():
        return {}
    try:
        stored = read_json(path)
        found = {name: stored[name] for name in HEAD_FIELDS if stored.get(name) is not None}
        if "id2label" in found:
            found["id2label"] = {int(number): label for number, label in found["id2label"].items()}
        return found
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{path} can't be read: {error}; restore the adapter") from error


def load_text_model(
    source: str | os.PathLike[str],
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantize: Quantize | None = None,
) -> tuple[Any, Any]:
    """As `load`, for a model that writes text; raises ConfigError for any other."""
    model, tokenizer = load(source, dtype, device, trust_remote_code, quantize)
    if not model.can_generate():
        raise ConfigError(
            f"{source} is a {type(model).__name__}, which writes no text; pass a causal language model instead"
        )
    if tokenizer is None:
        raise ModelNotFoundError(f"{source} has no tokenizer; save the tokenizer into the folder of the model")
    return model, tokenizer


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or Hub id, or None where there is none; raises ModelNotFoundError."""
    from transformers import AutoTokenizer

    path = Path(source) if Path(source).is_dir() else Path(folder_of(source, weights=False, code=trust_remote_code))
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((path / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"the tokenizer in {source} can't be loaded: {first_line(error)}") from error


def _load_model(
    source: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    model_class: Any,
    settings: Settings | None,
    **options: Any,
) -> Any:
    import transformers
    from safetensors import SafetensorError

    if dtype not in DTYPES:
        raise ConfigError(f"no dtype '{dtype}'; pass one of {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    device = pick_device(device)
    options |= {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        # A class that was chosen brings a head of its own, which transformers would report as missing.
        with no_weight_bar(), _no_report() if model_class else contextlib.nullcontext():
            chosen = model_class or _model_class(config)
            options |= {"dtype": dtype, "use_safetensors": True}
            if settings is not None or stored_by_bitsandbytes(config):
                return _quantized(chosen, source, config, settings, device, **options)
            return chosen.from_pretrained(source, **options).to(device)
    except SlimtuneError:
        raise
    except SafetensorError as error:
        raise ModelNotFoundError(f"the weights of {source} are damaged ({error}); fetch the model again") from error
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"the model '{source}' can't be loaded: {first_line(error)}; pass a model folder, a Hub id that can be "
            f"reached, or a packaged name ({listing(PACKAGED)})"
        ) from error


def _quantized(
    chosen: Any,
    source: str,
    config: Any,
    settings: Any,
    device: str,
    **options: Any,
) -> Any:
    if settings is not None and getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{source} is quantized already; load it without quantize, or pass the folder in 16 bits")
    by_torchao = type(settings).__name__ == "TorchAoConfig"
    require("accelerate", "torchao" if by_torchao else "quantized")
    if by_torchao:
        from slimtune.bases.torchao import load_quantized as load_by_torchao

        return load_by_torchao(chosen, source, settings, device, **options)
    require("bitsandbytes", "quantized")
    from slimtune.quantization.load import load_as_stored, load_quantized

    if settings is None:
        return load_as_stored(chosen, source, device, **options)
    return load_quantized(chosen, source, settings, device, **options)


def _model_class(config: Any) -> Any:
    import transformers

    named = [getattr(transformers, name, None) for name in config.architectures or []]
    return next(filter(None, named), transformers.AutoModelForCausalLM)


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
