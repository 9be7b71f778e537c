"""The language loss of single texts: nats per token, of all tokens or of the answers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slimtune.data.batches import IGNORED, Encoded
from slimtune.data.chat_template import has_template
from slimtune.data.encode import encode_row
from slimtune.data.rows import Conversation, Pair
from slimtune.errors import ConfigError, DataError
from slimtune.evaluate.likelihood import LOGITS, summed_losses

Text = str | Conversation | Pair
"""A plain text, all of which is scored, or a conversation, of which the answers are."""


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
    read: list[Passage] = []
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
        read += scored
    return read


def _encoded(text: Text, tokenizer: Any) -> Encoded:
    if isinstance(text, str):
        ids = list(tokenizer(text)["input_ids"])
        return Encoded(ids, ids)
    if isinstance(text, Pair) and not has_template(tokenizer):
        # A model that never saw turns reads a question and its answer as two lines.
        return encode_row(Pair(prompt=f"{text.prompt}\n", completion=text.completion), tokenizer)
    return encode_row(text, tokenizer)


def _cut(encoded: Encoded, max_length: int) -> list[Encoded]:
    # Without overlap: each token counts once, though the first ones of a piece have less in front of them.
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


def losses(
    model: Any,
    tokenizer: Any,
    read: Sequence[Passage],
    batch_tokens: int = LOGITS,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """The loss of each passage, summed over its tokens, in nats: (passages,) in float64.

    Args:
        batch_tokens: tokens predicted at once; their logits weigh more than all else.
        on_batch: told how many tokens each batch had, padding excluded.

    Raises:
        ConfigError: ids that the model has no embedding for, or a loss that is not a number.
    """
    _check_ids(model, read)
    rows = [passage.encoded for passage in read]

    def count_tokens(chosen: list[int]) -> None:
        on_batch(sum(len(rows[index].input_ids) for index in chosen))

    return summed_losses(model, tokenizer, rows, logits=batch_tokens, on_batch=count_tokens)


def _check_ids(model: Any, read: Sequence[Passage]) -> None:
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    largest = max((max(passage.encoded.input_ids) for passage in read), default=0)
    if rows is not None and largest >= rows:
        raise ConfigError(
            f"the tokenizer gives the id {largest} and the {type(model).__name__} has {rows} embeddings; the tuned "
            "model got tokens that its base lacks, so that the two can't be compared on texts with them"
        )
