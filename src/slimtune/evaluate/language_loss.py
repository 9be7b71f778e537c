"""The language loss of single texts: nats per token, of all tokens or of the answers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtune.data.encode import IGNORED, Encoded, encode_row
from slimtune.data.rows import Conversation, Pair
from slimtune.errors import ConfigError, DataError
from slimtune.evaluate.generation import pad_id_of
from slimtune.template import has_template

Text = str | Conversation | Pair
"""A plain text, all of which is scored, or a conversation, of which the answers are."""

BATCH_TOKENS = 1024
"""Tokens read at once; their logits weigh more than all else, with 150,000 in a vocabulary 600 MB."""


@dataclass(frozen=True)
class Passage:
    """What is scored as one: a text, or a piece of a long one."""

    domain: str
    shown: str
    encoded: Encoded

    @property
    def tokens(self) -> int:
        """How many tokens are predicted; nothing stands before the first."""
        return sum(label != IGNORED for label in self.encoded.labels[1:])


def passages(domain: str, texts: Sequence[Text], tokenizer: Any, max_length: int) -> list[Passage]:
    """The texts of one domain as ids; plain ones are cut into pieces of at most `max_length` tokens.

    Raises:
        DataError: a conversation is longer, or nothing is left to predict in a text.
    """
    found: list[Passage] = []
    for number, text in enumerate(texts, 1):
        encoded = _encoded(text, tokenizer)
        if not isinstance(text, str) and len(encoded.input_ids) > max_length:
            raise DataError(
                f"text {number} of '{domain}' is a conversation of {len(encoded.input_ids)} tokens, beyond "
                f"{max_length}; pass --max-length {len(encoded.input_ids)}, or shorten it"
            )
        pieces = [Passage(domain, _shown(text, piece, tokenizer), piece) for piece in _cut(encoded, max_length)]
        scored = [piece for piece in pieces if piece.tokens]
        if not scored:
            raise DataError(f"text {number} of '{domain}' has no token to predict ({_opening(text)}); remove it")
        found += scored
    return found


def _encoded(text: Text, tokenizer: Any) -> Encoded:
    if isinstance(text, str):
        ids = list(tokenizer(text)["input_ids"])
        return Encoded(ids, ids)
    if isinstance(text, Pair) and not has_template(tokenizer):
        # A model that never saw turns reads a question and its answer as two lines.
        return encode_row(Pair(prompt=f"{text.prompt}\n", completion=text.completion), tokenizer)
    return encode_row(text, tokenizer)


def _cut(encoded: Encoded, max_length: int) -> list[Encoded]:
    starts = range(0, len(encoded.input_ids), max_length)
    return [Encoded(encoded.input_ids[s : s + max_length], encoded.labels[s : s + max_length]) for s in starts]


def _shown(text: Text, piece: Encoded, tokenizer: Any) -> str:
    if isinstance(text, str):
        return tokenizer.decode(piece.input_ids, skip_special_tokens=True)
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in text.turns())


def _opening(text: Text) -> str:
    return repr((text if isinstance(text, str) else text.turns()[0]["content"])[:40])


def has_language_loss(model: Any) -> bool:
    """Whether the model predicts the next token of a text."""
    return model.can_generate() and not model.config.is_encoder_decoder


def require_language_loss(model: Any, source: str) -> None:
    """Raises: ConfigError, for a model that doesn't predict the next token."""
    if not model.can_generate():
        raise ConfigError(
            f"{source} is a {type(model).__name__}, which predicts no next token and so has no language loss; "
            "measure what it forgot by its accuracy on labelled texts of other domains, with slimtune evaluate"
        )
    if not has_language_loss(model):
        raise ConfigError(
            f"{source} is a {type(model).__name__}, which writes an answer to a text and has no loss on the text "
            "itself; measure what it forgot by its score on other tasks, with slimtune evaluate"
        )


@torch.inference_mode()
def losses(
    model: Any,
    tokenizer: Any,
    read: Sequence[Passage],
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """The loss of each passage, summed over its tokens, in nats: (passages,) in float64.

    Args:
        on_batch: told how many tokens each batch had, padding excluded.

    Raises:
        ConfigError: ids that the model has no embedding for, or a loss that is not a number.
    """
    _check_ids(model, read)
    was_training = model.training
    model.eval()
    found = torch.zeros(len(read), dtype=torch.float64)
    for chosen in _batches([len(passage.encoded.input_ids) for passage in read], batch_tokens):
        rows = [read[index].encoded for index in chosen]
        found[chosen] = _summed(model, rows, pad_id_of(tokenizer))
        if on_batch:
            on_batch(sum(len(row.input_ids) for row in rows))
    model.train(was_training)
    bad = (~torch.isfinite(found)).nonzero().flatten().tolist()
    if bad:
        raise ConfigError(
            f"the loss of {len(bad)} of {len(read)} texts is not a number ({read[bad[0]].shown[:40]!r}); the model is "
            "damaged or its training diverged"
        )
    return found


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of texts of like length, padded to at most `batch_tokens` a batch unless one text is longer."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _summed(model: Any, rows: Sequence[Encoded], pad_id: int) -> Tensor:
    longest = max(len(row.input_ids) for row in rows)
    gaps = [longest - len(row.input_ids) for row in rows]
    ids = [row.input_ids + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)]
    mask = [[1] * len(row.input_ids) + [0] * gap for row, gap in zip(rows, gaps, strict=True)]
    device = model.device
    logits = model(
        input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device), use_cache=False
    ).logits[:, -longest:]  # behind what a soft prompt puts in front
    nats = []
    for row, logits_TV in zip(rows, logits, strict=True):
        labels = torch.tensor(row.labels[1:], device=device)
        # Row by row: in float32 the logits of the whole batch would take twice the memory.
        own = logits_TV[: len(labels)].float()
        nats.append(F.cross_entropy(own, labels, ignore_index=IGNORED, reduction="none").double().sum())
    return torch.stack(nats).cpu()


def _check_ids(model: Any, read: Sequence[Passage]) -> None:
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    largest = max((max(passage.encoded.input_ids) for passage in read), default=0)
    if rows is not None and largest >= rows:
        raise ConfigError(
            f"the tokenizer gives the id {largest} and the {type(model).__name__} has {rows} embeddings; the tuned "
            "model got tokens that its base lacks, so that the two can't be compared on texts with them"
        )
