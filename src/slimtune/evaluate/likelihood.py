"""How likely a model finds given answers: the loss of each, in nats, over its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from slimtune.evaluate.generation import pad_id_of, read_shared_prefix, repeated
from slimtune.template import has_template

IGNORED = -100
LOGITS = 1024
"""Tokens whose logits are held at once: with 150,000 in a vocabulary, 600 MB."""


@dataclass(frozen=True)
class Answered:
    """A prompt and an answer as ids."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def answered_ids(model: Any, tokenizer: Any, text: str, begin: int) -> Answered:
    """The ids of a prompt with its answer, which begins at a character, the end of turn among the answer's."""
    if model.config.is_encoder_decoder:
        return Answered(tokenizer(text[:begin])["input_ids"], tokenizer(text_target=text[begin:])["input_ids"])
    # A template writes the special tokens itself; the tokenizer would add a second beginning of sequence.
    tokens = tokenizer(text, add_special_tokens=not has_template(tokenizer), return_offsets_mapping=True)
    ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
    # A token that begins in the prompt and ends in the answer counts: the answer begins with it.
    start = next((i for i, (low, high) in enumerate(offsets) if high > max(low, begin)), len(ids))
    if ids[-1] not in _special(tokenizer) and tokenizer.eos_token_id is not None:
        # As in training: an answer is over once the model says so.
        ids.append(tokenizer.eos_token_id)
    return Answered(ids[:start], ids[start:])


@torch.inference_mode()
def answer_losses(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Answered],
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[float]:
    """The loss of each answer, -sum log p(token | what is before it) in nats, in the order of the rows."""
    was_training = model.training
    model.eval()
    prefix, cache = read_shared_prefix(model, [row.prompt for row in rows])
    pad_id = pad_id_of(tokenizer)
    losses = [0.0] * len(rows)
    for chosen in _batches(rows, batch_size):
        batch = [rows[index] for index in chosen]
        if model.config.is_encoder_decoder:
            found = _encoder_decoder(model, batch, pad_id)
        else:
            found = _decoder(model, batch, pad_id, len(prefix), repeated(cache, len(batch)))
        for index, loss in zip(chosen, found.tolist(), strict=True):
            losses[index] = loss
        if on_batch:
            on_batch(len(chosen))
    model.train(was_training)
    return losses


def _batches(rows: Sequence[Answered], batch_size: int) -> Iterator[list[int]]:
    """Rows of similar length, as many at once as asked for and as have no more than LOGITS rows of logits."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batch: list[int] = []
    for index in order:
        shortest = min(len(rows[i].prompt) for i in [*batch, index])
        if batch and (len(batch) == batch_size or (len(batch) + 1) * (len(rows[index]) - shortest) > LOGITS):
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _decoder(model: Any, batch: Sequence[Answered], pad_id: int, cached: int, cache: Any) -> torch.Tensor:
    rows = [[*row.prompt, *row.answer] for row in batch]
    ids_BT = _padded([row[cached:] for row in rows], pad_id, model.device)
    mask_BT = _padded([[1] * len(row) for row in rows], 0, model.device)
    labels_BT = _padded([[IGNORED] * (len(r.prompt) - cached) + r.answer for r in batch], IGNORED, model.device)
    # With a large vocabulary logits are most of the memory: those before the first answer are not asked for.
    kept = ids_BT.shape[1] - min(len(row.prompt) for row in batch) + cached + 1
    options = {} if cache is None else {"past_key_values": cache, "use_cache": True}
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, logits_to_keep=kept, **options).logits
    return _summed(logits_BTV[:, -kept:-1], labels_BT[:, 1 - kept :])


def _encoder_decoder(model: Any, batch: Sequence[Answered], pad_id: int) -> torch.Tensor:
    ids_BT = _padded([row.prompt for row in batch], pad_id, model.device)
    mask_BT = _padded([[1] * len(row.prompt) for row in batch], 0, model.device)
    labels_BT = _padded([row.answer for row in batch], IGNORED, model.device)
    return _summed(model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).logits, labels_BT)


def _summed(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """The loss of each row over its answer."""
    losses = F.cross_entropy(
        logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels_BT.shape).double().sum(-1).cpu()


def _padded(rows: Sequence[list[int]], fill: int, device: torch.device) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device)


def _special(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
