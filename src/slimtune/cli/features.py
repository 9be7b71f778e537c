"""`slimtune train --method features`: features of a frozen base, and a linear classifier on them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.data.labelled import Labelled, longest_input, tokenize
from slimtune.data.lesson import Classes, Data
from slimtune.errors import ConfigError
from slimtune.evaluate.classification import scores, shown
from slimtune.features import FeatureClassifier, FeatureTuning, extract
from slimtune.loading import is_adapter, load_encoder
from slimtune.staging import staged

if TYPE_CHECKING:
    from rich.console import Console


def train_on_features(
    screen: Console,
    how: FeatureTuning,
    data: Data,
    source: str,
    output: Path,
    overwrite: bool,
    batch_size: int,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Train and write a classifier, say how good it is and give that back; raises SlimtuneError."""
    from slimtune.loading import cache_dir

    if not isinstance(data, Classes):
        raise ConfigError("--method features trains a classifier; give rows with text and label")
    if is_adapter(source):
        raise ConfigError(f"{source} is an adapter; features are those of a base, so pass its base, or merge it first")
    began = time.monotonic()
    model, tokenizer = load_encoder(source, dtype, device, trust_remote_code)
    limit = longest_input(model, tokenizer, data.max_length)
    cache = cache_dir().with_name("features")

    def featured(rows: list[Labelled]) -> tuple[Any, list[str]]:
        kept = tokenize([row.texts for row in rows], tokenizer, limit, data.too_long).kept
        if len(kept) < len(rows):
            screen.print(f"[yellow]{len(rows) - len(kept):,} texts dropped[/]: longer than {limit:,} tokens")
        texts = [rows[i].texts for i in kept]
        too_long = "truncate" if data.too_long == "truncate" else "error"
        found = extract(model, tokenizer, texts, how.pooling, batch_size, cache, limit, too_long)
        return found, [rows[i].label for i in kept]

    features_ND, labels = featured(data.rows)
    screen.print(f"features: {features_ND.shape[0]:,} texts x {features_ND.shape[1]:,}, kept in {cache}", markup=False)
    classifier = FeatureClassifier.fit(features_ND, labels, data.labels, how, source, limit)
    found: dict[str, Any] = {}
    if data.held_out:
        held_out_ND, true = featured(data.held_out)
        found = scores(classifier.predict(held_out_ND), true)
        screen.print(f"on the held-out rows: [bold]{shown(found)}[/]")
    with staged(output, overwrite) as folder:
        classifier.save(folder)
    seconds = time.monotonic() - began
    screen.print(
        f"written to {output} in {seconds:.0f} s; try it:  slimtune predict {output} TEXTS.jsonl", markup=False
    )
    return {"examples": len(labels), "seconds": seconds, "scores": found}
