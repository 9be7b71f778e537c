"""Every way to keep a linear layer's weight in few bits, one row each: the laws run over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerGroup

from slimtune.bases import base_of, claim
from slimtune.bases.int4 import LinearInt4
from slimtune.bases.int8 import LinearInt8
from slimtune.ops.grid import nearest_codes, searched_scales


@dataclass(frozen=True)
class Quantizer:
    """A library's module in place of an `nn.Linear`, with the same weight as near as it can be."""

    name: str
    quantize: Callable[[nn.Linear], nn.Module]

    def linear(self, features_in: int, features_out: int, bias: bool = True) -> nn.Module:
        """A new layer, of ours already."""
        site = self.quantize(nn.Linear(features_in, features_out, bias))
        claim(site)
        return site

    def model(self, model: Any) -> Any:
        """The model with the linear layers of its blocks quantized, in place, as their library leaves them."""
        heads = {id(model.get_output_embeddings())} if hasattr(model, "get_output_embeddings") else set()
        for path, layer in list(model.named_modules()):
            if (
                isinstance(layer, nn.Linear)
                and id(layer) not in heads
                and any(part.isdigit() for part in path.split("."))
            ):
                model.set_submodule(path, self.quantize(layer))
        return model

    def __repr__(self) -> str:
        return self.name


def four_bit(quant_type: str, blocksize: int = 64, double: bool = False, **options: Any) -> Callable[[nn.Linear], Any]:
    """bitsandbytes' `Linear4bit`; it takes a block size from its parameter alone."""

    def quantize(layer: nn.Linear) -> Any:
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **options)
        weight = layer.weight.detach()
        storage = options.get("quant_storage", torch.uint8)
        made.weight = bnb.nn.Params4bit(
            weight.clone(), False, None, blocksize, double, quant_type, quant_storage=storage, module=made
        )
        made.bias = layer.bias
        return made.to(weight.device)

    return quantize


def int8(layer: nn.Linear) -> Any:
    """bitsandbytes' `Linear8bitLt`."""
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.detach().clone(), requires_grad=False)
    made.bias = layer.bias
    return made.to(layer.weight.device)


def torchao(settings: Any) -> Callable[[nn.Linear], Any]:
    """torchao's tensor in a plain `nn.Linear`."""

    def quantize(layer: nn.Linear) -> Any:
        quantize_(layer, settings)
        return layer

    return quantize


def integer(bits: int, group_size: int | None = None) -> Callable[[nn.Linear], Any]:
    """Our own codes in groups of inputs, or with a scale a row."""

    def quantize(layer: nn.Linear) -> Any:
        weight_OI = layer.weight.detach()
        scales_OG = searched_scales(weight_OI, group_size or layer.in_features, bits)
        (LinearInt4 if bits == 4 else LinearInt8).take(layer, nearest_codes(weight_OI, scales_OG, bits), scales_OG)
        return layer

    return quantize


INT4: Any = torch.int4  # pyright: ignore[reportAttributeAccessIssue]

QUANTIZERS = (
    Quantizer("nf4", four_bit("nf4")),
    Quantizer("nf4-double", four_bit("nf4", double=True)),
    Quantizer("fp4-128", four_bit("fp4", blocksize=128)),
    Quantizer("int8", int8),
    Quantizer("torchao-int8", torchao(Int8WeightOnlyConfig())),
    Quantizer("torchao-int4", torchao(IntxWeightOnlyConfig(INT4, PerGroup(4), MappingType.ASYMMETRIC))),
    Quantizer("int4-4", integer(4, 4)),
    Quantizer("int8-row", integer(8)),
)


def expanded(site: Any) -> Any:
    """A quantized layer as an `nn.Linear` of the same weight; any other layer as it is."""
    base = base_of(site)
    if base.dequantizer(site) is None:
        return site
    features_in, features_out = base.features(site)
    plain = nn.Linear(features_in, features_out, site.bias is not None)
    plain.load_state_dict(base.dense(site))
    return plain.train(site.training)
