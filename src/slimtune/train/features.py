"""The method `features`: features of a frozen base, and a linear classifier on them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.data.features import FeatureClassifier, extract
from slimtune.data.rows import Labelled
from slimtune.data.tasks.classification import Classes, longest_input, tokenize
from slimtune.data.tasks.registry import Data
from slimtune.errors import ConfigError
from slimtune.metrics.classification import scores, shown
from slimtune.models.load import load_encoder
from slimtune.storage.atomic import staged
from slimtune.storage.source import cache_dir, refuse_adapter
from slimtune.train.loop import Outcome
from slimtune.train.measurements import Figures, Memory

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.recipe.recipe import Recipe


def train_on_features(screen: Console, recipe: Recipe, data: Data, overwrite: bool) -> Outcome:
    """Train and write a classifier, say how good it is and give that back; raises SlimtuneError."""
    source = recipe.model.source
    Memory.watch()
    if not isinstance(data, Classes):
        raise ConfigError("--method features trains a classifier; give rows with text and label")
    refuse_adapter(source)
    began = time.monotonic()
    how = recipe.method.config()
    model, tokenizer = load_encoder(source, recipe.model.dtype, recipe.model.device, recipe.model.trust_remote_code)
    limit = longest_input(model, tokenizer, data.max_length)
    cache = cache_dir().with_name("features")
    tokens = 0

    def featured(rows: list[Labelled]) -> tuple[Any, list[str]]:
        nonlocal tokens
        tokenized = tokenize([row.texts for row in rows], tokenizer, limit, data.too_long)
        kept = tokenized.kept
        tokens += tokenized.tokens
        if len(kept) < len(rows):
            screen.print(f"[yellow]{len(rows) - len(kept):,} texts dropped[/]: longer than {limit:,} tokens")
        texts = [rows[i].texts for i in kept]
        too_long = "truncate" if data.too_long == "truncate" else "error"
        size = recipe.training.batch_size
        found = extract(model, tokenizer, texts, how.pooling, size, cache, limit, too_long)
        return found, [rows[i].label for i in kept]

    features_ND, labels = featured(data.rows)
    screen.print(f"features: {features_ND.shape[0]:,} texts x {features_ND.shape[1]:,}, kept in {cache}", markup=False)
    classifier = FeatureClassifier.fit(features_ND, labels, data.labels, how, source, limit)
    found: dict[str, Any] = {}
    if data.held_out:
        held_out_ND, true = featured(data.held_out)
        found = scores(classifier.predict(held_out_ND), true)
        screen.print(f"on the held-out rows: [bold]{shown(found)}[/]")
    with staged(Path(recipe.output), overwrite) as folder:
        classifier.save(folder)
        outcome = Outcome(0, tokens, time.monotonic() - began, float("nan"), None, found)
        recipe.write(folder / "recipe.yaml")
        trained = classifier.weight.numel() + classifier.bias.numel()
        Figures(recipe, data.task_type, outcome, len(labels), trained, Memory.peak()).write(folder)
    return outcome
