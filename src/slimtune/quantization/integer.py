"""Our own integers while loading: quantized as tensors are read (int4), or read as compressed-tensors stores them.

transformers loads as ever; this says which modules get which tensors. While a stored model is read, its quantized
modules have the tensors of the file as parameters, and are made ours once all is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimtune.bases.int4 import LinearInt4
from slimtune.bases.int8 import EmbeddingInt8, LinearInt8
from slimtune.bases.integer import PACKED, SCALE, SHAPE, HoldsCodes, unpacked
from slimtune.errors import ConfigError, DamagedBaseError, did_you_mean, listing
from slimtune.ops.grid import SCALE_DTYPE, nearest_codes, searched_scales
from slimtune.quantization.config import INTEGER_GROUPS, Quantization
from slimtune.storage.compressed import WeightScheme, read_config, scheme_for, write_config

_PARTS = (PACKED, SCALE, SHAPE)


class Request(QuantizationConfigMixin):
    """What transformers chooses our quantizer by.

    Attributes:
        settings: how a plain model is quantized while it is read; None for one that is stored quantized.
        stored: the `quantization_config` of a stored one.
        modules: those whose weights its files have.
    """

    def __init__(
        self, settings: Quantization | None, stored: dict[str, Any] | None = None, modules: frozenset[str] = frozenset()
    ) -> None:
        self.settings, self.stored, self.modules = settings, stored, modules
        self.quant_method: Any = "slimtune_integer"


def load_integer(chosen: Any, source: str, settings: Quantization, device: str, **options: Any) -> Any:
    """`chosen.from_pretrained` with the linear layers rounded to int4 as they are read; no data is needed.

    Raises:
        ConfigError: there is no linear layer, or one whose width the groups don't divide.
    """
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
    stored = config.__dict__.pop("quantization_config")
    request = Request(None, stored if isinstance(stored, dict) else stored.to_dict(), _stored_weights(Path(source)))
    try:
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


def _stored_weights(folder: Path) -> frozenset[str]:
    """The modules of which a folder has a quantized weight.

    Raises:
        DamagedBaseError: a part of one is missing.
    """
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as stored:
            names |= set(stored.keys())
    modules = {name.rpartition(".")[0] for name in names if name.endswith(_PARTS)}
    for module in sorted(modules):
        absent = [part for part in _PARTS if f"{module}.{part}" not in names]
        if absent:
            raise DamagedBaseError(
                f"the quantized weight '{module}.weight' is damaged: {listing(absent)} is missing; fetch the model "
                "again"
            )
    return frozenset(modules)


def group_size_for(model: nn.Module, names: list[str], group_size: int, option: str = "keep") -> None:
    """See that groups divide the widths of these linear layers.

    Args:
        option: what leaves layers out, for the error.

    Raises:
        ConfigError: a width that they don't divide.
    """
    layers: list[Any] = [model.get_submodule(name) for name in names]
    widths: set[int] = {layer.in_features for layer in layers}
    wrong = sorted(width for width in widths if width % group_size)
    if wrong:
        fitting = [size for size in INTEGER_GROUPS if not any(width % size for width in widths)]
        advice = (
            f"take groups of {' or '.join(map(str, fitting))}" if fitting else f"leave those layers out with {option}"
        )
        raise ConfigError(
            f"groups of {group_size} don't divide linear layers of width {', '.join(map(str, wrong))}; {advice}"
        )


def quantized_linears(model: Any, keep: Any = ()) -> list[str]:
    """The paths of the linear layers that are quantized: all but the output layer and what is to be kept.

    Raises:
        ConfigError: there is none, or a name to keep that none has.
    """
    # One that carries adapters is what it was.
    types = {name: getattr(type(module), "adopted_from", type(module)) for name, module in model.named_modules()}
    linear = [name for name, kind in types.items() if kind is nn.Linear]
    for pattern in keep:
        if all(should_convert_module(name, [pattern]) for name in linear):
            last = {name.rpartition(".")[2] for name in linear}
            near = did_you_mean(pattern, [*last, *linear]) or f"; there are {listing(last)}"
            raise ConfigError(f"keep names '{pattern}', but {type(model).__name__} has no such linear layer{near}")
    # By the order in which the model makes its parts: a head comes last, also one with a bias.
    last_module = list(model.named_parameters())[-1][0].rpartition(".")[0]
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
    kept = {*skipped, *keep, *({last_module} & set(linear))}
    names = [name for name in linear if should_convert_module(name, list(kept))]
    if not names:
        has_conv1d = any(isinstance(module, Conv1D) for module in model.modules())
        advice = "nf4 takes GPT-2's Conv1D, which the format of integers doesn't" if has_conv1d else "leave it as it is"
        beside = listing(linear) or "none at all"
        raise ConfigError(f"{type(model).__name__} has no linear layer to quantize beside {beside}; {advice}")
    return names


@register_quantizer("slimtune_integer")
class _Quantizer(HfQuantizer):
    """Both ways: `targets` are the paths of what is quantized while it is read."""

    quantization_config: Any
    is_trainable = True  # pyright: ignore

    def __init__(self, request: Request, **options: Any) -> None:
        super().__init__(request, **options)
        self.request = request
        self.targets: set[str] = set()
        self.scales: dict[str, Tensor] = {}

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
        for path, scales_OG in self.scales.items():
            # Only now: buffers that aren't in the files are drawn anew once these are read.
            model.get_submodule(path).weight_scale = scales_OG
        note_quantization(model, self.request.stored or config_of(model))
        return model


def config_of(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a model whose modules hold codes."""
    held = {name: module for name, module in model.named_modules() if isinstance(module, HoldsCodes)}
    groups: dict[tuple[int, int | None, bool], list[str]] = {}
    for name, module in held.items():
        base = module.packed_base
        size = base.group_size(module)
        row = base.features(module)[base.is_transposed]
        groups.setdefault((base.bits, None if size == row else size, base.is_transposed), []).append(name)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    rest = [name for name, kind in kinds.items() if kind == "Linear" and name not in held]
    # The one scheme of most layers by their class, as engines fuse some of them; others by their names.
    most = max(groups, key=lambda key: (not key[2], len(groups[key])), default=None)
    schemes = [
        WeightScheme(bits, size, ("Linear",) if key == most else tuple(names))
        for key, names in sorted(groups.items(), key=lambda pair: pair[0] == most)
        for bits, size, _ in [key]
    ]
    return write_config(schemes, rest)


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
        for part in _PARTS
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
            weight_OI: Tensor = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            module: Any = model.get_submodule(path)
            scales_OG = searched_scales(weight_OI, self.quantizer.request.settings.blocksize, 4)
            self.quantizer.scales[path] = scales_OG
            LinearInt4.take(module, nearest_codes(weight_OI, scales_OG, 4), scales_OG)
            done[name] = module.weight
            # Or transformers would draw it, after the read, as a weight that was missing.
            module._is_hf_initialized = True
        return done


def _make_shells(model: Any, request: Request) -> None:
    """Give the modules that are stored quantized the tensors of the file as parameters, in place of their weights."""
    schemes, ignore = read_config(request.stored or {})
    tied_ends = {end.rpartition(".")[0] for end in model.all_tied_weights_keys}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        scheme = scheme_for(name, type(module).__name__, schemes, ignore)
        if scheme is None:
            continue
        # A file may have been written from a model with another prefix before its names, or without its head.
        is_stored = any(
            f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}") for other in request.modules
        )
        if not is_stored and name not in tied_ends:
            raise DamagedBaseError(f"the quantized weight '{name}.weight' is missing; fetch the model again")
        rows, columns = module.weight.shape
        if scheme.group_size is not None and columns % scheme.group_size:
            raise DamagedBaseError(f"the quantized weight '{name}.weight' of width {columns} can't have its groups")
        groups = 1 if scheme.group_size is None else columns // scheme.group_size
        module.was_dtype, module.bits = module.weight.dtype, scheme.bits  # type: ignore[assignment]
        del module._parameters["weight"]
        words = -(-columns * scheme.bits // 32)
        for part, shape, dtype in (
            (PACKED, (rows, words), torch.int32), (SCALE, (rows, groups), SCALE_DTYPE), (SHAPE, (2,), torch.int64),
        ):  # fmt: skip
            empty = torch.empty(shape, dtype=dtype, device="meta")
            module.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        module._is_hf_initialized = True  # type: ignore[assignment]
    # Ties are of what the modules have now, and are made before the shells are filled.
    shells = {name for name, module in model.named_modules() if PACKED in module._parameters}
    ties = dict(model.all_tied_weights_keys)
    model.all_tied_weights_keys = dict(_tied_parts(ties, shells))


def _tied_parts(ties: dict[str, str], shells: set[str]) -> Iterator[tuple[str, str]]:
    for end, source in ties.items():
        if source.rpartition(".")[0] in shells:
            for part in _PARTS:
                yield f"{end.removesuffix('weight')}{part}", f"{source.removesuffix('weight')}{part}"
        else:
            yield end, source


def _fill_shells(model: Any) -> None:
    """Make shells ours. Raises: DamagedBaseError, where what was read doesn't fit together."""
    filled: dict[int, Any] = {}
    shells: Iterable[tuple[str, Any]] = model.named_modules()
    for name, module in shells:
        if PACKED not in module._parameters:
            continue
        packed, scales_OG, shape = (module._parameters.pop(part) for part in _PARTS)
        dtype, bits = (module.__dict__.pop(mark) for mark in ("was_dtype", "bits"))
        kind: Any = EmbeddingInt8 if isinstance(module, nn.Embedding) else LinearInt4 if bits == 4 else LinearInt8
        # With a weight in its place again it is a whole module, whose codes can be checked against it.
        module.__class__ = kind
        shell: Any = module
        other = filled.get(id(packed))
        try:
            if any(part is None or part.is_meta for part in (packed, scales_OG, shape)):
                raise DamagedBaseError("its codes, scales or shape are missing")
            codes_OI = other.weight.data if other else unpacked(
                kind.packed_base, packed, scales_OG, shape, shell.stored_shape
            )  # fmt: skip
        except DamagedBaseError as error:
            raise DamagedBaseError(
                f"the quantized weight '{name}.weight' is damaged: {error}; fetch the model again"
            ) from error
        shell.put_codes(codes_OI, scales_OG.data, dtype)
        if other is not None:
            # Tied: the very same codes and scales.
            module._parameters["weight"], module._buffers["weight_scale"] = other.weight, other.weight_scale
        filled[id(packed)] = module
    ties = {
        f"{end.removesuffix(PACKED)}weight": f"{source.removesuffix(PACKED)}weight"
        for end, source in model.all_tied_weights_keys.items()
        if end.endswith(PACKED)
    }
    rest = {e: s for e, s in model.all_tied_weights_keys.items() if not e.endswith(_PARTS)}
    model.all_tied_weights_keys = ties | rest
