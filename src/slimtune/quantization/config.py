"""What `quantize=` means: names and numbers, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimtune.errors import ConfigError, check_choice, has_library, require
from slimtune.storage.compressed import is_compressed

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, TorchAoConfig

BNB_KINDS = ("nf4", "fp4", "int8")
INTEGER_KINDS = ("int4",)
KINDS = (*BNB_KINDS, *INTEGER_KINDS)
TORCHAO_KINDS = ("int8-torchao", "int4-torchao")
TORCHAO_GROUP = 32
"""How many weights share a scale in int4-torchao."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INTEGER_GROUPS = (32, 64, 128, 256)
"""The sizes of groups of int4 that the kernels of the engines take, and torch's."""
COMPUTE_DTYPES = (None, "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base are quantized while it is loaded: in bitsandbytes' storage, or to int4.

    Embeddings, norms, the output layer and a classifier's head are never quantized. Dettmers et al.,
    https://arxiv.org/abs/2305.14314 (nf4, fp4) and https://arxiv.org/abs/2208.07339 (int8).

    Attributes:
        kind: nf4 (the better of the two in 4 bits), fp4 or int8; or int4: whole numbers with a signed scale a group,
            the range searched, which engines read and which decode fastest.
        double: quantize the scales of the blocks as well; of nf4 and fp4.
        blocksize: how many weights share a scale; of nf4, fp4 and int4. int8 has a scale for each row.
        compute_dtype: what the products are computed in; without it, the dtype of the model.
        keep: more modules to leave as they are: names, ends of paths or regular expressions.

    Raises:
        ConfigError: a value that can't be.
    """

    kind: str = "nf4"
    double: bool = True
    blocksize: int = 64
    compute_dtype: str | None = None
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_choice("quantize", self.kind, KINDS)
        check_choice("double", self.double, (True, False))
        check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        if self.blocksize not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError(f"blocksize must be one of {known}, found {self.blocksize!r}")
        if isinstance(self.keep, str) or not all(isinstance(name, str) for name in self.keep):
            raise ConfigError(f"keep must be a list of module names, found {self.keep!r}")
        # An option that is taken and changes nothing would be believed.
        own = (self.double, self.blocksize, self.compute_dtype)
        if self.kind == "int8" and own != (True, 64, None):
            raise ConfigError("double, blocksize and compute_dtype would change nothing with int8; leave them out")
        if self.kind in INTEGER_KINDS:
            if (self.double, self.compute_dtype) != (True, None):
                raise ConfigError("double and compute_dtype would change nothing with int4; leave them out")
            if self.blocksize not in INTEGER_GROUPS:
                known = ", ".join(map(str, INTEGER_GROUPS))
                raise ConfigError(f"blocksize of int4 must be one of {known}, found {self.blocksize!r}")


if TYPE_CHECKING:
    Settings = Quantization | BitsAndBytesConfig | TorchAoConfig
    Quantize = str | Settings


def settings_of(quantize: Quantize) -> Settings:
    """What a name is short for; settings as they are. Raises: ConfigError, MissingDependencyError."""
    if isinstance(quantize, str):
        check_choice("quantize", quantize, (*KINDS, *TORCHAO_KINDS))
        if quantize in TORCHAO_KINDS:
            require_for(quantize)
            return torchao_settings(quantize)
        return Quantization(quantize)
    if isinstance(quantize, Quantization):
        return quantize
    # By name, because a name alone must not import transformers.
    # torchao's settings say all there is to say, and are handed on.
    if type(quantize).__name__ == "TorchAoConfig":
        return quantize
    if type(quantize).__name__ != "BitsAndBytesConfig":
        raise ConfigError(
            f"quantize takes {', '.join((*KINDS, *TORCHAO_KINDS))}, a slimtune.Quantization, or transformers' "
            f"BitsAndBytesConfig or TorchAoConfig, found {quantize!r}"
        )
    bitsandbytes: Any = quantize
    _check_foreign(bitsandbytes)
    return bitsandbytes


QUANTIZED_BASE = "a quantized base"
"""What needs a library, in the sentence of its error."""


def require_for(kind: str) -> None:
    """See that the library that quantizes to a kind is there. Raises: MissingDependencyError."""
    if library := library_of(kind):
        require(library[0], extra=library[1], purpose=QUANTIZED_BASE)


def library_of(kind: str) -> tuple[str, str] | None:
    """The package that quantizes to a kind and the extra that brings it; None where slimtune does it by itself."""
    if kind in BNB_KINDS:
        return "bitsandbytes", "quantized"
    return ("torchao", "torchao") if kind in TORCHAO_KINDS else None


def is_installed(kind: str) -> bool:
    """Whether the library that quantizes to a kind is there; it is looked for and not imported."""
    library = library_of(kind)
    return library is None or has_library(library[0])


def _check_foreign(config: BitsAndBytesConfig) -> None:
    if not config.is_quantizable():
        raise ConfigError("the BitsAndBytesConfig asks for nothing; pass load_in_4bit=True or load_in_8bit=True")
    for name in ("llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload"):
        if getattr(config, name):
            raise ConfigError(
                f"{name} isn't supported: weights are quantized once, and stay on one device; leave it out"
            )


def stored_by_bitsandbytes(config: Any) -> bool:
    """Whether a model's configuration says that its weights are stored as bitsandbytes quantized them."""
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return method is not None and str(getattr(method, "value", method)).startswith("bitsandbytes")


def few_tokens_read_codes(config: Any, settings: Settings | None) -> bool:
    """Whether products with few tokens read the codes of a base as they are, in bf16, on every processor.

    bitsandbytes' 4 bits are read so on processors with AVX512 alone, which don't emulate bf16.

    Args:
        config: of the model, with the quantization that it is stored in.
        settings: of the quantization while it is read.
    """
    stored = getattr(config, "quantization_config", None)
    for said in (stored, settings):
        is_8_bit = said.get("load_in_8bit") if isinstance(said, dict) else getattr(said, "load_in_8bit", False)
        if is_8_bit or getattr(said, "kind", None) in ("int8", *INTEGER_KINDS):
            return True
    return stored_by_compressed_tensors(config)


def stored_by_compressed_tensors(config: Any) -> bool:
    """Whether a model's configuration says that its weights are stored as compressed-tensors has them."""
    return is_compressed(getattr(config, "quantization_config", None))


def torchao_settings(kind: str) -> TorchAoConfig:
    """What transformers loads a model with so that its linear layers are quantized by torchao.

    int8 has a scale a row, int4 a scale and a zero point for each group of 32. torchao's 4-bit codes lie in a byte
    each: that halves no memory against int8, and is for what is deployed in int4.

    Raises:
        ConfigError: another kind.
    """
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    check_choice("quantize", kind, TORCHAO_KINDS)
    if kind == "int8-torchao":
        return TorchAoConfig(Int8WeightOnlyConfig())
    int4: torch.dtype = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
    groups = PerGroup(TORCHAO_GROUP)
    return TorchAoConfig(IntxWeightOnlyConfig(int4, groups, MappingType.ASYMMETRIC))
