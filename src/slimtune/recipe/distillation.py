"""The section of a recipe for distillation: from which teacher, and how its distribution is learned."""

from __future__ import annotations

from dataclasses import dataclass

from slimtune.errors import ConfigError, check_number, check_whole

TOP_K = 64
"""How many of the teacher's likeliest tokens are stored by default: 258 or 386 bytes a learned token."""


@dataclass(frozen=True)
class DistillationSettings:
    """What a student learns from a teacher; raises ConfigError for values that can't be.

        loss = alpha * temperature^2 * D_beta(teacher || student) + (1 - alpha) * cross-entropy + hidden * distance

    Attributes:
        teacher: a model folder, a Hub id, a packaged name or an adapter.
        beta: 0 is the forward KL divergence KL(teacher || student), 1 the reverse one, between them the generalized
            Jensen-Shannon divergence.
        temperature: by which the logits of both are divided.
        alpha: the share of the teacher in the loss; the rest is for the labels of the data.
        lmbda: the share of batches whose answers the student draws itself, as it writes them at that moment.
        top_k: how many of the teacher's likeliest tokens are stored on disk, once for all epochs; 0 computes the whole
            distribution at each step. By default 64 for models that write text, 0 with lmbda and for classifiers.
        hidden: the weight of the mean squared distance between hidden states, for classifiers of one width.
        max_new_tokens: of an answer that the student draws.
    """

    teacher: str
    beta: float = 0.0
    temperature: float = 1.0
    alpha: float = 0.5
    lmbda: float = 0.0
    top_k: int | None = None
    hidden: float = 0.0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if not self.teacher.strip():
            raise ConfigError("teacher is empty; name a model or an adapter")
        for name in ("beta", "alpha", "lmbda"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"{name} must be a number from 0 to 1, found {value!r}")
        if not self.alpha:
            raise ConfigError("with alpha 0 nothing is learned from the teacher; give it more, or use slimtune train")
        check_number("temperature", self.temperature, 0)
        if not self.temperature:
            raise ConfigError("temperature must be above 0, for logits are divided by it")
        check_number("hidden", self.hidden, 0)
        check_whole("max_new_tokens", self.max_new_tokens)
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 0)
        if self.lmbda and self.top_k:
            raise ConfigError(
                f"top_k {self.top_k} stores what the teacher says of the data, and lmbda {self.lmbda:g} learns from "
                "answers that are not written yet; leave one of them out"
            )

    @property
    def stored_tokens(self) -> int:
        """How many of the teacher's likeliest tokens are stored for a model that writes text; 0 for none."""
        return self.top_k if self.top_k is not None else 0 if self.lmbda else TOP_K
