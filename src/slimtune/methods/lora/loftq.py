"""What LoftQ starts from: its settings, and what quantization took from the weights, by the files that it read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.core.frozen import Site
from slimtune.errors import ConfigError, SlimtuneError
from slimtune.methods.lora.init import pissa, wide
from slimtune.storage.source import INDEX, folder_of, shards_of

_ALIKE = 0.5
"""The largest ||W - Q|| / ||W|| with which Q may have been made of W; 4 bits lose about a tenth."""

_WAY_OUT = "pass the folder with the weights of 16 bits to replace_lora_weights_loftq(model, model_path=...)"


@dataclass
class LoftQConfig:
    """How LoftQ quantizes; names and defaults are those of `peft.LoftQConfig`.

    The base is quantized already and stays as it is, so that both fields have but one value here.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def check(self) -> None:
        """Raises: ConfigError, for what would need another base."""
        if self.loftq_bits != 4:
            raise ConfigError(
                f"loftq_bits must be 4, found {self.loftq_bits!r}; the bits are those that the base is loaded in, and "
                "LoftQ is for 4"
            )
        if self.loftq_iter != 1:
            raise ConfigError(
                f"loftq_iter must be 1, found {self.loftq_iter!r}; a second iteration quantizes the base anew, and the "
                "base is frozen here and shared by all adapters; leave loftq_iter out, and choose a higher r to start "
                "nearer to the weights from before quantization"
            )


class Originals:
    """The weights of a model before it was quantized, each read from its file when it is asked for.

    Args:
        source: a folder, Hub id, packaged name or single safetensors file; None where the model doesn't tell.
        prefix: the name that the model gives its body, which the files may lack or have besides.
    """

    def __init__(self, source: str | None, prefix: str) -> None:
        self.source, self.prefix = source, prefix
        self._file_of: dict[str, str] = {}

    @classmethod
    def of(cls, model: Any, path: str | os.PathLike[str] | None = None) -> Originals:
        """Those of a model, from where it was loaded or from another place; nothing is read yet."""
        source = os.fspath(path) if path is not None else getattr(model, "name_or_path", None)
        return cls(source or None, getattr(model, "base_model_prefix", ""))

    def lost(self, site: Site) -> Tensor:
        """W - Q, (out, in) in float32, for a 4-bit layer with the weight Q.

        Raises:
            ConfigError: the layer isn't in 4 bits, or there is no weight that it can have been made of.
        """
        if not is_4bit(site):
            raise ConfigError(
                f"LoftQ starts at what 4 bits lost, and '{site.name}' is a {type(site.module).__name__} that isn't in "
                'them; load the model with quantize="nf4", or leave that layer out of target_modules'
            )
        quantized_OI = site.base.weight(site.module).detach()
        # One layer at a time: the 16-bit model is never in memory beside the quantized one.
        original = self._read(f"{site.name}.weight").to(quantized_OI.device, torch.float32)
        # A Conv1D is stored as (in, out), and a square one doesn't show it.
        losses = [turn - quantized_OI for turn in (original, original.t()) if turn.shape == quantized_OI.shape]
        # Another checkpoint of the same shapes would start the adapter at the difference of two models.
        losses = [loss_OI for loss_OI in losses if loss_OI.norm() <= _ALIKE * original.norm()]
        if not losses:
            raise ConfigError(
                f"'{site.name}' was not quantized from what '{self.source}' has, {tuple(original.shape)} there and "
                f"{tuple(quantized_OI.shape)} here; {_WAY_OUT}"
            )
        return losses[0]

    def _read(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            # Headers alone are read, once: a safetensors file begins with the names of its tensors.
            self._file_of = self._file_of or {key: file for file in self._files() for key in _keys(file)}
            # A checkpoint of the body alone has no prefix; one of a model with a head has it.
            names = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
            key = next((key for key in names if key in self._file_of), None)
            if key is None:
                raise ConfigError(f"'{self.source}' has no '{name}', which LoftQ starts from; {_WAY_OUT}")
            with safe_open(self._file_of[key], framework="pt") as file:
                weight = file.get_tensor(key)
        except SlimtuneError:
            raise
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"the weights in '{self.source}' can't be read ({error}); {_WAY_OUT}") from error
        if not weight.is_floating_point():
            raise ConfigError(f"'{self.source}' is quantized itself, its '{key}' is {weight.dtype}; {_WAY_OUT}")
        return weight

    def _files(self) -> list[str]:
        from transformers.utils.hub import cached_file

        if self.source is None:
            raise ConfigError(f"LoftQ needs the weights from before the model was quantized; {_WAY_OUT}")
        if Path(self.source).is_file():
            return [self.source]
        source = folder_of(self.source)
        try:
            index = cached_file(source, INDEX)
        except OSError:
            return [str(cached_file(source, "model.safetensors"))]
        return [str(cached_file(source, shard)) for shard in shards_of(Path(str(index)))]


def quantized_by_loftq(weight_OI: Tensor, r: int, config: LoftQConfig) -> Tensor:
    """Q, what `peft`'s LoftQ replaces the weight by, in float32.

    Q_1 = quantize(W);  Q_i+1 = quantize(W - B_i A_i) with B_i A_i the best approximation of W - Q_i of rank r

    Raises:
        ConfigError: a number of bits that bitsandbytes doesn't have.
    """
    quantize = {4: _through_nf4, 8: _through_int8}.get(config.loftq_bits)
    if quantize is None:
        raise ConfigError(f"loftq_bits must be 4 or 8, found {config.loftq_bits!r}")
    own_OI = wide(weight_OI)
    quantized_OI = quantize(own_OI)
    # The factors of the last round are those that were stored: only what Q was quantized from needs the earlier ones.
    for _ in range(config.loftq_iter - 1):
        a_RI, b_OR = pissa(own_OI - quantized_OI, r, 1.0)
        quantized_OI = quantize(own_OI - b_OR @ a_RI)
    return quantized_OI


def _through_nf4(weight_OI: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # Without double quantization and in blocks of 64, whatever the base at hand is quantized by: as `peft` does.
    return dequantize_4bit(*quantize_4bit(weight_OI.contiguous(), blocksize=64, quant_type="nf4"))


def _through_int8(weight_OI: Tensor) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    # By way of float16, which bitsandbytes' int8 is quantized from.
    codes_OI, scales_O, _ = int8_vectorwise_quant(weight_OI.half())
    return int8_vectorwise_dequant(codes_OI, scales_O)


def is_4bit(site: Site) -> bool:
    """Whether the weight of a site is stored in 4 bits now."""
    return site.base.stored_as(site.module) in ("nf4", "fp4")


def _keys(file: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
