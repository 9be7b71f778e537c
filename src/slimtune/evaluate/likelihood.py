"""How likely a model finds given tokens: the loss of each row, in nats, summed over those that count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtune.data.batches import IGNORED, Encoded, pad_id_of
from slimtune.data.chat_template import has_template
from slimtune.errors import ConfigError
from slimtune.evaluate.generation import kept_logits, read_shared_prefix, repeated

LOGITS = 1024
"""Tokens whose logits are held at once: with 150,000 in a vocabulary, 600 MB."""


@dataclass(frozen=True)
class PromptWithAnswer:
    """A prompt and an answer as ids."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def encoded(self) -> Encoded:
        """Both as one text of which the answer counts."""
        return Encoded([*self.prompt, *self.answer], [IGNORED] * len(self.prompt) + self.answer)


def answered_ids(model: Any, tokenizer: Any, text: str, begin: int) -> PromptWithAnswer:
    """The ids of a prompt with its answer, which begins at a character, the end of turn among the answer's."""
    if model.config.is_encoder_decoder:
        return PromptWithAnswer(tokenizer(text[:begin])["input_ids"], tokenizer(text_target=text[begin:])["input_ids"])
    # A template writes the special tokens itself; the tokenizer would add a second beginning of sequence.
    tokens = tokenizer(text, add_special_tokens=not has_template(tokenizer), return_offsets_mapping=True)
    ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
    # A token that begins in the prompt and ends in the answer counts: the answer begins with it.
    # Tokens without extent (special ones, (0, 0)) are no beginning.
    start = next((i for i, (low, high) in enumerate(offsets) if high > max(low, begin)), len(ids))
    if ids[-1] not in _special(tokenizer) and tokenizer.eos_token_id is not None:
        # As in training: an answer is over once the model says so.
        ids.append(tokenizer.eos_token_id)
    return PromptWithAnswer(ids[:start], ids[start:])


@torch.inference_mode()
def answer_losses(model: Any, tokenizer: Any, rows: Sequence[PromptWithAnswer], batch_size: int = 32) -> list[float]:
    """The loss of each answer, -sum log p(token | what is before it) in nats, in the order of the rows.

    Raises: ConfigError, for a loss that is not a number.
    """
    if not model.config.is_encoder_decoder:
        return summed_losses(model, tokenizer, [row.encoded for row in rows], batch_size).tolist()
    lengths = [(len(row.prompt), len(row)) for row in rows]

    def read(chosen: list[int]) -> Tensor:
        return _encoder_decoder(model, [rows[index] for index in chosen], pad_id_of(tokenizer))

    return _by_batches(model, lengths, batch_size, LOGITS, read).tolist()


@torch.inference_mode()
def summed_losses(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    batch_size: int | None = None,
    logits: int = LOGITS,
    on_batch: Callable[[list[int]], None] = lambda chosen: None,
) -> Tensor:
    """The loss of each text of a causal model over the tokens with a label, in nats: (rows,) in float64.

    What all rows begin with and none has a label in is read once.

    Args:
        batch_size: rows read at once, as many as `logits` allows if None.
        logits: tokens whose logits are held at once, unless one row has more.
        on_batch: told the numbers of the rows that were read.

    Raises:
        ConfigError: a loss is not a number.
    """
    starts = [_first_label(row) for row in rows]
    # Only what stands before every row's first label may be shared: labels need logits.
    prefix, cache = read_shared_prefix(model, [r.input_ids[:start] for r, start in zip(rows, starts, strict=True)])
    lengths = [(start, len(row.input_ids)) for row, start in zip(rows, starts, strict=True)]

    def read(chosen: list[int]) -> Tensor:
        batch, own = [rows[index] for index in chosen], repeated(cache, len(chosen))
        summed = _decoder(model, batch, pad_id_of(tokenizer), min(starts[index] for index in chosen), len(prefix), own)
        on_batch(chosen)
        return summed

    return _by_batches(model, lengths, batch_size or len(rows), logits, read)


def refuse_no_number(losses: Sequence[float]) -> None:
    """Raises: ConfigError, where a loss is not a number, so that the model is of no use."""
    bad = sum(not math.isfinite(loss) for loss in losses)
    if bad:
        raise ConfigError(
            f"the loss of {bad} of {len(losses)} texts is not a number; the model is damaged or its training diverged"
        )


def _first_label(row: Encoded) -> int:
    """Where the first token stands that counts; nothing predicts the very first one."""
    places = (index for index, label in enumerate(row.labels) if label != IGNORED and index)
    return next(places, len(row.labels))


def _by_batches(
    model: Any,
    lengths: Sequence[tuple[int, int]],
    batch_size: int,
    logits: int,
    read: Callable[[list[int]], Tensor],
) -> Tensor:
    """The losses of rows, each with the place of its first label and its length, in their order."""
    was_training = model.training
    model.eval()
    # Sums of thousands of token losses; float32 would leave four digits for their differences.
    losses = torch.zeros(len(lengths), dtype=torch.float64)
    for chosen in _batches(lengths, batch_size, logits):
        losses[chosen] = read(chosen)
    model.train(was_training)
    refuse_no_number(losses.tolist())
    return losses


def _batches(lengths: Sequence[tuple[int, int]], batch_size: int, logits: int) -> Iterator[list[int]]:
    """Rows of similar length, as many at once as asked for and as have no more than so many rows of logits."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index][1]):
        # Logits are asked for from the earliest label of the batch on, so that this one row decides for all.
        first = min(lengths[i][0] for i in [*batch, index])
        if batch and (len(batch) == batch_size or (len(batch) + 1) * (lengths[index][1] - first) > logits):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _decoder(model: Any, batch: Sequence[Encoded], pad_id: int, first: int, cached: int, cache: Any) -> Tensor:
    """The losses of a batch in which no label stands before the place `first`."""
    # Padded on the right: causal attention never looks there, and positions need no correction.
    ids_BT = _padded([row.input_ids[cached:] for row in batch], pad_id, model.device)
    # The whole length, cached prefix included, while the ids are what is left of the row.
    mask_BT = _padded([[1] * len(row.input_ids) for row in batch], 0, model.device)
    labels_BT = _padded([row.labels[cached:] for row in batch], IGNORED, model.device)
    # With a large vocabulary logits are most of the memory: those before the first label are not asked for.
    # One more than there are labels: the token before a label predicts it.
    kept = ids_BT.shape[1] - (first - cached) + 1
    options = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
    options |= kept_logits(model, kept)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, **options).logits
    # From the end, behind what a soft prompt puts in front.
    return _summed(logits_BTV[:, -kept:-1], labels_BT[:, 1 - kept :])


def _encoder_decoder(model: Any, batch: Sequence[PromptWithAnswer], pad_id: int) -> Tensor:
    ids_BT = _padded([row.prompt for row in batch], pad_id, model.device)
    mask_BT = _padded([[1] * len(row.prompt) for row in batch], 0, model.device)
    labels_BT = _padded([row.answer for row in batch], IGNORED, model.device)
    return _summed(model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).logits, labels_BT)


def _summed(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The loss of each row over the tokens with a label."""
    losses = []
    for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True):
        counts_T = labels_T != IGNORED
        # Row by row: in float32 the logits of the whole batch would take twice the memory.
        own = F.cross_entropy(logits_TV[counts_T].float(), labels_T[counts_T], reduction="none")
        losses.append(own.double().sum())
    return torch.stack(losses).cpu()


def _padded(rows: Sequence[list[int]], fill: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device)


def _special(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
