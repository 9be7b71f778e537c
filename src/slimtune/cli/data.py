"""`slimtune data`: training data looked at before anything is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from slimtune.cli.options import Fields, Json, TrustRemoteCode, columns_of
from slimtune.console.screen import open_screen, print_json

data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look at training data before anything is trained.\n\n"
    "Example: slimtune data preview orders/train.jsonl --model smollm2-135m-instruct",
)


@data.callback()
def group() -> None:
    """Keeps `preview` a command of its own while it is the only one."""


@data.command("preview")
def preview(
    sources: Annotated[list[str], typer.Argument(metavar="DATA...", help="Files, folders or data sets of the Hub.")],
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer and chat template are used; without it rows are shown as read.")
    ] = None,
    format: Annotated[str, typer.Option(help="messages, sharegpt, alpaca, ...; auto finds it by looking.")] = "auto",
    task: Annotated[str, typer.Option(help="What is to be learned; auto finds it by looking.")] = "auto",
    field: Fields = [],  # noqa: B006 - typer copies it
    split: Annotated[str | None, typer.Option(help="Of a folder or data set; train unless told.")] = None,
    subset: Annotated[str | None, typer.Option(help="The configuration of a data set of the Hub.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="A name or a file in place of the tokenizer's own.")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Count rows that can't be read, and show the first three.")
    ] = False,
    examples: Annotated[int, typer.Option(min=0, help="How many are shown.")] = 3,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example in training.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at once in training, for the padding.")] = 8,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Read only the first so many of each source; all unless told.")
    ] = None,
    packing: Annotated[bool, typer.Option("--packing", help="Tell what packing makes of it.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show the format of data, examples with what is learned of them in colour, and how long they are.

    With --model lengths are counted in its tokens, else in characters. Nothing is trained and no weights are loaded.

    Example: slimtune data preview orders/train.jsonl --model smollm2-135m-instruct --packing
    """
    from slimtune.data.preview import preview as look
    from slimtune.data.settings import DataSettings, Source
    from slimtune.errors import ConfigError
    from slimtune.pipeline.show_data import show_preview
    from slimtune.plan.plan import tokenizer_of

    if model is None and (packing or chat_template):
        raise ConfigError("packing and chat templates are a matter of tokens; pass --model")
    train = [Source(source, format=format, split=split, subset=subset) for source in sources]
    settings = DataSettings(
        train, max_length=max_length, packing=packing, chat_template=chat_template, fields=columns_of(field),
        bad_rows="skip" if skip_bad_rows else "error",
    )  # fmt: skip
    screen = open_screen(as_json)
    with screen.status("reading..."):
        tokenizer = None if model is None else tokenizer_of(model, trust_remote_code)
        looked = look(settings, tokenizer, task, examples, rows)
    if as_json:
        print_json(looked.to_dict(max_length, batch_size))
    else:
        show_preview(screen, looked, max_length, batch_size, packing)
