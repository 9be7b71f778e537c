"""Adapters named on the command line, attached to one base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimtune.errors import AdapterExistsError, AdapterFileError


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
    from slimtune import PeftModel
    from slimtune.hub import is_id
    from slimtune.source import folder_of

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
