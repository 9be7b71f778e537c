"""Token embeddings that the base on disk doesn't have: resized after it was loaded, and stored with the adapter.

An adapter on such a model means nothing without their rows, which were drawn anew. Rows that the adapter trains are in
its file anyway; embeddings with others are stored whole, as `peft` does, and an adapter with whole ones is put on a
base with as many tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.frozen import Site, walk
from slimtune.core.roles import input_embeddings
from slimtune.errors import ConfigError, listing, warn
from slimtune.methods.trainable_tokens import TokenRows
from slimtune.storage.foreign import open_tensors
from slimtune.storage.hub import parted
from slimtune.storage.peft_format import KEY_PREFIX, WEIGHTS_NAME
from slimtune.storage.source import PACKAGED, resolve

Placed = list[tuple[Site, Any]]


def token_embeddings(model: Any) -> dict[str, nn.Module]:
    """The input embeddings and the output layer by path."""
    output = getattr(model, "get_output_embeddings", None)
    ends = [module for module in (input_embeddings(model), output() if output else None) if module is not None]
    paths: dict[int, str] = {}
    for path, module in walk(model):
        if any(module is end for end in ends):
            paths.setdefault(id(module), path)
    # An image model's patch embeddings are its input embeddings to transformers.
    is_table = {id(module) for module in ends if module._parameters.get("weight") is not None}
    return {paths[id(module)]: module for module in ends if id(module) in paths and id(module) in is_table}


def vocabulary_of(model: Any) -> int | None:
    """How many tokens the model's config gives it."""
    return _vocabulary(getattr(model, "config", None))


def stored_vocabulary(model: Any) -> int | None:
    """How many tokens the base has where it was loaded from, or None where that can't be looked up on this machine."""
    from transformers import AutoConfig

    source, revision = parted(getattr(model, "name_or_path", None) or "")
    if not source:
        return None
    try:
        folder = resolve(source) if source in PACKAGED else source
        # A model with code of its own is refused, where the default asks whoever sits at the terminal.
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        return _vocabulary(AutoConfig.from_pretrained(folder, revision=revision, **options))
    except (OSError, ValueError, KeyError):
        return None


def _vocabulary(config: Any) -> int | None:
    """The `vocab_size` of a config, of its text part where it has several."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def _untrained(model: Any, placed: Placed, before: int | None) -> dict[str, nn.Module]:
    """Those of the token embeddings that have rows which neither the base had before nor the adapter trains.

    Args:
        before: how many tokens the base had, if that is known.
    """
    now = vocabulary_of(model)
    if now is None or before is None or before == now:
        return {}
    deltas = {id(site.module): delta for site, delta in placed}
    # Empty where the embeddings became smaller: then every row is an old one, and yet the table isn't the file's.
    new = set(range(before, now))
    return {
        path: module
        for path, module in token_embeddings(model).items()
        if not _trains(deltas.get(id(module)), new) and _is_dense(module)
    }


def _trains(delta: Any, tokens: Collection[int]) -> bool:
    """Whether a delta stores these rows, of which there are none where the embeddings became smaller."""
    if delta is None:
        return False
    if isinstance(delta, TokenRows):
        return bool(tokens) and set(tokens) <= set(delta.token_indices.tolist())
    return "weight" in delta.stand_ins()


def _is_dense(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.is_floating_point()


def warn_of_untrained_rows(model: Any, placed: Placed) -> None:
    """Warn of tokens that were added to the base and that a new adapter doesn't train."""
    before = stored_vocabulary(model)
    untrained = _untrained(model, placed, before)
    if untrained:
        warn(
            f"the embeddings were resized from {before} to {vocabulary_of(model)} tokens, and the adapter trains none "
            f"of {listing(untrained)}: name the new tokens in trainable_token_indices, or the modules in "
            "modules_to_save; as it is, they are stored with the adapter untrained"
        )


def saved_whole(model: Any, placed: Placed, save_embedding_layers: str | bool) -> dict[str, Tensor]:
    """The embeddings to store beside an adapter, by their names on disk.

    Args:
        save_embedding_layers: True for both ends of the model, False for none, "auto" for those that were resized and
            that the adapter doesn't train; what it trains whole is stored in any case.

    Raises:
        ConfigError: another value.
    """
    if save_embedding_layers not in ("auto", True, False):
        raise ConfigError(f'save_embedding_layers is True, False or "auto", found {save_embedding_layers!r}')
    if save_embedding_layers is False:
        return {}
    if save_embedding_layers is True:
        chosen = {path: module for path, module in token_embeddings(model).items() if _is_dense(module)}
    else:
        # A base that isn't on disk had what it had when its first adapter came.
        chosen = _untrained(model, placed, stored_vocabulary(model) or model.adapter_state.vocabulary)
    deltas = {id(site.module): delta for site, delta in placed}
    frozen = {id(module): tensors for module, tensors in model.adapter_state.replaced}
    tensors: dict[str, Tensor] = {}
    for path, module in chosen.items():
        delta = deltas.get(id(module))
        if delta is not None and "weight" in delta.stand_ins():
            continue
        # From before a merge: the file must hold the base's rows, not the base's with the adapter in them.
        own = dict(module.named_parameters(recurse=False)) | frozen.get(id(module), {})
        # `peft` wraps a module that an adapter changes; its own tensors then stand under `base_layer`.
        inside = "" if delta is None else "base_layer."
        tensors |= {f"{KEY_PREFIX}{path}.{inside}{name}": tensor.detach() for name, tensor in own.items()}
    if tensors and save_embedding_layers == "auto":
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        warn(
            f"the embeddings were resized after the base was loaded: {listing(chosen)} are saved whole with the "
            f"adapter, {size / 1e6:.1f} MB; save_embedding_layers=False leaves them out"
        )
    return tensors


def stored_whole(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """The paths of embeddings that a file has whole without its config saying so."""
    if {"output", "everything"} & set(config.default_targets):
        return []  # The method trains them itself.
    saved = getattr(config, "modules_to_save", None) or []
    return [
        path
        for path in token_embeddings(model)
        if f"{KEY_PREFIX}{path}.weight" in tensors and not any(f".{path}".endswith(f".{name}") for name in saved)
    ]


def base_copies(model: Any, placed: Placed) -> dict[str, Tensor]:
    """The base's own tensors by the names that `peft` gives to copies of them in a file."""
    modules = {f"{KEY_PREFIX}{site.name}.base_layer": site.module for site, _ in placed}
    modules |= {KEY_PREFIX + path: module for path, module in token_embeddings(model).items()}
    return {
        f"{name}.{parameter}": tensor
        for name, module in modules.items()
        for parameter, tensor in module.named_parameters(recurse=False)
    }


def resize_as_stored(model: Any, folder: Path) -> None:
    """Give a base that was just loaded the tokens that the adapter in the folder was made with.

    Matrices that the file has beside a change of their own (`base_layer`) are taken over, too.

    Raises:
        AdapterFileError: the adapter's weights can't be read.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        return  # which reading the adapter tells
    with open_tensors(path) as file:
        keys = set(file.keys())
        for name, module in token_embeddings(model).items():
            inside = next((i for i in ("weight", "base_layer.weight") if f"{KEY_PREFIX}{name}.{i}" in keys), None)
            if inside is None or not _is_dense(module):
                continue
            stored = file.get_slice(f"{KEY_PREFIX}{name}.{inside}")
            if len(stored.get_shape()) == 2 and stored.get_shape()[0] != len(module.get_parameter("weight")):
                # Without the mean of the old rows: the rows are overwritten from the file, and the mean costs a
                # covariance of the table.
                model.resize_token_embeddings(stored.get_shape()[0], mean_resizing=False)
        for name, module in token_embeddings(model).items():
            key, own = f"{KEY_PREFIX}{name}.base_layer.weight", module.get_parameter("weight")
            if key in keys and file.get_slice(key).get_shape() == [*own.shape]:
                with torch.no_grad():
                    own.copy_(file.get_tensor(key))
