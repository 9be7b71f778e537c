"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from slimtune.cli.proposals import dtypes, methods, models, quantizations, torch_devices
from slimtune.console.libraries import importing
from slimtune.errors import AdapterExistsError, AdapterFileError, ConfigError, listing

if TYPE_CHECKING:
    from slimtune.models.load import LoadOptions

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a Hub id, the packaged [bold]smollm2-135m-instruct[/], or an adapter folder.",
        autocompletion=models,
    ),
]
Base = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a Hub id or the packaged [bold]smollm2-135m-instruct[/].",
        autocompletion=models,
    ),
]
TunedModel = Annotated[
    str,
    typer.Argument(
        metavar="TUNED",
        help="The folder of an adapter, or of a model that was tuned as a whole.",
        autocompletion=models,
    ),
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
AdapterBase = Annotated[str | None, typer.Option(help="The base; without it, the one that the adapter names.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files in the output folder, once the new ones are whole.")
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="TYPE",
        help="auto (as stored; float32 where the processor only emulates 16 bits), bfloat16, float16 or float32.",
        autocompletion=dtypes,
    ),
]
StoredDtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="TYPE", help="auto (as stored), bfloat16, float16 or float32.", autocompletion=dtypes
    ),
]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...", autocompletion=torch_devices)
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="KIND",
        help="While loading: nf4, fp4, int8, int4, int8-torchao, int4-torchao.",
        autocompletion=quantizations,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines; what is for people goes to stderr.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
Method = Annotated[str, typer.Option(help="One of those that [bold]slimtune methods[/] lists.", autocompletion=methods)]
Rank = Annotated[int | None, typer.Option("--rank", "--r", help="Rank of the update; 16 for lora.")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", "--lr", help="By default the method's own.")]
Epochs = Annotated[float, typer.Option(help="Times through the data.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after these steps.")]
BatchSize = Annotated[int, typer.Option(help="Examples at once.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Of an example, in tokens.")]
Seed = Annotated[int, typer.Option(help="Of weights and order.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that was broken off, to the same end.")]
Plans = Annotated[bool, typer.Option("--plan/--no-plan", help="Refuse what can't fit before anything is loaded.")]
Fields = Annotated[
    list[str],
    typer.Option(
        "--field", metavar="NAME=COLUMN", help="What a column is called in the data, as prompt=question; repeatable."
    ),
]


TYPED = "slimtune.typed"
"""Where the context of a command has the arguments as they were typed."""


class RecipeCommand(TyperCommand):
    """A command that takes `section.key=value` of a recipe, and names the key where it is written as an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. Raises: ConfigError, with what to write instead of an option that is a key."""
        written = ctx.meta[TYPED] = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # By its name, for typer carries a copy of click whose place changes.
            if type(error).__name__ != "NoSuchOption":
                raise
            option = getattr(error, "option_name", "")
            advice = _as_key(option, written, [str(parameter.name) for parameter in self.params])
            if not advice:
                raise
            raise ConfigError(f"there is no option {option}{advice}") from error


def _as_key(option: str, arguments: list[str], options: Iterable[str]) -> str:
    """What to write instead of an unknown option, as the end of a sentence: a key of a recipe, or the nearest."""
    from slimtune.recipe.recipe import keys, place_of, type_of

    name = option.lstrip("-").replace("-", "_")
    # `--no-packing` is packing=false.
    place = place_of(name) or place_of(name.removeprefix("no_"))
    if not place:
        known = keys() | {own: f"--{own.replace('_', '-')}" for own in options}
        # Among the command's own options too: most unknown options are misspelt ones.
        near = difflib.get_close_matches(name, known, n=1)
        return f"; did you mean {known[near[0]]}?" if near else ""
    index = next(i for i, argument in enumerate(arguments) if argument.partition("=")[0] == option)
    # Written as `--name=value`, or with the value as the next word.
    value = arguments[index].partition("=")[2] or "".join(arguments[index + 1 : index + 2])
    kind = type_of(place)
    if kind is bool:
        value = "false" if name.startswith("no_") else "true"
    elif "=" in value and ("dict" in str(kind) or "Mapping" in str(kind)):
        place, _, value = f"{place}.{value}".partition("=")
    elif "," in value and ("list" in str(kind) or "set" in str(kind)) and value[0] != "[":
        value = f"[{value}]"
    return "; write " + shlex.quote(f"{place}={value}")


def written(ctx: Any) -> dict[str, Any]:
    """The options and arguments that were typed, with their values; defaults are left out."""
    # The source by its name, for typer carries a copy of click whose place changes.
    return {
        name: value
        for name, value in ctx.params.items()
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def flags(names: Iterable[str]) -> str:
    """`--a, --b and 3 more`: parameters as they are typed, for an error message."""
    return listing("--" + name.replace("_", "-") for name in names)


def columns_of(pairs: Sequence[str]) -> dict[str, str]:
    """Names of columns and what they are called, from `NAME=COLUMN`; raises ConfigError."""
    fields: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"--field takes NAME=COLUMN, found '{pair}'; pass for example --field prompt=question")
        if name in fields:
            raise ConfigError(f"--field names {name} twice ({fields[name]} and {column}); name it once")
        fields[name] = column
    return fields


def parse(values: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` or `DIR`, or ids of the Hub, as name to place; raises AdapterExistsError for two of one name.

    Without a name, that of the folder is taken, with `_` for what an adapter's name can't hold: `v1.0` becomes `v1_0`.
    """
    folders: dict[str, str] = {}
    for value in values:
        # A folder may have an equals sign in its own name.
        name, equals, folder = ("", "", value) if Path(value).is_dir() else value.partition("=")
        if not equals:
            name, folder = re.sub(r"[^\w-]", "_", Path(value).resolve().name.partition("@")[0]), value
        if name in folders:
            raise AdapterExistsError(
                f"two adapters are called '{name}' ({folders[name]} and {folder}); "
                f"name them, as in --adapter other={folder}"
            )
        folders[name] = folder
    return folders


def load_text_model(model: str, adapters: Sequence[str], options: LoadOptions) -> tuple[Any, Any]:
    """A model that writes text with the adapters of `--adapter` attached, and its tokenizer."""
    with importing():
        from slimtune.models.load import load_model

    # All names come first: a mistake in one must not cost loading a model.
    named = parse(adapters)
    loaded, tokenizer = load_model(model, "text", options)
    return attach(loaded, named), tokenizer


def load_merged(model: str, options: LoadOptions) -> tuple[Any, Any]:
    """A plain model and its tokenizer; of an adapter, its base with the adapter in its weights."""
    with importing():
        from slimtune.models.load import load_model

    # Merged: what comes next prunes or quantizes weights, and has no place for an adapter beside them.
    loaded, tokenizer = load_model(model, None, options)
    return loaded.merge_and_unload() if getattr(loaded, "peft_config", None) else loaded, tokenizer


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
