"""LoRA adapters of diffusion models in the one file that `diffusers` loads.

`pytorch_lora_weights.safetensors` holds the adapters of all parts of a pipeline: each tensor's name begins with its
part's (`unet.`, `transformer.`, `text_encoder.`), and the configs lie beside them in the file's metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from slimtune.adapters.adapter import get_peft_model_state_dict
from slimtune.adapters.model import PeftModel, attach_stored
from slimtune.core.config import PeftConfig
from slimtune.errors import AdapterFileError, ConfigError, did_you_mean, listing
from slimtune.methods.lora.config import LoraConfig
from slimtune.storage.atomic import staged_file
from slimtune.storage.peft_format import KEY_PREFIX, checksum, read_tensors
from slimtune.storage.permissions import write_tensors
from slimtune.storage.text_files import parse_json

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PARTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
"""What the parts of a pipeline are called."""

_METADATA_KEY = "lora_adapter_metadata"
_OLDER_NAMES = {
    ".lora.down.": ".lora_A.",
    ".lora.up.": ".lora_B.",
    ".lora_linear_layer.down.": ".lora_A.",
    ".lora_linear_layer.up.": ".lora_B.",
}


def save_diffusers_lora(
    folder: str | Path, adapter_name: str = "default", weight_name: str = WEIGHTS_NAME, **parts: Any
) -> Path:
    """Write the LoRA adapters of a pipeline's parts, as `pipeline.load_lora_weights(folder)` reads them.

    Args:
        parts: the adapted models by their names in the pipeline, `unet=...` or `transformer=...` and so on.

    Returns:
        The file.

    Raises:
        ConfigError: a part that no pipeline has, or an adapter that is no LoRA or trains more than that.
        AdapterNotFoundError: a part has no adapter of that name.
        AdapterFileError: the disk didn't take it; what was there is unharmed.
    """
    from safetensors.torch import load_file

    _check_parts(parts)
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for part, model in parts.items():
        for name, tensor in _lora_matrices(part, model, adapter_name).items():
            tensors[f"{part}.{name}"] = tensor.cpu().contiguous()
        config = model.peft_config[adapter_name].stored_fields() | {"inference_mode": True}
        # One flat dictionary with the part in front of each field, as diffusers reads it.
        fields |= {f"{part}.{name}": value for name, value in config.items()}
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(fields, indent=2, sort_keys=True)}
    path = Path(folder, weight_name)
    try:
        with staged_file(path) as scratch:
            write_tensors(scratch, tensors, metadata)
            # Read back before it takes the old file's place: what a full or failing disk did is seen while there still
            # is one.
            if checksum(load_file(scratch)) != checksum(tensors):
                raise OSError("it read back other than it was written")
    except OSError as error:
        raise AdapterFileError(f"the adapter was not saved to '{path}': {error}") from error
    return path


def load_diffusers_lora(
    source: str | Path, adapter_name: str = "default", is_trainable: bool = False, **parts: Any
) -> None:
    """Attach what `save_diffusers_lora`, `diffusers` or one of its training scripts wrote to a pipeline's parts.

    Args:
        source: the file, or the folder that holds it under its usual name.
        parts: the models by their names in the pipeline; all that the file has an adapter for.

    Raises:
        AdapterFileError: no such file, or one in another layout.
        ConfigError: parts and file don't go together.
        BaseMismatchError: the file was made for other models.
    """
    _check_parts(parts)
    path = Path(source, WEIGHTS_NAME) if Path(source).is_dir() else Path(source)
    tensors, metadata = read_tensors(path)
    by_part = _split(path, tensors)
    # Both ways: an adapter for a text encoder that is left out would give other images without a word.
    if set(by_part) != set(parts):
        raise ConfigError(
            f"'{path}' is for {listing(by_part)}, found {listing(parts)}; pass the models of just those names"
        )
    fields = _fields(path, metadata)
    for part, model in parts.items():
        own = by_part[part]
        config = _config(own, {k.removeprefix(f"{part}."): v for k, v in fields.items() if k.startswith(f"{part}.")})
        stored = {KEY_PREFIX + name: tensor for name, tensor in own.items()}
        attach_stored(model, adapter_name, config, stored, path, is_trainable)


def _fields(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configs of all parts, their fields named by the parts."""
    try:
        fields = parse_json(metadata.get(_METADATA_KEY, "{}"))
    except ValueError as error:
        raise AdapterFileError(f"the metadata of '{path}' is not JSON ({error}); save the adapter again") from error
    if not isinstance(fields, dict):
        raise AdapterFileError(f"the metadata of '{path}' is a {type(fields).__name__}; save the adapter again")
    return fields


def _split(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part by their names in it."""
    by_part: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, inside = name.partition(".")
        for older, newer in _OLDER_NAMES.items():
            inside = inside.replace(older, newer)
        if part not in PARTS or not _is_matrix(inside):
            raise AdapterFileError(
                f"'{path}' holds '{name}', which is not in the layout that diffusers writes; load the file with "
                "diffusers and save it again"
            )
        by_part.setdefault(part, {})[inside] = tensor
    return by_part


def _config(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> PeftConfig:
    """The stored config; in a file without one, alpha is the rank and a magnitude means DoRA, as for `diffusers`."""
    if fields:
        return PeftConfig.from_dict({"peft_type": "LORA", **fields})
    ranks = {name.partition(".lora_A")[0]: len(tensor) for name, tensor in tensors.items() if ".lora_A" in name}
    # Any rank would do as long as the others are listed in the pattern; the largest is what people call the file's
    # rank.
    rank = max(ranks.values())
    # Escaped: keys of rank_pattern are expressions, in which a dot means any letter.
    others = {name.replace(".", r"\."): own for name, own in ranks.items() if own != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=others,
        # Alpha is the rank everywhere, which is a scale of 1: so diffusers takes a file without alphas.
        alpha_pattern=dict(others),
        use_dora=any(".lora_magnitude_vector" in name for name in tensors),
    )


def _check_parts(parts: Mapping[str, Any]) -> None:
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"no part of a pipeline is called {part!r}{did_you_mean(part, PARTS)}")
    if not parts:
        raise ConfigError(f"name the models that have the adapter: {listing(f'{part}=...' for part in PARTS)}")


def _lora_matrices(part: str, model: Any, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter by their names in the model. Raises: ConfigError, AdapterNotFoundError."""
    if not isinstance(model, PeftModel):
        raise ConfigError(f"{part} has no adapter; attach one with get_peft_model first")
    stored = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in stored.items()}
    peft_type = model.peft_config[adapter_name].peft_type
    if peft_type != "LORA":
        raise ConfigError(f"diffusers loads LoRA adapters, and the one of {part} is {peft_type}; merge it instead")
    others = [name for name in tensors if not _is_matrix(name)]
    if others:
        raise ConfigError(
            f"diffusers loads LoRA matrices alone, and the adapter of {part} also trains {listing(others, 3)}; leave "
            "out modules_to_save, bias and trainable_token_indices"
        )
    return tensors


def _is_matrix(name: str) -> bool:
    """Whether a tensor of this name is of the kind that `diffusers` loads."""
    return re.search(r"\.lora_(A|B|magnitude_vector)(\.|$)", name) is not None
