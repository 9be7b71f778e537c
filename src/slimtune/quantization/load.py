"""Quantize while loading: one tensor after the other is read and quantized, so that 16 bits are never there at once.

transformers loads as ever, with its renamings, ties and new heads; this says how tensors are read and quantized.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from bitsandbytes.utils import unpack_tensor_to_dict
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimtune.bases import base_of, claim
from slimtune.bases.bitsandbytes import packed_4bit, packed_8bit
from slimtune.errors import ConfigError, DamagedBaseError, did_you_mean, listing
from slimtune.quantization.config import Quantization
from slimtune.storage.foreign import open_tensors, read_not_mapped, reading_model
from slimtune.storage.quantization_metadata import mend_saving

_STATE = ".quant_state.bitsandbytes__"
_ALWAYS = ("absmax", "quant_map")
_NESTED = ("nested_absmax", "nested_quant_map")


def load_quantized(
    chosen: Any, source: str, settings: Quantization | BitsAndBytesConfig, device: str, **options: Any
) -> Any:
    """`chosen.from_pretrained` with the linear layers quantized as they are read, claimed for our product.

    Raises:
        ConfigError: there is no linear layer, or a name of `keep` that no linear layer has.
    """
    if device == "mps":
        raise ConfigError("bitsandbytes can't quantize for mps; pass device='cpu'")
    # Quantized as they are read: the peak is the model in few bits and one layer in 16, not the model in 16.
    with read_not_mapped(), reading_model("the model", source):
        model = chosen.from_pretrained(
            source, quantization_config=Request(settings), device_map={"": device}, **options
        )
    claim(model)
    return model


def load_as_stored(chosen: Any, source: str, device: str, **options: Any) -> Any:
    """`chosen.from_pretrained` of what bitsandbytes quantized before, claimed for our product.

    Raises:
        DamagedBaseError: what is stored of a weight doesn't fit together.
    """
    _check_files(Path(source))
    with reading_model("the model", source):
        model = chosen.from_pretrained(source, device_map={"": device}, **options)
    claim(model)
    mend_saving(model)
    return model


def quantizer_for(settings: Quantization | BitsAndBytesConfig) -> Any:
    """What quantizes while a model is loaded, for a plan to ask which layers it takes."""
    request = Request(settings)
    return (_Quantizer8bit if request.plain.load_in_8bit else _Quantizer4bit)(request, pre_quantized=False)


class Request(QuantizationConfigMixin):
    """What transformers chooses our quantizer by; the loaded model has bitsandbytes' own config."""

    def __init__(self, settings: Quantization | BitsAndBytesConfig) -> None:
        is_own = isinstance(settings, Quantization)
        self.keep: Sequence[str] = settings.keep if is_own else ()
        # Whoever lists the modules to skip in bitsandbytes' own config has decided about heads.
        self.keeps_heads = is_own or settings.llm_int8_skip_modules is None
        self.blocksize = settings.blocksize if is_own else 64
        # Unset, it would be float32 in bitsandbytes; ours is the dtype of the model, which isn't known yet.
        self.computes_as_model = is_own and settings.kind != "int8" and settings.compute_dtype is None
        self.plain = _as_bitsandbytes(settings) if is_own else copy.deepcopy(settings)
        self.quant_method: Any = "slimtune_8bit" if self.plain.load_in_8bit else "slimtune_4bit"


def _as_bitsandbytes(settings: Quantization) -> BitsAndBytesConfig:
    if settings.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.kind,
        bnb_4bit_use_double_quant=settings.double,
        bnb_4bit_compute_dtype=settings.compute_dtype,
    )


class _Quantizer(HfQuantizer):
    """Mixed in front of transformers' quantizers for bitsandbytes."""

    quantization_config: Any
    module_type: type[nn.Module]

    @abstractmethod
    def quantized(self, weight_OI: Tensor, module: Any) -> Tensor:
        """The parameter of a quantized module for the weight that was read."""

    def __init__(self, request: Request, **options: Any) -> None:
        super().__init__(request.plain, **options)
        self.request = request

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **options: Any) -> None:
        if self.request.computes_as_model:
            self.quantization_config.bnb_4bit_compute_dtype = model.dtype
        linear = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
        self._check_kept(linear, model)
        # By the order in which the model makes its parts.
        last = list(model.named_parameters())[-1][0].rpartition(".")[0]
        # transformers keeps the last module, but misses one with a bias, as most classifiers' heads have.
        self._keep(model, {*self.request.keep, *({last} & set(linear) if self.request.keeps_heads else ())})
        if not any(should_convert_module(name, self._kept(model)) for name in linear):
            raise ConfigError(
                f"{type(model).__name__} has no linear layer to quantize beside {listing(linear) or 'none at all'}; "
                "load it without quantize"
            )
        # By now all that is kept is known: this is where transformers puts bitsandbytes' layers in.
        super()._process_model_before_weight_loading(model, device_map=device_map, **options)

    def _kept(self, model: Any) -> list[str]:
        skipped = self.quantization_config.llm_int8_skip_modules
        return self.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)

    def _keep(self, model: Any, names: Iterable[str]) -> None:
        """Have these modules as they are, here and wherever the saved model is loaded again."""
        before = self._kept(model)
        more = [name for name in sorted(names) if name not in before]
        if more:
            self.quantization_config.llm_int8_skip_modules = [*sorted(before), *more]

    def _check_kept(self, linear: Sequence[str], model: Any) -> None:
        for pattern in self.request.keep:
            if all(should_convert_module(name, [pattern]) for name in linear):
                last = {name.rpartition(".")[2] for name in linear}
                near = did_you_mean(pattern, [*last, *linear]) or f"; there are {listing(last)}"
                raise ConfigError(f"keep names '{pattern}', but {type(model).__name__} has no such linear layer{near}")

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **options)
        new = [name for name, module in model.named_modules() if self._is_new(module)]
        for name in new:
            # It wasn't in the file: a head to be trained, of numbers that were just drawn.
            module: Any = model.get_submodule(name)
            base: Any = base_of(module)
            # It was made for codes before anyone knew that the file has none.
            base.make_plain(module, module.weight.data)
        self._keep(model, new)
        return model

    def _is_new(self, module: Any) -> bool:
        if not isinstance(module, self.module_type):
            return False
        weight: Any = module.weight
        return not getattr(weight, "bnb_quantized", weight.dtype == torch.int8)

    def get_quantize_ops(self) -> Any:
        return _Quantize(self)


class _Quantize(ConversionOps):
    """What transformers does to each weight once it is read."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, model: Any, **others: Any) -> dict[str, Tensor]:  # type: ignore[override]
        done = {}
        for name, value in input_dict.items():
            # transformers hands over lists, of which a plain rename has one.
            weight: Tensor = value[0] if isinstance(value, list) else value
            module: Any = model.get_submodule(name.rpartition(".")[0])
            # GPT-2's linear layers are stored as (in, out).
            weight_OI = weight.T if issubclass(module.source_cls, Conv1D) else weight
            done[name] = self.quantizer.quantized(weight_OI, module)
            # Or transformers would draw it, after the read, as a weight that was missing.
            module._is_hf_initialized = True
        return done


@register_quantizer("slimtune_4bit")
class _Quantizer4bit(_Quantizer, Bnb4BitHfQuantizer):
    module_type = Linear4bit

    def quantized(self, weight_OI: Tensor, module: Any) -> Tensor:
        settings = module.weight
        return packed_4bit(
            weight_OI,
            self.request.blocksize,
            settings.quant_type,
            settings.compress_statistics,
            settings.quant_storage,
            module,
        )


@register_quantizer("slimtune_8bit")
class _Quantizer8bit(_Quantizer, Bnb8BitHfQuantizer):
    module_type = Linear8bitLt

    def quantized(self, weight_OI: Tensor, module: Any) -> Tensor:
        return packed_8bit(weight_OI)


def _check_files(folder: Path) -> None:
    """See that each 4-bit weight of a folder has what it is expanded with; only names and states are read.

    Raises:
        DamagedBaseError: something is missing, or a state can't be read.
    """
    names: set[str] = set()
    states: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_tensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no mapping
                names.add(name)
                if _STATE in name:
                    states[name.partition(_STATE)[0]] = stored.get_tensor(name)
    # By the scales: a weight whose state is gone altogether would look like a plain one of a strange shape.
    marked = {name.removesuffix(f".{part}") for name in names for part in _ALWAYS if name.endswith(f".{part}")}
    for weight in sorted(marked | states.keys()):
        _check_parts(weight, states, names)


def _check_parts(weight: str, states: Mapping[str, Any], names: set[str]) -> None:
    wanted = {weight, *(f"{weight}.{part}" for part in _ALWAYS)}
    if weight not in states:
        raise _damaged(weight, "its state (quant_state) is missing")
    try:
        state = unpack_tensor_to_dict(states[weight])
        # JSON as bytes in a tensor, which bitsandbytes would read without a check.
        unsaid = {"quant_type", "blocksize", "dtype", "shape"} - state.keys()
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(weight, f"its state (quant_state) can't be read: {error}") from error
    if unsaid:
        raise _damaged(weight, f"its state (quant_state) doesn't say {', '.join(sorted(unsaid))}")
    if "nested_blocksize" in state:
        wanted |= {f"{weight}.{part}" for part in _NESTED}
    if wanted - names:
        raise _damaged(weight, f"{', '.join(sorted(wanted - names))} is missing")


def _damaged(weight: str, what: str) -> DamagedBaseError:
    return DamagedBaseError(f"the quantized weight '{weight}' is damaged: {what}; fetch the model again")
