"""Keys of adapter files whose names are not those of the model at hand.

Three things come between: wrappers that a training loop put around the model, names that transformers changed since
the file was written, and a mapping that the caller gives. What stays unknown is left as it is, for the error to name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from slimtune.core.frozen import WRAPPERS, walk, without_wrappers
from slimtune.core.patterns import compiled
from slimtune.storage.peft_format import KEY_PREFIX


def on_model(
    model: Any, tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file by the keys that they have on this model.

    Args:
        key_mapping: expressions and what to put in their place, applied first, each to the part behind the prefix.
    """
    mapped = {_mapped(name, key_mapping or {}): tensor for name, tensor in tensors.items()}
    plain = {_unwrapped(name): tensor for name, tensor in mapped.items()}
    paths = {path for path, _ in walk(model)}
    # The usual case ends here: transformers' renamings are read only for files that don't fit.
    if all(_is_at(name, paths) for name in plain):
        return plain
    renamings = _renamings(model)
    return {_renamed(name, paths, renamings): tensor for name, tensor in plain.items()}


def _mapped(name: str, key_mapping: Mapping[str, str]) -> str:
    inside = name.removeprefix(KEY_PREFIX)
    for expression, replacement in key_mapping.items():
        inside = compiled(expression).sub(replacement, inside)
    return KEY_PREFIX + inside if name.startswith(KEY_PREFIX) else inside


def _unwrapped(name: str) -> str:
    """The key without segments that only a wrapper puts there; those of DDP and DataParallel stand in front."""
    head, prefix, inside = name.partition(KEY_PREFIX)
    is_wrapped = prefix and all(part in (*WRAPPERS, "module", "") for part in head.split("."))
    return without_wrappers(prefix + inside if is_wrapped else name)


def _is_at(name: str, paths: set[str]) -> bool:
    """Whether a key surely begins with the path of a module; keys of soft prompts stand alone."""
    parts = name.removeprefix(KEY_PREFIX).split(".")
    if len(parts) < 2 or not name.startswith(KEY_PREFIX):
        return True
    # The common names alone, which spares most files the renamings; on others `_renamed` decides.
    tails = ("lora_", "ia3_", "hada_", "lokr_", "vera_", "base_layer", "weight", "bias", "trainable_tokens", "token_")
    end = next((i for i, part in enumerate(parts) if part.startswith(tails)), 0)
    return end > 0 and ".".join(parts[:end]) in paths


def _behind(inside: str, paths: set[str]) -> int:
    """How many segments of a key stand behind the longest path of a module that it begins with."""
    parts = inside.split(".")
    ends = range(len(parts) - 1, 0, -1)
    longest = next((end for end in ends if ".".join(parts[:end]) in paths), 0)
    return sum(part != "base_layer" for part in parts[longest:])


def _renamings(model: Any) -> list[Any]:
    """transformers' renamings of checkpoints' keys for this model, older layouts to the present one."""
    if not hasattr(model, "base_model_prefix"):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]


def _renamed(name: str, paths: set[str], renamings: list[Any]) -> str:
    if _is_at(name, paths):
        return name
    inside = name.removeprefix(KEY_PREFIX)
    # The first of those that fit best: the key itself, unless a module further down bears another one.
    nearest = min([inside, *_candidates(inside, renamings)], key=lambda candidate: _behind(candidate, paths))
    # No method has longer names than `lora_A.weight` there: what is left over is a module that this model lacks.
    return KEY_PREFIX + nearest if _behind(nearest, paths) <= 2 else name


def _candidates(inside: str, renamings: list[Any]) -> list[str]:
    """Names that a key may have now, the likeliest first."""
    renamed = inside
    for rule in renamings:
        renamed = rule.rename_source_key(renamed)[0]
    # A text model inside a multimodal one, and the other way round: the layers are the same.
    inward = [inside.replace("model.", f"{place}.", 1) for place in ("model.language_model", "language_model.model")]
    outward = [inside.replace(f"{place}.", "model.", 1) for place in ("model.language_model", "language_model.model")]
    return [renamed, *inward, *outward]
