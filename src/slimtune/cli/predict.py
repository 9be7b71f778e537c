"""`slimtune predict`: labels for texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimtune.cli.options import Device, Dtype, Json, Quantize, TrustRemoteCode
from slimtune.console.screen import open_screen, print_json, say
from slimtune.errors import ConfigError, listing

if TYPE_CHECKING:
    from slimtune.models.load import LoadOptions


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

    Where all rows have labels or tags of their own, the scores are printed to standard error.
    With --json each line has the text, the label and its probability, or the tokens, their tags and the entities.

    Example: slimtune predict tuned texts.jsonl --json
    """
    from slimtune.data.reading import read_texts
    from slimtune.data.rows import Labelled
    from slimtune.evaluate.labelling import is_tagger, label_texts, writes_text
    from slimtune.metrics.classification import scores, shown
    from slimtune.models.load import LoadOptions

    options = LoadOptions(dtype, device, trust_remote_code, quantize, computes="batches")
    too_long = "truncate" if truncate else "error"
    if is_tagger(model):
        _tag(model, data, options, batch_size, too_long, as_json)
        return
    if writes_text(model):
        raise ConfigError(
            f"{model} writes text and gives texts no labels; ask it with slimtune generate, score it with slimtune "
            "evaluate"
        )
    rows = read_texts(data)
    labels, _, likelihood_NL = label_texts(model, [row.texts for row in rows], options, batch_size, too_long)
    answers = [labels[index] for index in likelihood_NL.argmax(-1).tolist()]
    for row, answer, p in zip(rows, answers, likelihood_NL.amax(-1).tolist(), strict=True):
        print_json({**row.model_dump(exclude_none=True), "label": answer, "p": p}) if as_json else say(answer)
    true = [row.label for row in rows if isinstance(row, Labelled)]
    if strangers := set(true) - set(labels):
        say(
            f"the data has labels that {model} doesn't know: {listing(strangers)}; it knows {listing(labels)}, and no "
            "score is given",
            to_errors=True,
        )
    elif len(true) == len(rows):
        open_screen(as_json=True).print(shown(scores(answers, true)))


def _tag(model: str, data: Path, options: LoadOptions, batch_size: int, too_long: str, as_json: bool) -> None:
    from slimtune.data.reading import read_words
    from slimtune.data.rows import Tagged
    from slimtune.evaluate.tagger import tag_words
    from slimtune.metrics.classification import shown
    from slimtune.metrics.tagging import entities, has_entities, tag_scores

    rows = read_words(data)
    tags_of_rows = tag_words(model, [row.tokens for row in rows], options, batch_size, too_long)
    for row, tags in zip(rows, tags_of_rows, strict=True):
        if not as_json:
            say(" ".join(tags))
            continue
        spelled = entities(tags) if has_entities(tags) else []
        named = [e._asdict() | {"text": " ".join(row.tokens[e.start : e.end])} for e in spelled]
        print_json({"tokens": row.tokens, "tags": tags, "entities": named})
    true = [row.tags for row in rows if isinstance(row, Tagged)]
    if len(true) == len(rows):
        open_screen(as_json=True).print(shown(tag_scores(tags_of_rows, true)))
