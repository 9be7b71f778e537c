"""What is to be planned: the method, the base's precision, the batch, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slimtune.config import PeftConfig
from slimtune.errors import check_choice, check_whole

Precision = Literal["dense", "nf4", "fp4", "int8"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd", "adafactor"]

PRECISIONS = ("dense", "nf4", "fp4", "int8")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd", "adafactor")
DTYPES = ("bfloat16", "float16", "float32")
ATTENTION = (None, "sdpa", "eager")


@dataclass(frozen=True)
class Setting:
    """One way to train a model.

    Attributes:
        method: the adapter's config, or None for tuning all weights themselves.
        base: how the linear layers of the base are stored.
        double_quantization: whether the block maxima of a 4-bit base are quantized too.
        dtype: of the weights that aren't quantized, and of the products.
        autocast: whether products are computed in bfloat16 over float32 weights.
        batch: examples in a micro-batch.
        sequence: tokens in an example; images have their own size.
        padded: whether examples are of different lengths, so that attention takes a mask.
        accumulation: micro-batches in a step.
        task_type: as in a config's; None for what the method or the model's own config says.
        device: whose kernels are meant: attention and the loss take other memory on a CPU.

    Raises:
        ConfigError: a value that can't be.
    """

    method: PeftConfig | None = None
    base: Precision = "dense"
    double_quantization: bool = True
    dtype: str = "bfloat16"
    autocast: bool = False
    batch: int = 1
    sequence: int = 512
    padded: bool = True
    gradient_checkpointing: bool = False
    accumulation: int = 1
    optimizer: Optimizer = "adamw"
    attention: str | None = None
    task_type: str | None = None
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        check_choice("base", self.base, PRECISIONS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("attention", self.attention, ATTENTION)
        check_choice("device", self.device, ("cuda", "cpu"))
        for name in ("batch", "sequence", "accumulation"):
            check_whole(name, getattr(self, name))
