"""What is to be planned: the method, the base's precision, the batch, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slimtune.core.config import PeftConfig
from slimtune.errors import check_choice, check_whole
from slimtune.quantization.config import KINDS, TORCHAO_KINDS
from slimtune.recipe.optimizers import DEFAULT, check_name
from slimtune.recipe.preference import PREFERENCE_TASKS

Precision = Literal["dense", "nf4", "fp4", "int8", "int8-torchao", "int4-torchao"]
Preference = Literal["dpo", "kto", "orpo", "grpo"]

PRECISIONS = ("dense", *KINDS, *TORCHAO_KINDS)
DTYPES = ("bfloat16", "float16", "float32")
ATTENTION = (None, "sdpa", "eager")
DRAWN_TOKENS = 512
"""The longest answer that grpo draws unless it is told otherwise."""


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
        optimizer: by its name in `training.optim`.
        task_type: as in a config's; None for what the method or the model's own config says.
        task: how preferences are learned, or answers by a reward; None for examples with their labels.
        answer: tokens of an answer that is apart from the example: what a decoder writes (None: as many as are read),
            and what grpo draws to a prompt of `sequence` tokens (None: 512). A pair of answers is two examples.
        generations: answers that grpo draws to each prompt.
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
    optimizer: str = DEFAULT
    attention: str | None = None
    task_type: str | None = None
    task: Preference | None = None
    answer: int | None = None
    generations: int = 8
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        check_choice("base", self.base, PRECISIONS)
        check_choice("dtype", self.dtype, DTYPES)
        check_name(self.optimizer)
        check_choice("attention", self.attention, ATTENTION)
        check_choice("device", self.device, ("cuda", "cpu"))
        check_choice("task", self.task, (None, *PREFERENCE_TASKS))
        for name in ("batch", "sequence", "accumulation"):
            check_whole(name, getattr(self, name))
        check_whole("generations", self.generations, 2)
        if self.answer is not None:
            check_whole("answer", self.answer)

    @property
    def drawn_tokens(self) -> int:
        """Of an answer that grpo draws."""
        return self.answer or DRAWN_TOKENS
