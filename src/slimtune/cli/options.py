"""Options that several commands share, and where they print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.errors import AdapterExistsError, AdapterFileError

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a Hub id, the packaged [bold]smollm2-135m-instruct[/], or an adapter folder.",
    ),
]
Base = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model folder, a Hub id or the packaged [bold]smollm2-135m-instruct[/]."),
]
TunedModel = Annotated[
    str, typer.Argument(metavar="TUNED", help="The folder of an adapter, or of a model that was tuned as a whole.")
]
TunedBase = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="What it was tuned from; without it, what its folder names."),
]
Adapters = Annotated[
    list[str],
    typer.Option("--adapter", "-a", metavar="[NAME=]DIR", help="An adapter's folder or Hub id; repeatable."),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files in the output folder, once the new ones are whole.")
]
Dtype = Annotated[str, typer.Option(metavar="TYPE", help="auto (as stored), bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="KIND",
        help="While loading: nf4, fp4, int8, int8-torchao, int4-torchao.",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines; what is for people goes to stderr.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]


def console(as_json: bool = False) -> Console:
    """Where people read: standard output, unless JSON goes there."""
    from rich.console import Console

    # Soft: a sentence or a path that is piped on must not be broken at 80 columns.
    return Console(stderr=as_json, highlight=False, soft_wrap=True)


def parse(values: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` or `DIR`, or ids of the Hub, as name to place; raises AdapterExistsError for two of one name."""
    found: dict[str, str] = {}
    for value in values:
        # A folder may have an equals sign in its own name.
        name, equals, folder = ("", "", value) if Path(value).is_dir() else value.partition("=")
        if not equals:
            name, folder = Path(value).resolve().name.partition("@")[0], value
        if name in found:
            raise AdapterExistsError(
                f"two adapters are called '{name}' ({found[name]} and {folder}); "
                f"name them, as in --adapter other={folder}"
            )
        found[name] = folder
    return found


def attach(model: Any, adapters: dict[str, str]) -> Any:
    """The model with the adapters, the first of them active; raises AdapterFileError if a folder is missing."""
    from slimtune.adapters.model import PeftModel
    from slimtune.storage.hub import is_id
    from slimtune.storage.source import folder_of

    for name, source in adapters.items():
        if not Path(source).is_dir() and not ("/" in source and is_id(source)):
            raise AdapterFileError(f"no adapter folder {source}; pass the folder that save_pretrained wrote")
        folder = source if Path(source).is_dir() else folder_of(source)
        if hasattr(model, "peft_config"):
            model.load_adapter(folder, name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    if adapters:
        model.set_adapter(next(iter(adapters)))
    return model
