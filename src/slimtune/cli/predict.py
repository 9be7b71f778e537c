"""`slimtune predict`: labels for texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from slimtune.cli.options import Device, Dtype, Json, Quantize, TrustRemoteCode


def predict(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="What train wrote for labels or tags.")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="JSONL or CSV with text (text_pair, label); or with tokens (tags).")
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Texts judged at once.")] = 32,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long for the model.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Say the label of each text, or the tags of its words, one text a line, in the order of the file.

    Where all rows have labels or tags of their own, the scores are told on standard error.
    With --json each line has the text, the label and its probability, or the tokens, their tags and the entities.

    Example: slimtune predict tuned texts.jsonl --json
    """
    from slimtune.cli.options import console
    from slimtune.data.reading import read_texts
    from slimtune.data.rows import Labelled
    from slimtune.evaluate.labelling import is_tagger, label_texts
    from slimtune.metrics.classification import scores, shown

    if is_tagger(model):
        _tag(model, data, batch_size, truncate, quantize, (dtype, device, trust_remote_code), as_json)
        return
    rows = read_texts(data)
    too_long, options = "truncate" if truncate else "error", (dtype, device, trust_remote_code)
    texts = [row.texts for row in rows]
    labels, _, likelihood_NL = label_texts(model, texts, batch_size, too_long, quantize, options)
    answers = [labels[index] for index in likelihood_NL.argmax(-1).tolist()]
    for row, answer, p in zip(rows, answers, likelihood_NL.amax(-1).tolist(), strict=True):
        print(json.dumps({**row.model_dump(exclude_none=True), "label": answer, "p": p}) if as_json else answer)
    true = [row.label for row in rows if isinstance(row, Labelled)]
    if len(true) == len(rows):
        console(as_json=True).print(shown(scores(answers, true)))


def _tag(
    model: str, data: Path, batch_size: int, truncate: bool, quantize: str | None, options: tuple[Any, ...],
    as_json: bool,
) -> None:  # fmt: skip
    from slimtune.cli.options import console
    from slimtune.data.reading import read_words
    from slimtune.data.rows import Tagged
    from slimtune.evaluate.tagger import tag_words
    from slimtune.metrics.classification import shown
    from slimtune.metrics.tagging import entities, has_entities, tag_scores

    rows = read_words(data)
    too_long = "truncate" if truncate else "error"
    found = tag_words(model, [row.tokens for row in rows], batch_size, too_long, quantize, options)
    for row, tags in zip(rows, found, strict=True):
        if not as_json:
            print(" ".join(tags))
            continue
        spelled = entities(tags) if has_entities(tags) else []
        named = [e._asdict() | {"text": " ".join(row.tokens[e.start : e.end])} for e in spelled]
        print(json.dumps({"tokens": row.tokens, "tags": tags, "entities": named}))
    true = [row.tags for row in rows if isinstance(row, Tagged)]
    if len(true) == len(rows):
        console(as_json=True).print(shown(tag_scores(found, true)))
