"""Encode rows of training data as ids and labels; only answers are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.data.batches import IGNORED, Encoded, Limit
from slimtune.data.chat_template import RewritesError, assistant_spans, has_template
from slimtune.data.rows import Conversation, Document, Row
from slimtune.errors import ConfigError, DataError


@dataclass(frozen=True)
class WholeExamples:
    """The examples that rows became, of any length.

    Attributes:
        given: the rows that there were.
        skipped: why each row that couldn't be encoded was left out.
    """

    examples: list[Encoded]
    given: int
    skipped: Sequence[str] = ()


@dataclass(frozen=True)
class EncodedRows:
    """The examples that rows became, and what happened to those that were too long.

    Attributes:
        given: the rows that there were.
        dropped: examples of which nothing is left.
        truncated: examples that were cut.
        apart: examples that conversations became where the template rewrites earlier turns.
        skipped: why each row that couldn't be encoded was left out.
    """

    examples: list[Encoded]
    dropped: int = 0
    truncated: int = 0
    given: int = 0
    apart: int = 0
    skipped: Sequence[str] = ()

    @property
    def tokens(self) -> int:
        """All tokens of one epoch."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def learned(self) -> int:
        """The tokens of one epoch that are learned."""
        return sum(example.learned for example in self.examples)

    @property
    def longest(self) -> int:
        """The tokens of the longest example."""
        return max(len(example.input_ids) for example in self.examples)


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    too_long: str = "error",
    places: Sequence[str] = (),
    positions: int | None = None,
    bad_rows: str = "error",
) -> EncodedRows:
    """Encode rows for training; raises DataError if some are too long, or if nothing would be learned.

    Args:
        places: where each row stands, for complaints.
        positions: how many the model has.
        bad_rows: what becomes of rows that the chat template refuses: error or skip.
    """
    return fitted(encode_whole(rows, tokenizer, places, bad_rows), Limit(max_length, too_long, positions))


def encode_whole(
    rows: Sequence[Row], tokenizer: Any, places: Sequence[str] = (), bad_rows: str = "error"
) -> WholeExamples:
    """Encode rows at whatever length they have; arguments and errors as of `encode`."""
    require_offsets(tokenizer)
    examples: list[Encoded] = []
    skipped: list[str] = []
    for number, row in enumerate(rows):
        where = places[number] if places else f"example {number + 1} of {len(rows)}"
        try:
            examples += encode_answers(row, tokenizer, where)
        except DataError as error:
            # Where every row fails the cause isn't in the rows.
            if bad_rows == "error" or len(skipped) == len(rows) - 1:
                raise
            skipped.append(str(error))
    return WholeExamples(examples, len(rows), skipped)


def fitted(whole: WholeExamples, limit: Limit) -> EncodedRows:
    """The examples within the limit; raises DataError if some are too long, or if nothing would be learned."""
    everything = whole.examples
    # Refused before any is cut, so that the error counts all of them at once.
    limit.refuse([len(example.input_ids) for example in everything], len(everything))
    pieces = [piece for example in everything for piece in fit(example, limit)]
    # Without a label an example gives a loss of 0 / 0, and would only take its share of the batch.
    examples = [example for example in pieces if example.learned]
    if not examples:
        raise DataError(
            f"0% of the tokens would be learned: none of {len(everything)} examples has an answer within "
            f"{limit.tokens} tokens; check that the data has assistant turns, and raise --max-length"
        )
    over = sum(len(example.input_ids) > limit.tokens for example in everything)
    dropped = sum(not any(piece.learned for piece in fit(example, limit)) for example in everything)
    cut = over if limit.too_long in ("truncate", "split") else 0
    apart = len(everything) - (whole.given - len(whole.skipped))
    return EncodedRows(examples, dropped, cut, whole.given, apart, whole.skipped)


def encode_answers(row: Row, tokenizer: Any, where: str) -> list[Encoded]:
    """Encode a row as one example, or as one an answer where the template rewrites earlier turns; raises DataError."""
    try:
        try:
            return [encode_row(row, tokenizer)]
        except RewritesError as error:
            # As the model will be asked: each conversation ends with the one answer that it learns.
            try:
                return [encode_row(part, tokenizer) for part in _answers_apart(row)]
            except RewritesError:
                raise error from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def encode_row(row: Row, tokenizer: Any) -> Encoded:
    """Encode a row as ids and labels; the end of turn is learned, too. Raises: DataError."""
    if isinstance(row, Document):
        ids = list(tokenizer(row.text, verbose=False)["input_ids"])
        # Some tokenizers put their end there already; twice would teach the model to go on behind it.
        ids += [tokenizer.eos_token_id] if tokenizer.eos_token_id not in (None, ids[-1]) else []
        return _unlearnable_first(ids, list(ids))
    text, spans, templated = _text(row, tokenizer)
    # A template writes the special tokens itself; the tokenizer would add a second beginning of sequence.
    tokens = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(
            f"the text begins with {tokenizer.bos_token} twice; remove it from the data, the template adds its own"
        )
    # `offsets` are (T, 2) in characters of the text, and so are the spans of the answers.
    labels = [IGNORED] * len(ids)
    for position, (start, end) in enumerate(offsets):
        # A token that begins in the template and ends in the answer is learned: the answer begins with it.
        # Overlap and not containment; tokens without extent (special ones of the tokenizer) belong to nobody.
        if end > start and any(start < high and end > low for low, high in spans):
            labels[position] = ids[position]
    return _ended(ids, labels, tokenizer)


def fit(example: Encoded, limit: Limit) -> list[Encoded]:
    """The example if it is within the limit, else what is left of it: a part, several parts or nothing."""
    ids, labels, size = example.input_ids, example.labels, limit.tokens
    if len(ids) <= size:
        return [example]
    if limit.too_long == "truncate":
        # Cut at the end, where the answer is: its beginning is learned with its whole question.
        return [Encoded(ids[:size], labels[:size])]
    if limit.too_long == "split":
        # Each piece begins with the last token of the one before, so that every token is predicted once.
        cuts = range(0, len(ids) - 1, size - 1)
        return [_unlearnable_first(ids[cut : cut + size], labels[cut : cut + size]) for cut in cuts]
    return []


def require_offsets(tokenizer: Any) -> None:
    """Raises: DataError, for a tokenizer without the offsets of its tokens in the text."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} can't tell which text its tokens come from, so answers can't be told from "
            f"questions; load the fast tokenizer of the model (tokenizer.json)"
        )


def refuse_split(rows: Sequence[Row], too_long: str) -> None:
    """Raises: ConfigError, for `too_long: split` with rows that have a question and an answer."""
    if too_long == "split" and not all(isinstance(row, Document) for row in rows):
        raise ConfigError("too_long: split is for texts, because half of an answer has no question; drop or truncate")


def _answers_apart(row: Row) -> Iterator[Conversation]:
    """One conversation for each answer, which ends with it and learns it alone."""
    assert isinstance(row, Conversation)
    for number, learned in enumerate(row.learned(), 1):
        if learned:
            *before, answer = row.messages[:number]
            shown = [turn.model_copy(update={"weight": 0}) for turn in before]
            yield row.model_copy(update={"messages": [*shown, answer]})


def _text(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]], bool]:
    assert not isinstance(row, Document)
    if has_template(tokenizer):
        if isinstance(row, Conversation):
            return *assistant_spans(tokenizer, row.turns(), row.learned(), row.tools), True
        return *assistant_spans(tokenizer, row.turns()), True
    if isinstance(row, Conversation):
        raise DataError(
            "the tokenizer has no chat template, so conversations can't be rendered; train an instruct model, name a "
            "template with chat_template, or give the data as prompt and completion"
        )
    prompt, completion = row.plain()
    return prompt + completion, [(len(prompt), len(prompt) + len(completion))], False


def _ended(ids: list[int], labels: list[int], tokenizer: Any) -> Encoded:
    """End the last answer with a token at which generation stops, if it has none."""
    learned = [position for position, label in enumerate(labels) if label != IGNORED]
    # Not the end of text alone: chat models stop at tokens such as <|im_end|>, which the template writes.
    special = {
        *tokenizer.all_special_ids,
        *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    if learned and ids[learned[-1]] not in special and tokenizer.eos_token_id is not None:
        # What the template puts behind the answer without an end would never be generated.
        ids, labels = ids[: learned[-1] + 1], labels[: learned[-1] + 1]
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return _unlearnable_first(ids, labels)


def _unlearnable_first(ids: list[int], labels: list[int]) -> Encoded:
    # Nothing stands before the first token that could predict it; in a packed row another document would.
    return Encoded(ids, [IGNORED, *labels[1:]])
