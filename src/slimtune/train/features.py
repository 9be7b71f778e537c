"""The method `features`: features of a frozen base, and a linear classifier on them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from slimtune.data.features import FeatureClassifier, extract
from slimtune.data.rows import Labelled
from slimtune.data.tasks.classification import Classes
from slimtune.data.tasks.registry import Data
from slimtune.data.texts import longest_input, tokenize
from slimtune.errors import ConfigError, counted
from slimtune.metrics.classification import scores, shown
from slimtune.models.load import LoadOptions, load_model
from slimtune.storage.source import cache_dir
from slimtune.train.loop import Outcome

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.recipe.recipe import ModelSettings


def train_on_features(
    screen: Console, data: Data, base: ModelSettings, method: Any, batch_size: int
) -> tuple[FeatureClassifier, Outcome, int]:
    """Train a classifier and score it on the held-out rows.

    Args:
        method: the config of `features`.

    Returns:
        The classifier, the outcome, and how many examples were learned from.

    Raises:
        SlimtuneError: the data is not for a classifier, or the base can't be loaded.
    """
    if not isinstance(data, Classes):
        raise ConfigError("--method features trains a classifier; give rows with text and label")
    began = time.monotonic()
    options = LoadOptions(base.dtype, base.device, base.trust_remote_code, computes="batches")
    model, tokenizer = load_model(base.source, "features", options)
    limit = longest_input(model, tokenizer, data.settings.max_length)
    cache = cache_dir().with_name("features")
    tokens = 0

    def features_of(rows: list[Labelled]) -> tuple[Any, list[str]]:
        nonlocal tokens
        tokenized = tokenize([row.texts for row in rows], tokenizer, limit, data.settings.too_long)
        tokens += tokenized.tokens
        if len(tokenized.kept) < len(rows):
            dropped = len(rows) - len(tokenized.kept)
            screen.print(f"[yellow]{counted(dropped, 'text')} dropped[/]: longer than {limit:,} tokens")
        texts = [rows[i].texts for i in tokenized.kept]
        too_long = "truncate" if data.settings.too_long == "truncate" else "error"
        features_ND = extract(model, tokenizer, texts, method.pooling, batch_size, cache, limit, too_long)
        return features_ND, [rows[i].label for i in tokenized.kept]

    features_ND, labels = features_of(data.rows)
    screen.print(
        f"features: {counted(features_ND.shape[0], 'text')} x {features_ND.shape[1]:,}, kept in {cache}", markup=False
    )
    classifier = FeatureClassifier.fit(features_ND, labels, data.labels, method, base.source, limit)
    scored: dict[str, float] = {}
    if data.held_out:
        held_out_ND, true = features_of(data.held_out)
        scored = scores(classifier.predict(held_out_ND), true)
        screen.print(f"on the held-out rows: [bold]{shown(scored)}[/]")
    return classifier, Outcome(0, tokens, time.monotonic() - began, float("nan"), None, scored), len(labels)
