"""`slimtune predict`: labels for texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from slimtune.cli.options import Device, Dtype, Json, Quantize, TrustRemoteCode


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
    from slimtune.data.reading import read_texts
    from slimtune.data.rows import Labelled
    from slimtune.evaluate.classification import scores, shown
    from slimtune.evaluate.labelling import label_texts

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
