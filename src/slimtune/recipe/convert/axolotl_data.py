"""Axolotl's data sets as the sources of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimtune.errors import ConfigError, listing
from slimtune.recipe.convert.rules import Imported, taken, with_fields
from slimtune.recipe.convert.trainer_keys import REVISION, hold_out

LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Of `datasets`: with one of them as the path, data_files are the data."""
IDLE = ("ds_type", "conversation", "chat_template", "trust_remote_code", "train_on_eot", "preprocess_shards")
READ = (
    "path",
    "name",
    "type",
    "split",
    "revision",
    "data_files",
    "field",
    "field_messages",
    "message_property_mappings",
)
AS_HERE = {"roles_to_train": (["assistant"], ["gpt", "assistant"]), "train_on_eos": ("turn",)}
"""What a data set may say of itself that is so here."""
OPENAI = {"role": "role", "content": "content"}
SHARE_GPT = {"role": "from", "content": "value"}


def sources_of(found: Imported, values: Mapping[str, Any]) -> None:
    """Put the training data into the recipe."""
    plain = taken(values, "pretraining_dataset")
    if plain and taken(values, "datasets"):
        found.refused["pretraining_dataset"] = "give it or datasets, not both"
    elif plain:
        several = plain if isinstance(plain, list) else [plain]
        _put(
            found,
            "pretraining_dataset",
            "data.train",
            [_plain(one) if isinstance(one, str | Mapping) else one for one in several],
        )
        found.put("data.streaming", True, "pretraining_dataset")
    elif taken(values, "datasets"):
        _put(found, "datasets", "data.train", values["datasets"])
    else:
        found.refused["datasets"] = "no data is named"


def held_out_of(found: Imported, values: Mapping[str, Any]) -> None:
    """Put what is held out into the recipe."""
    if taken(values, "test_datasets"):
        _put(found, "test_datasets", "data.held_out", values["test_datasets"])
    hold_out(found, values, "val_set_size")


def _put(found: Imported, key: str, place: str, entries: Any) -> None:
    try:
        if not all(isinstance(entry, Mapping) for entry in entries):
            raise ConfigError("data sets are a list of mappings with a path")
        found.put(place, [source for entry in entries for source in _sources(entry, found)], key)
    except ConfigError as error:
        found.refused[key] = str(error)


def _plain(entry: Any) -> dict[str, Any]:
    given = {"path": entry} if isinstance(entry, str) else dict(entry)
    column = given.pop("text_column", None)
    return given | {"type": "completion"} | ({"field": column} if column else {})


def _sources(entry: Mapping[str, Any], found: Imported) -> list[dict[str, Any]]:
    path = entry.get("path")
    if not path:
        raise ConfigError("a data set has no path")
    for key, value in entry.items():
        if key in READ or key in IDLE or value in (None, False, "", [], {}):
            continue
        if value not in AS_HERE.get(key, ()):
            raise ConfigError(f"'{key}' of {path} can't be had here; write its rows as messages")
    files = entry.get("data_files") or []
    files = [files] if isinstance(files, str) else list(files)
    if files and path not in LOADERS:
        raise ConfigError(f"data_files of {path} can't be chosen; name the files as paths of their own")
    if path in LOADERS and not files:
        raise ConfigError(f"'{path}' is a reader of files, and data_files names none")
    shape = _format(entry, path, found)
    if files:
        return [{"path": str(file)} | shape for file in files]
    revision = REVISION.read(entry.get("revision"))
    place = {"subset": entry.get("name"), "split": entry.get("split"), "revision": revision}
    place = {key: value for key, value in place.items() if value}
    return [{"path": path} | place | shape]


def _format(entry: Mapping[str, Any], path: str, found: Imported) -> dict[str, Any]:
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        return _described(kind, path)
    if kind == "completion":
        return with_fields("text", {"text": entry.get("field") or "text"})
    if kind == "alpaca":
        found.different["datasets"] = (
            "alpaca rows are asked in the tokenizer's chat template where it has one, and in alpaca's words where not"
        )
        return {"format": "alpaca"}
    if kind == "sharegpt":
        return with_fields("sharegpt", {"conversations": entry.get("field_messages") or "conversations"})
    if kind == "chat_template":
        return _turns(entry, path)
    raise ConfigError(f"rows of type '{kind}' (of {path}) aren't translated; write them as messages")


def _turns(entry: Mapping[str, Any], path: str) -> dict[str, Any]:
    place, properties = entry.get("field_messages"), entry.get("message_property_mappings") or OPENAI
    if properties == OPENAI:
        return with_fields("messages", {"messages": place or "messages"})
    if properties == SHARE_GPT:
        return with_fields("sharegpt", {"conversations": place or "messages"})
    raise ConfigError(f"turns of {path} are called {listing(properties.values())}; write them as messages")


def _described(kind: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A type of the user's own: columns of preferences can be renamed, prompts can't be worded."""
    fields = {key.removeprefix("field_"): column for key, column in kind.items() if column}
    if not {"chosen", "rejected"} <= fields.keys() <= {"prompt", "chosen", "rejected"}:
        raise ConfigError(f"a type with {listing(kind)} (of {path}) isn't translated; write its rows as messages")
    return with_fields("preference", fields)
