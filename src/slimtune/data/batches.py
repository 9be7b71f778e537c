"""How encoded examples become a batch, and a batch a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from slimtune.data.encode import IGNORED, Encoded


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
