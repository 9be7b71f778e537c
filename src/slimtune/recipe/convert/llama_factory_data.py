"""LLaMA-Factory names its data in dataset_info.json: those entries as the sources of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from slimtune.data.settings import Source
from slimtune.data.sources import records
from slimtune.errors import ConfigError, SlimtuneError, did_you_mean
from slimtune.recipe.convert.rules import Imported, given, names, taken, with_fields
from slimtune.recipe.convert.trainer_keys import hold_out

INFO = "dataset_info.json"
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
"""Their names of the columns of alpaca rows, and ours."""
PREFERENCE = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
MEDIA = ("images", "videos", "audios")
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
SHARE_GPT_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip


def sources_of(found: Imported, values: Mapping[str, Any], folder: Path) -> None:
    """Put the training data into the recipe."""
    if not taken(values, "dataset"):
        found.refused["dataset"] = "no data is named"
        return
    sources = _sources(found, values, "dataset", folder)
    weights = taken(values, "interleave_probs")
    mixes = str(taken(values, "mix_strategy", "concat"))
    if "mix_strategy" in values:
        found.without_effect["mix_strategy"] = "all rows of all sources, as here"
    if mixes != "concat" and weights is not None:
        shares = [float(weight) for weight in names(weights)]
        if len(shares) != len(sources):
            raise ConfigError(f"interleave_probs has {len(shares)} weights for {len(sources)} data sets")
        for source, weight in zip(sources, shares, strict=True):
            source["weight"] = weight
        found.translated |= {"mix_strategy": "data.train.weight", "interleave_probs": "data.train.weight"}
        found.different["mix_strategy"] = "an epoch has as many rows as the sources together, drawn by weight"
    elif mixes != "concat":
        found.refused["mix_strategy"] = "sources are mixed by weights; give interleave_probs"
    found.put("data.train", sources, "dataset")


def held_out_of(found: Imported, values: Mapping[str, Any], folder: Path) -> None:
    """Put what is held out into the recipe."""
    if taken(values, "eval_dataset"):
        found.put("data.held_out", _sources(found, values, "eval_dataset", folder), "eval_dataset")
    hold_out(found, values, "val_size")


def _sources(found: Imported, values: Mapping[str, Any], key: str, folder: Path) -> list[dict[str, Any]]:
    where = str(taken(values, "dataset_dir", "data"))
    most = taken(values, "max_samples")
    sources = []
    try:
        info = None if where == "ONLINE" else _info(where, folder)
        for name in names(values[key]):
            if info is not None and name not in info[0]:
                raise ConfigError(f"'{name}' is no entry of {info[1] / INFO}{did_you_mean(name, info[0])}")
            entry = {"hf_hub_url": name} if info is None else info[0][name]
            sources.append(_source(entry, name, info[1] if info else folder, most))
    except SlimtuneError as error:
        found.refused[key] = str(error)
    found.translated |= dict.fromkeys(given(values, "dataset_dir", "media_dir", "max_samples"), "data.train")
    return sources


def _info(where: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """The entries, and the folder that their files are in: from where one stands, or from where their file is."""
    for place in (Path(where), folder / where, *(parent / where for parent in folder.absolute().parents)):
        if (place / INFO).is_file():
            try:
                info = json.loads((place / INFO).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{place / INFO} is not JSON ({error})") from error
            return info, place
    raise ConfigError(f"the names of data stand in {Path(where) / INFO}, which isn't here; run where it is")


def _source(entry: Mapping[str, Any], name: str, folder: Path, most: int | None) -> dict[str, Any]:
    local = "file_name" in entry and "hf_hub_url" not in entry
    if not local and "hf_hub_url" not in entry:
        raise ConfigError(f"'{name}' is neither a file nor on the Hub, but {', '.join(sorted(entry))}")
    most = entry.get("num_samples") or most
    if local and most:
        _refuse_more_rows(folder / entry["file_name"], most)
    split = entry.get("split") or ("train" if not local else None)
    source: dict[str, Any] = {"path": str(folder / entry["file_name"]) if local else entry["hf_hub_url"]}
    source |= {"split": f"{split}[:{most}]" if most else split} if split and not local else {}
    source |= {"subset": entry["subset"]} if entry.get("subset") else {}
    if entry.get("folder"):
        raise ConfigError(f"'{name}' is a folder of a data set on the Hub, which can't be told apart here")
    return source | _format(entry, name)


def _refuse_more_rows(path: Path, most: int) -> None:
    """Of a file all rows are learned: fine, if there are no more than what was asked for."""
    if not path.exists():
        raise ConfigError(f"{path} isn't here, so whether it has more than {most} rows can't be told; run where it is")
    if sum(1 for _ in islice(records(Source(str(path))), most + 1)) > most:
        raise ConfigError(f"{path} has more than {most} rows, and all would be learned; cut it, or drop max_samples")


def _format(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    media = [key for key in MEDIA if columns.get(key)]
    if media:
        raise ConfigError(f"'{name}' has {', '.join(media)}; models of images, sound and video aren't tuned here")
    if columns.get("history") or columns.get("kto_tag"):
        raise ConfigError(f"'{name}' has columns without a counterpart; write its rows as messages")
    if entry.get("formatting", "alpaca") == "alpaca":
        ours, kind = (PREFERENCE, "preference") if entry.get("ranking") else (ALPACA, "alpaca")
        if kind == "preference" and columns.get("query"):
            raise ConfigError(f"'{name}' has a query beside its prompt; write both into prompt")
        return with_fields(kind, {ours[key]: column for key, column in columns.items() if key in ours and column})
    if entry.get("ranking"):
        raise ConfigError(f"'{name}' has preferences as ShareGPT has them; write rows with prompt, chosen and rejected")
    fields = {key: columns[key] for key in ("system", "tools") if columns.get(key)}
    place = columns.get("messages", "conversations")
    if {**SHARE_GPT_TAGS, **tags} == SHARE_GPT_TAGS:
        return with_fields("sharegpt", fields | {"conversations": place})
    if {**OPENAI_TAGS, **{key: tag for key, tag in tags.items() if key in OPENAI_TAGS}} == OPENAI_TAGS:
        return with_fields("messages", fields | {"messages": place})
    raise ConfigError(f"'{name}' has tags of its own ({tags}); write its rows as messages")
