"""transformers' Trainer, with the answers' loss watched and rates of LoRA+ where asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

from slimtune.train.allocation import RankAllocation
from slimtune.train.checks import LastGood
from slimtune.train.data import IGNORED, Encoded
from slimtune.train.lora_plus import lora_plus_groups


@dataclass(frozen=True)
class Objective:
    """How examples become a batch, and what is minimised: the model's own loss if nothing is said."""

    collate: Callable[[Sequence[Any]], Mapping[str, torch.Tensor]]
    loss: Callable[..., torch.Tensor] | None = None


def classification(tokenizer: Any) -> Objective:
    """Tokenized texts with the number of their label as `labels`; cross-entropy, the mean over all texts of a step."""

    def collate(examples: Sequence[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
        batch = tokenizer.pad([{k: v for k, v in e.items() if k != "labels"} for e in examples], return_tensors="pt")
        return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return Objective(collate, loss)


class AnswerTrainer(Trainer):
    """Stops with TrainingError at the first loss that is not a number, with the last good weights put back."""

    def __init__(self, *args: Any, last_good: LastGood, lora_plus_ratio: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, callbacks=[last_good, RankAllocation(), *kwargs.pop("callbacks", [])], **kwargs)
        self.last_good = last_good
        self.lora_plus_ratio = lora_plus_ratio

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's own, or with the groups of LoRA+."""
        if self.optimizer is None and self.lora_plus_ratio is not None:
            groups = lora_plus_groups(
                cast(nn.Module, self.model), self.args.learning_rate, self.lora_plus_ratio, self.args.weight_decay
            )
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's own; raises TrainingError if the loss is not a number."""
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            self.last_good.stop(f"the loss became {loss.item()}", self.args, self.state)
        return loss


class PadRight:
    """Encoded examples of one batch as tensors; padding is neither attended to nor learned."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The batch, as long as its longest example."""
        longest = max(len(example.input_ids) for example in examples)

        def padded(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

        return {
            "input_ids": padded([example.input_ids for example in examples], self.pad_id),
            "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
            "labels": padded([example.labels for example in examples], IGNORED),
        }
