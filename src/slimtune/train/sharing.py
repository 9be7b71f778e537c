"""Whether a training shares what the rows of its batches begin with: decided on a sample of the batches, and told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape

from slimtune.data.batches import Objective
from slimtune.errors import ConfigError
from slimtune.models.shared_prefixes import SAMPLED, WORTHWHILE, SharedTokens, check_kind, check_shares, shared_prefixes
from slimtune.ops.prefix_tree import prefix_tree
from slimtune.recipe.training import TrainSettings


def sharing(
    model: Any, settings: TrainSettings, examples: Sequence[Any], objective: Objective | None, console: Console
) -> AbstractContextManager[Any]:
    """A context in which the model shares prefixes, if the settings ask for it or leave it open and it pays.

    Args:
        objective: how examples become a batch; None for pairs of answers, which share their prompt.

    Raises: ConfigError, where the settings ask for what the model can't.
    """
    if settings.share_prefixes is False:
        return nullcontext()
    try:
        # Before anything is drawn: an encoder can't, whatever its batches share.
        check_kind(model)
    except ConfigError as error:
        return _not_shared(error, settings)
    tokens = _sample(examples, objective, settings)
    pays = tokens is None or tokens.computed <= WORTHWHILE * tokens.given
    if not settings.share_prefixes and not pays:
        return nullcontext()
    try:
        check_shares(model)
    except ConfigError as error:
        return _not_shared(error, settings)
    if tokens is not None:
        console.print(
            escape(
                f"what rows begin with alike is computed once, and padding not at all: {tokens.ratio:.2f} times fewer "
                f"tokens, by {SAMPLED} of the batches (training.share_prefixes=false computes all)"
            )
        )
    return shared_prefixes(model)


def _not_shared(error: ConfigError, settings: TrainSettings) -> AbstractContextManager[Any]:
    """Nothing is shared. Raises: ConfigError, where the settings ask for it."""
    if settings.share_prefixes:
        raise ConfigError(f"{error}; leave training.share_prefixes out") from error
    return nullcontext()


def _sample(examples: Sequence[Any], objective: Objective | None, settings: TrainSettings) -> SharedTokens | None:
    """The tokens of a few batches, as they would be drawn; None where batches can't be drawn beforehand."""
    if objective is None or not isinstance(examples, Sequence):
        return None
    tokens = SharedTokens()
    drawn = random.Random(settings.seed)
    for _ in range(SAMPLED):
        batch = objective.collate(drawn.sample(examples, min(settings.batch_size, len(examples))))
        if "input_ids" not in batch or batch["input_ids"].dim() != 2:
            return None
        tree = prefix_tree(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))
        tokens.given += batch["input_ids"].numel()
        tokens.computed += len(tree.tokens)
    return tokens
