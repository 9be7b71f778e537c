"""LoRA files of diffusion models in the names of kohya's scripts, which ComfyUI reads, and in those of diffusers.

`unet.down_blocks.0.to_q.lora_A.weight` is `lora_unet_down_blocks_0_to_q.lora_down.weight` there, with the alpha of each
module beside it. Dots become underscores, so that the way back needs the names of the modules, which `to_kohya` keeps
in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import AdapterFileError
from slimtune.storage.peft_format import checksum, read_tensors

KOHYA_FILE = "lora.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

_MODULES, _CONFIGS = "slimtune_modules", "lora_adapter_metadata"
_PREFIXES = {
    "unet": "lora_unet", "transformer": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2",
}  # fmt: skip
_SUFFIXES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
}


def to_kohya(source: Path, folder: Path) -> None:
    """Write diffusers' file as `lora.safetensors`. Raises: AdapterFileError, for what has no name there."""
    path = source / DIFFUSERS_FILE if source.is_dir() else source
    stored, metadata = read_tensors(path)
    fields = json.loads(metadata.get(_CONFIGS, "{}"))
    tensors: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    for name, tensor in stored.items():
        part, _, inside = name.partition(".")
        suffix = next((own for own in _SUFFIXES if inside.endswith("." + own)), None)
        if part not in _PREFIXES or suffix is None:
            raise AdapterFileError(f"'{path}' holds '{name}', which has no name in kohya's layout; export to diffusers")
        module = inside.removesuffix("." + suffix)
        there = f"{_PREFIXES[part]}_{module.replace('.', '_')}"
        if modules.setdefault(there, f"{part}.{module}") != f"{part}.{module}":
            raise AdapterFileError(f"'{modules[there]}' and '{part}.{module}' have one name in kohya's layout, {there}")
        # (out,) here, (out, 1) there.
        tensors[f"{there}.{_SUFFIXES[suffix]}"] = tensor.unsqueeze(1) if "magnitude" in suffix else tensor
        if suffix == "lora_A.weight":
            # A tensor for each module, since kohya's files have no config; readers divide it by the rank of lora_down.
            tensors[f"{there}.alpha"] = torch.tensor(float(_alpha(fields, part, module, len(tensor))))
    _write(folder / KOHYA_FILE, tensors, {_MODULES: json.dumps(modules), **metadata})


def from_kohya(source: Path, folder: Path) -> None:
    """Write kohya's file in the names of diffusers, the scale alpha / r folded into B.

    Raises:
        AdapterFileError: a file that isn't in kohya's layout, or whose modules can't be named.
    """
    path = source / KOHYA_FILE if source.is_dir() else source
    stored, metadata = read_tensors(path)
    if not any(".lora_down." in name for name in stored):
        raise AdapterFileError(f"'{path}' has no lora_down tensors, so it is not in kohya's layout")
    modules: Mapping[str, str] = json.loads(metadata.get(_MODULES, "{}"))
    unnamed = sorted({name.partition(".")[0] for name in stored} - set(modules))
    if unnamed:
        raise AdapterFileError(
            f"kohya's names leave out where a module's name has dots, and '{path}' doesn't say it for {unnamed[0]}; "
            "load the file into its pipeline with diffusers (load_lora_weights) and save it again (save_lora_weights)"
        )
    back = {there: own for own, there in reversed(_SUFFIXES.items())}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        there, _, suffix = name.partition(".")
        if suffix == "alpha":
            continue
        if suffix == "lora_up.weight":
            rank = tensor.shape[1]
            alpha = stored.get(f"{there}.alpha")
            tensor = tensor * ((float(alpha) if alpha is not None else rank) / rank)
        tensors[f"{modules[there]}.{back[suffix]}"] = tensor.squeeze(1) if suffix == "dora_scale" else tensor
    # Without configs: diffusers then takes alpha to be the rank, which it is now.
    _write(folder / DIFFUSERS_FILE, tensors, {})


def _alpha(fields: Mapping[str, Any], part: str, module: str, rank: int) -> float:
    """s r, so that alpha / r is the scale s of a module; without a config, alpha is the rank."""
    own = {k.removeprefix(f"{part}."): v for k, v in fields.items() if k.startswith(f"{part}.")}
    if not own:
        return rank
    from slimtune.core.config import PeftConfig

    config: Any = PeftConfig.from_dict({"peft_type": "LORA", **own})
    return config.scale_for(module) * rank


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    if checksum(load_file(path)) != checksum(tensors):
        raise AdapterFileError(f"'{path}' read back other than it was written; try again")
