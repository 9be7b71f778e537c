"""Our own integers while loading: quantized as tensors are read (int4), or read as compressed-tensors stores them.

transformers loads as ever; this says which modules get which tensors. While a stored model is read, its quantized
modules have the tensors of the file as parameters, and are made ours once all is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimtune.bases.int4 import LinearInt4
from slimtune.bases.int8 import EmbeddingInt8, LinearInt8, LinearW8A8
from slimtune.bases.integer import HoldsCodes, grid_weight
from slimtune.bases.packed import as_linear
from slimtune.errors import DamagedBaseError, listing
from slimtune.ops.grid import rounded
from slimtune.quantization.config import Quantization
from slimtune.quantization.linears import group_size_for, quantized_linears
from slimtune.storage.compressed import (
    CODES,
    PACKED,
    PACKED_FORMAT,
    PARTS,
    SCALE,
    SHAPE,
    ZERO,
    WeightScheme,
    read_config,
    scheme_for,
    write_config,
)
from slimtune.storage.foreign import open_tensors, read_not_mapped

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
"""By their names in a file."""


class Request(QuantizationConfigMixin):
    """What transformers chooses our quantizer by.

    Attributes:
        settings: how a plain model is quantized while it is read; None for one that is stored quantized.
        stored: the `quantization_config` of a stored one.
        modules: those whose quantized weights its files have: the tensors of each, and their dtypes.
    """

    def __init__(
        self,
        settings: Quantization | None,
        stored: dict[str, Any] | None = None,
        modules: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.settings, self.stored, self.modules = settings, stored, modules or {}
        self.quant_method: Any = "slimtune_integer"


def load_integer(chosen: Any, source: str, settings: Quantization, device: str, **options: Any) -> Any:
    """`chosen.from_pretrained` with the linear layers rounded to int4 as they are read; no data is needed.

    Raises:
        ConfigError: there is no linear layer, or one whose width the groups don't divide.
    """
    with read_not_mapped():
        return chosen.from_pretrained(source, quantization_config=Request(settings), device_map={"": device}, **options)


def load_compressed(chosen: Any, source: str, config: Any, device: str, **options: Any) -> Any:
    """`chosen.from_pretrained` of a folder in compressed-tensors' format, in integers.

    Args:
        config: of the folder.

    Raises:
        ConfigError: it is stored in a way that isn't read here.
        DamagedBaseError: what is stored of a weight doesn't fit together.
    """
    fields = {name: options.pop(name) for name in list(options) if hasattr(config, name) and name != "dtype"}
    for name, value in fields.items():
        setattr(config, name, value)
    noted = config.__dict__.pop("quantization_config")
    stored = noted if isinstance(noted, dict) else noted.to_dict()
    read_config(stored)  # what isn't read here is refused before the files are looked at
    request = Request(None, stored, _stored_weights(Path(source)))
    try:
        # The codes are packed anew, and what is mapped would stay beside them.
        with read_not_mapped():
            return chosen.from_pretrained(
                source, config=config, quantization_config=request, device_map={"": device}, **options
            )
    except RuntimeError as error:
        # transformers reports tensors of other shapes so, after a table of them.
        if "mismatch" not in str(error):
            raise
        raise DamagedBaseError(
            f"the weights of {source} have other shapes than its config.json says; fetch the model again"
        ) from error


def _stored_weights(folder: Path) -> dict[str, dict[str, str]]:
    """The modules of which a folder has a quantized weight: the tensors of each, and their dtypes."""
    dtypes: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        with open_tensors(file) as stored:
            dtypes |= {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118 - no mapping
    parts: dict[str, dict[str, str]] = {}
    for name, dtype in dtypes.items():
        module, _, part = name.rpartition(".")
        if part in PARTS or (part == CODES and dtype == "I8"):
            parts.setdefault(module, {})[part] = dtype
    return parts


@register_quantizer("slimtune_integer")
class _Quantizer(HfQuantizer):
    """Both ways: `targets` are the paths of what is quantized while it is read."""

    quantization_config: Any
    is_trainable = True  # pyright: ignore

    def __init__(self, request: Request, **options: Any) -> None:
        super().__init__(request, **options)
        self.request = request
        self.targets: set[str] = set()
        self.scales_read: dict[str, Tensor] = {}

    def is_serializable(self) -> Any:
        return True

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        settings = self.request.settings
        if settings is None:
            _make_shells(model, self.request)
            return
        names = quantized_linears(model, settings.keep)
        group_size_for(model, names, settings.blocksize)
        self.targets = set(names)

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.targets

    def get_quantize_ops(self) -> Any:
        return _Round(self)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        if self.request.settings is None:
            _fill_shells(model)
        for path, scales_OG in self.scales_read.items():
            # Only now: buffers that aren't in the files are drawn anew once these are read.
            model.get_submodule(path).weight_scale = scales_OG
        note_quantization(model, config_of(model))
        return model


def config_of(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a model whose modules hold codes."""
    held: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, HoldsCodes)}
    groups: dict[tuple[str, WeightScheme], list[str]] = {}
    for name, module in held.items():
        base = module.packed_base
        size = base.group_size(module)
        scheme = WeightScheme(
            base.bits,
            None if size == module.stored_shape[1] else size,
            (),
            base.format,
            symmetric=ZERO not in module._buffers,
            rounds_inputs=base.rounds_inputs,
        )
        groups.setdefault((_kind(module), scheme), []).append(name)
    rest = [name for name, module in model.named_modules() if _kind(module) in _LINEAR and name not in held]
    # The one scheme of most layers by their class, as engines fuse some of them; others by their names.
    most = max(groups, key=lambda key: (key[0] in _LINEAR, len(groups[key])), default=None)
    schemes = [
        replace(scheme, targets=(kind,) if (kind, scheme) == most else tuple(names))
        for (kind, scheme), names in sorted(groups.items(), key=lambda pair: pair[0] == most)
    ]
    return write_config(schemes, rest)


_LINEAR = ("Linear", "Conv1D")


def _kind(module: Any) -> str:
    """The name of the class that a module had before it held codes."""
    if not isinstance(module, HoldsCodes):
        return type(module).__name__
    return "Embedding" if module.packed_base.kind == "embedding" else vars(module).get("source_cls", nn.Linear).__name__


def note_quantization(model: Any, stored: dict[str, Any]) -> None:
    """Let a model's own account of itself say what it is stored as, so that a save is read again."""
    model.config.quantization_config = stored
    model.is_quantized = True
    # Both ends of a tie hold the same codes, under the names of the codes.
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    more = {
        f"{end.removesuffix('weight')}{part}": f"{source.removesuffix('weight')}{part}"
        for end, source in tied.items()
        if end.endswith(".weight") and isinstance(model.get_submodule(end.rpartition(".")[0]), HoldsCodes)
        for part in PARTS
    }
    if more:
        model.all_tied_weights_keys = tied | more
        model.__dict__["_tied_weights_keys"] = tied | more


class _Round(ConversionOps):
    """What transformers does to each weight that is read and rounded."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer: Any = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, model: Any, **others: Any) -> dict[str, Tensor]:  # type: ignore[override]
        done = {}
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            module: Any = model.get_submodule(path)
            # GPT-2's linear layers are stored as (in, out).
            weight_OI = weight.t() if issubclass(type(module), Conv1D) else weight
            new = rounded(weight_OI, self.quantizer.request.settings.blocksize, 4)
            # The codes of a layer, a byte each, live until they are packed, and not until all layers are.
            self.quantizer.scales_read[path] = new.scales
            LinearInt4.take(as_linear(module), *new)
            done[name] = module.weight
            # Or transformers would draw it, after the read, as a weight that was missing.
            module._is_hf_initialized = True
        return done


def _make_shells(model: Any, request: Request) -> None:
    """Give the modules that are stored quantized the tensors of the file as parameters, in place of their weights."""
    schemes, ignore = read_config(request.stored or {})
    tied_ends = {end.rpartition(".")[0] for end in model.all_tied_weights_keys}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            continue
        scheme = scheme_for(name, type(module).__name__, schemes, ignore)
        # A file may have been written from a model with another prefix before its names, or without its head.
        stored = next((parts for other, parts in request.modules.items() if _is_same(name, other)), None)
        if scheme is None and stored is None:
            continue
        shell: Any = as_linear(module)
        rows, columns = shell.weight.shape
        try:
            shapes = _shapes(scheme, rows, columns, stored, is_tied=name in tied_ends)
        except DamagedBaseError as error:
            raise DamagedBaseError(
                f"the quantized weight '{name}.weight' is damaged: {error}; fetch the model again"
            ) from error
        shell.was_dtype, shell.scheme = shell.weight.dtype, scheme
        del shell._parameters["weight"]
        for part, (shape, dtype) in shapes.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            shell.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        if CODES not in shapes:
            # For modules around it that draw the weights in them, as GPT-2's do before they are read.
            vars(shell)["weight"] = torch.empty(0)
        shell._is_hf_initialized = True
    # Ties are of what the modules have now, and are made before the shells are filled.
    shells = {name: list(module._parameters) for name, module in model.named_modules() if "scheme" in vars(module)}
    ties = dict(model.all_tied_weights_keys)
    model.all_tied_weights_keys = dict(_tied_parts(ties, shells))


def _is_same(name: str, other: str) -> bool:
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def _shapes(
    scheme: WeightScheme | None, rows: int, columns: int, stored: Mapping[str, str] | None, is_tied: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What the file has of a weight.

    Raises:
        DamagedBaseError: it has something else, which transformers would cast, or leave as memory that was there.
    """
    if scheme is None:
        raise DamagedBaseError("the file has it in codes, and config.json says that it is plain")
    if stored is None and not is_tied:
        raise DamagedBaseError("it is missing")
    if scheme.group_size is not None and columns % scheme.group_size:
        raise DamagedBaseError(f"a width of {columns} can't have groups of {scheme.group_size}")
    bits, groups = scheme.bits, columns // scheme.group_size if scheme.group_size else 1
    scales = (1,) if scheme.is_whole else (rows, groups)
    # A tied end has no tensors of its own, and takes those of the other.
    scale_dtype = _DTYPES.get((stored or {}).get(SCALE, "BF16"), torch.bfloat16)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {SCALE: (scales, scale_dtype)}
    if scheme.format == PACKED_FORMAT:
        shapes |= {PACKED: ((rows, -(-columns * bits // 32)), torch.int32), SHAPE: ((2,), torch.int64)}
    else:
        shapes |= {CODES: ((rows, columns), torch.int8)}
    if not scheme.symmetric:
        is_packed = scheme.format == PACKED_FORMAT and not scheme.is_whole
        shapes |= {ZERO: ((-(-rows * bits // 32), groups), torch.int32) if is_packed else (scales, torch.int8)}
    if stored is not None:
        absent = [part for part in shapes if part not in stored]
        if absent:
            raise DamagedBaseError(f"{listing(absent)} is missing")
        wrong = [part for part, (_, dtype) in shapes.items() if _DTYPES.get(stored[part]) != dtype]
        if wrong:
            raise DamagedBaseError(f"its {wrong[0]} is stored as {stored[wrong[0]]}")
    return shapes


def _tied_parts(ties: dict[str, str], shells: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    for end, source in ties.items():
        parts = shells.get(source.rpartition(".")[0])
        if parts is not None:
            for part in parts:
                yield f"{end.removesuffix('weight')}{part}", f"{source.removesuffix('weight')}{part}"
        else:
            yield end, source


def _fill_shells(model: Any) -> None:
    """Make shells ours. Raises: DamagedBaseError, where what was read doesn't fit together."""
    filled: dict[int, Any] = {}
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    for name, module in modules:
        if "scheme" not in vars(module):
            continue
        scheme: WeightScheme = module.__dict__.pop("scheme")
        dtype = module.__dict__.pop("was_dtype")
        vars(module).pop("weight", None)
        stored = {part: module._parameters.pop(part) for part in (*PARTS, CODES) if part in module._parameters}
        kind: Any = _class_for(module, scheme)
        # With a weight in its place again it is a whole module, whose codes can be checked against it.
        module.__class__ = kind
        other = filled.get(id(stored[SCALE]))
        try:
            if any(part is None or part.is_meta for part in stored.values()):
                raise DamagedBaseError("its codes, scales or shape are missing")
            if other is None:
                data = {part: tensor.data for part, tensor in stored.items()}
                module.put_codes(*grid_weight(data, scheme.bits, module.stored_shape), dtype)
        except DamagedBaseError as error:
            raise DamagedBaseError(
                f"the quantized weight '{name}.weight' is damaged: {error}; fetch the model again"
            ) from error
        if other is not None:
            # Tied: the very same codes and scales.
            module.compute_dtype = dtype
            module._parameters["weight"] = other.weight
            for part in (SCALE, ZERO):
                if part in other._buffers:
                    module.register_buffer(part, other._buffers[part], persistent=False)
        filled[id(stored[SCALE])] = module
    ties = {
        f"{end.removesuffix(SCALE)}weight": f"{source.removesuffix(SCALE)}weight"
        for end, source in model.all_tied_weights_keys.items()
        if end.endswith(f".{SCALE}")
    }
    rest = {e: s for e, s in model.all_tied_weights_keys.items() if not e.endswith(PARTS)}
    model.all_tied_weights_keys = rest | ties


def _class_for(module: nn.Module, scheme: WeightScheme) -> type[HoldsCodes]:
    if isinstance(module, nn.Embedding):
        return EmbeddingInt8
    if scheme.rounds_inputs:
        return LinearW8A8
    return LinearInt4 if scheme.bits == 4 else LinearInt8
