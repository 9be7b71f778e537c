"""`slimtune predict`: labels for texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli.options import Device, Dtype, Json, Quantize, TrustRemoteCode
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from slimtune.data.labelled import Text


def predict(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="What train wrote for texts with labels.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSONL or CSV with text, and perhaps text_pair, label.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Texts judged at once.")] = 32,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long for the model.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Say the label of each text, one a line, in the order of the file.

    Where all rows have labels of their own, the accuracy is told on standard error.
    With --json each line has the text, the label and its probability.

    Example: slimtune predict tuned texts.jsonl --json
    """
    from slimtune.cli.options import console
    from slimtune.data.labelled import Labelled, read_texts
    from slimtune.evaluate.classification import scores, shown

    rows = read_texts(data)
    labels, likelihood_NL = _judge(
        model, [row.texts for row in rows], batch_size, truncate, quantize, (dtype, device, trust_remote_code)
    )
    answers = [labels[index] for index in likelihood_NL.argmax(-1).tolist()]
    for row, answer, p in zip(rows, answers, likelihood_NL.amax(-1).tolist(), strict=True):
        print(json.dumps({**row.model_dump(exclude_none=True), "label": answer, "p": p}) if as_json else answer)
    true = [row.label for row in rows if isinstance(row, Labelled)]
    if len(true) == len(rows):
        console(as_json=True).print(shown(scores(answers, true)))


def _judge(
    source: str, texts: list[Text], batch_size: int, truncate: bool, quantize: str | None, options: tuple[Any, ...]
) -> tuple[list[str], Tensor]:
    """The labels that there are, and p_NL of each for each text."""
    from slimtune.features import is_feature_classifier

    too_long = "truncate" if truncate else "error"
    if is_feature_classifier(source):
        from slimtune.features import FeatureClassifier, extract
        from slimtune.loading import load_encoder

        if quantize is not None:
            raise ConfigError(f"{source} was trained on features of the base as it is; leave --quantize out")
        classifier = FeatureClassifier.load(source)
        model, tokenizer = load_encoder(classifier.base, *options)
        features_ND = extract(
            model, tokenizer, texts, classifier.pooling, batch_size, None, classifier.max_length, too_long
        )
        return classifier.labels, classifier.probabilities(features_ND)
    from slimtune.data.labelled import longest_input, tokenize
    from slimtune.evaluate.classification import classify
    from slimtune.loading import load_trained_classifier

    model, tokenizer = load_trained_classifier(source, *options, quantize=quantize)
    rows = tokenize(texts, tokenizer, longest_input(model, tokenizer, None), too_long).rows
    return list(model.config.id2label.values()), classify(model, tokenizer, rows, batch_size)
