"""`slimtune generate`: answers to prompts, one or many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from slimtune.cli.options import (
    Adapters,
    Device,
    Dtype,
    Json,
    MaxNewTokens,
    Model,
    Quantize,
    Temperature,
    TrustRemoteCode,
    load_text_model,
)  # fmt: skip
from slimtune.console.screen import print_json, say
from slimtune.errors import DataError


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to answer; without it, standard input is read.")] = None,
    adapter: Adapters = [],  # noqa: B006 - typer copies it
    input_file: Annotated[
        Path | None, typer.Option("--input", "-i", help="JSONL with a prompt, or messages, in each line.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message put in front of each prompt.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Answer prompts from the command line, standard input or a JSONL file.

    Example: slimtune generate smollm2-135m-instruct "two large lattes for maria" --adapter tuned
    """
    conversations = _conversations(prompt, input_file, system)
    from transformers import set_seed

    from slimtune.data.chat_template import render
    from slimtune.evaluate.generation import generate_batch
    from slimtune.models.load import LoadOptions

    options = LoadOptions(dtype, device, trust_remote_code, quantize, computes="tokens")
    loaded, tokenizer = load_text_model(model, adapter, options)
    set_seed(seed)
    prompts = [render(tokenizer, conversation, for_answer=True) for conversation in conversations]
    answers = generate_batch(loaded, tokenizer, prompts, max_new_tokens, temperature, batch_size)
    for conversation, answer in zip(conversations, answers, strict=True):
        print_json({"messages": conversation, "answer": answer}) if as_json else say(answer)


def _conversations(prompt: str | None, file: Path | None, system: str | None) -> list[list[dict[str, str]]]:
    if prompt is not None and file is not None:
        raise DataError("a prompt and --input were both given; pass one of them")
    opening = [{"role": "system", "content": system}] if system else []
    if file is not None:
        from slimtune.data.reading import read_questions

        return [opening + question for question in read_questions(file)]
    if prompt is None and sys.stdin.isatty():
        raise DataError("no prompt was given; pass one, or --input with a JSONL file, or pipe text in")
    text = sys.stdin.read() if prompt is None else prompt
    if not text.strip():
        raise DataError("the prompt is empty; write what the model is to answer")
    return [[*opening, {"role": "user", "content": text.strip()}]]
