"""Whether a training shares what the rows of its batches begin with: decided on a sample of the batches, and told."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape

from slimtune.data.prefixes import (
    SAMPLED,
    GroupedSampler,
    PrefixGroups,
    beginnings,
    sample_batches,
    tokens_of,
)
from slimtune.errors import ConfigError
from slimtune.models.prefix_trial import check_shares, counts_columns
from slimtune.models.shared_prefixes import (
    WORTHWHILE,
    SharedTokens,
    check_kind,
    is_encoded,
    masks_packed_rows,
    shared_prefixes,
)
from slimtune.recipe.training import TrainSettings
from slimtune.train.trainer import AnswerTrainer

MOST_GROUPED = 4096
"""Examples that are sorted to say what grouping would save: to sort all of a large data set would delay every start."""


def group_prefixes(trainer: AnswerTrainer, settings: TrainSettings) -> PrefixGroups | None:
    """Let a Trainer draw batches of examples that begin alike, if the settings ask for it.

    Args:
        settings: of the whole run: several processes divide its batches.

    Raises: ConfigError, for examples that can't be grouped.
    """
    if not settings.group_prefixes:
        return None
    rows = beginnings(trainer.train_dataset)
    if rows is None:
        raise ConfigError(
            "training.group_prefixes sorts the examples by their tokens, and these are a stream, packed rows or "
            "prompts to be answered; leave it out"
        )
    groups = PrefixGroups(rows)
    trainer.train_sampler = GroupedSampler(
        # The Trainer's own count of epochs, which a resumed run goes on with.
        groups, len(rows), settings.batch_size, settings.seed, lambda: int(trainer.state.epoch or 0)
    )  # fmt: skip
    return groups


def sharing(
    model: Any,
    settings: TrainSettings,
    examples: Any,
    collate: Callable[[list[Any]], Any],
    console: Console,
    groups: PrefixGroups | None = None,
) -> AbstractContextManager[Any]:
    """A context in which the model shares prefixes, if the settings ask for it or leave it open and it pays.

    Args:
        settings: with this process's share of a step.
        collate: how examples become a batch.
        groups: by which batches are drawn, if they are.

    Raises: ConfigError, where the settings ask for what the model can't.
    """
    if settings.share_prefixes is False:
        return nullcontext()
    encoded = is_encoded(model)
    try:
        # Before anything is drawn: an encoder alone can't, whatever its batches share.
        if not encoded:
            check_kind(model)
    except ConfigError as error:
        return _not_shared(error, settings)
    tokens = _sample(examples, collate, settings, groups, encoded)
    if not masks_packed_rows(model):
        tokens = tokens.of_tokens_alone()
    would_be = SharedTokens() if groups or not tokens.given else _if_grouped(examples, collate, settings, encoded)
    pays = tokens.pays or not tokens.given or settings.asks_to_share
    # Grouped, batches have other lengths, too: what counts is what of them is computed.
    grouping_pays = would_be.pays and would_be.ratio * WORTHWHILE >= tokens.ratio
    if not pays and not grouping_pays:
        return nullcontext()
    try:
        check_shares(model)
    except ConfigError as error:
        left_out = _not_shared(error, settings)
        console.print(escape(f"what rows begin with alike is computed for each of them: {error}"))
        return left_out
    if grouping_pays:
        console.print(
            escape(
                f"with training.group_prefixes=true, which puts examples that begin alike into one batch, "
                f"{would_be.ratio:.2f} times fewer tokens would be computed (docs/training.md)"
            )
        )
    if not pays:
        return nullcontext()
    if tokens.given:
        console.print(
            escape(
                f"{_what(tokens, encoded)}, by {SAMPLED} of the batches (training.share_prefixes=false computes all)"
            )
        )
    # TRL pads the prompts of grpo on the left, and gives no positions.
    return shared_prefixes(model, left_padded=not encoded and not tokens.given and counts_columns(model))


def _what(tokens: SharedTokens, encoded: bool) -> str:
    """What is left out, and how much of it."""
    if encoded:
        return f"a prompt that stands in a batch several times is encoded once: {tokens.ratio:.2f} times fewer tokens"
    if tokens.attend_apart and tokens.computed > WORTHWHILE * tokens.given:
        fewer = tokens.masked_pairs / tokens.pairs
        return f"examples in a packed row attend to themselves alone: {fewer:.1f} times fewer pairs of tokens"
    return f"what rows begin with alike is computed once, and padding not at all: {tokens.ratio:.2f} times fewer tokens"


def _not_shared(error: ConfigError, settings: TrainSettings) -> AbstractContextManager[Any]:
    """Nothing is shared. Raises: ConfigError, where the settings ask for it."""
    if settings.asks_to_share:
        name = "share_prefixes" if settings.share_prefixes else "group_prefixes"
        raise ConfigError(f"{error}; leave training.{name} out") from error
    return nullcontext()


def _sample(
    examples: Any, collate: Callable[[list[Any]], Any], settings: TrainSettings, groups: PrefixGroups | None,
    whole_rows: bool,
) -> SharedTokens:  # fmt: skip
    """The tokens of a few batches, as they would be drawn; none where batches can't be drawn beforehand."""
    if not hasattr(examples, "__len__") or not hasattr(examples, "__getitem__"):
        return SharedTokens()

    def batch(numbers: list[int]) -> Any:
        return collate([examples[number] for number in numbers])

    return tokens_of(sample_batches(batch, len(examples), settings.batch_size, settings.seed, groups, whole_rows))


def _if_grouped(
    examples: Any, collate: Callable[[list[Any]], Any], settings: TrainSettings, whole_rows: bool
) -> SharedTokens:
    """The tokens of a few batches if they were drawn of examples that begin alike; a bound where a part is sorted."""
    if hasattr(examples, "__len__") and len(examples) > MOST_GROUPED:
        numbers = random.Random(settings.seed).sample(range(len(examples)), MOST_GROUPED)
        is_table = hasattr(examples, "select")
        examples = examples.select(numbers) if is_table else [examples[number] for number in numbers]
    rows = beginnings(examples)
    return SharedTokens() if rows is None else _sample(examples, collate, settings, PrefixGroups(rows), whole_rows)
