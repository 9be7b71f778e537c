"""Encoded examples, how they become a batch, and how a batch becomes a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from slimtune.errors import DataError
from slimtune.ops.cross_entropy import IGNORED


@dataclass(frozen=True)
class Encoded:
    """One example as ids, and the labels in which everything but the answers is ignored."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED for label in self.labels)


def pieces(example: Encoded) -> Iterator[tuple[bool, list[int]]]:
    """Split an example into runs of ids that are all learned or all ignored."""
    marked = zip(example.labels, example.input_ids, strict=True)
    for learned, run in groupby(marked, key=lambda pair: pair[0] != IGNORED):
        yield learned, [token for _, token in run]


@dataclass(frozen=True)
class Limit:
    """How long an example may be, in tokens, and what becomes of longer ones.

    Attributes:
        max_length: as the settings have it.
        too_long: error, drop, truncate, or split for texts.
        positions: how many the model has; None where its config has no number.
    """

    max_length: int
    too_long: str = "error"
    positions: int | None = None

    @property
    def tokens(self) -> int:
        """The longest that an example may be."""
        return self.max_length if self.positions is None else min(self.max_length, self.positions)

    def refuse(self, lengths: Sequence[int], of: int, what: str = "examples") -> None:
        """Raises: DataError, if some are longer and that is an error."""
        over = [length for length in lengths if length > self.tokens]
        if not over or self.too_long != "error":
            return
        longest = max(over)
        advice = f"pass --max-length {longest}, or choose with data.too_long=drop or data.too_long=truncate"
        if self.positions is not None and longest > self.positions:
            advice = (
                f"the model has {self.positions} positions; choose with data.too_long=drop or data.too_long=truncate"
            )
        raise DataError(
            f"{len(over)} of {of} {what} are longer than {self.tokens} tokens (the longest has {longest}); {advice}"
        )


@dataclass(frozen=True)
class Objective:
    """How examples become a batch, and the loss to minimise; None is the model's own."""

    collate: Callable[[Sequence[Any]], Mapping[str, torch.Tensor]]
    loss: Callable[..., torch.Tensor] | None = None


def classification(tokenizer: Any) -> Objective:
    """Tokenized texts with the number of their label as `labels`; cross-entropy, the mean over all texts of a step."""

    def collate(examples: Sequence[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
        batch = tokenizer.pad([{k: v for k, v in e.items() if k != "labels"} for e in examples], return_tensors="pt")
        # `pad` knows nothing of labels of one number: it would pad them as if they were tokens.
        return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        # A sum over the texts of all batches of a step: (N, labels) against (N,), whatever the batches' sizes.
        total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return Objective(collate, loss)


def token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross-entropy: the mean over all labelled tokens of a step, however many batches it has."""
    # (N, T, tags) against (N, T) as (N * T, tags) against (N * T,); the words' other tokens and padding are ignored.
    total = F.cross_entropy(
        outputs.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


class PadRight:
    """Collate examples into one padded batch; padding is neither attended to nor learned."""

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


class PackRows:
    """Collate rows of several examples: positions restart with each example, and padding isn't learned.

    There is no attention mask, because transformers looks at positions only without one.
    """

    def __init__(self, pad_id: int, is_flat: bool = False) -> None:
        self.pad_id = pad_id
        self.is_flat = is_flat

    @classmethod
    def of(cls, model: Any, pad_id: int) -> PackRows:
        """The collator for this model's attention: flash attention separates examples in a single row."""
        return cls(pad_id, is_flat="flash" in (getattr(model.config, "_attn_implementation", None) or ""))

    def __call__(self, rows: Sequence[Sequence[Encoded] | Encoded]) -> dict[str, Any]:
        """The batch, as long as its longest row; an example outside of a row becomes a row of its own."""
        packed = [[row] if isinstance(row, Encoded) else list(row) for row in rows]
        if self.is_flat:
            # Flash attention takes one row (1, all tokens) and finds the examples by where positions are 0 again.
            packed = [[example for row in packed for example in row]]
        # All three tensors are (rows, longest).
        longest = max(sum(len(example.input_ids) for example in row) for row in packed)
        ids, labels, positions = [], [], []
        for row in packed:
            missing = longest - sum(len(example.input_ids) for example in row)
            ids.append([token for example in row for token in example.input_ids] + [self.pad_id] * missing)
            # Nothing before an example's first token may be taken to predict it.
            labels.append([label for e in row for label in (IGNORED, *e.labels[1:])] + [IGNORED] * missing)
            # Each token of the padding is alone, so that it can't be taken for the rest of the last example.
            positions.append([place for example in row for place in range(len(example.input_ids))] + [0] * missing)
        return {
            "input_ids": torch.tensor(ids),
            "position_ids": torch.tensor(positions),
            "labels": torch.tensor(labels),
            # A cache would make transformers take the row for one text.
            "use_cache": False,
        }


def count_packed(position_ids: torch.Tensor) -> int:
    """Count the tokens of packed rows without padding: each example has one token at position 1, and one before it."""
    # Padding has position 0 throughout, so that counting zeros would count it in.
    return int((position_ids > 0).sum() + (position_ids == 1).sum())


def pad_id_of(tokenizer: Any) -> int:
    """The id to pad with; the attention mask hides it, so the end of turn will do."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
