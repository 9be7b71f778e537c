"""LoRA files of diffusion models in the names of kohya's scripts, which ComfyUI reads, and in those of diffusers.

`unet.down_blocks.0.to_q.lora_A.weight` is `lora_unet_down_blocks_0_to_q.lora_down.weight` there, with the alpha of each
module beside it. Dots become underscores, so that the way back needs the names of the modules: `to_kohya` keeps them in
the file's metadata, and for other files they are read from the pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import AdapterFileError, listing
from slimtune.models.headers import read_header
from slimtune.storage.peft_format import checksum, read_tensors
from slimtune.storage.permissions import write_tensors

KOHYA_FILE = "lora.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

_MODULES, _CONFIGS = "slimtune_modules", "lora_adapter_metadata"
# A transformer's modules have diffusers' names behind lora_transformer alone: behind lora_unet, ComfyUI looks for those
# that the model's first authors gave them.
_PREFIXES = {
    "unet": "lora_unet", "transformer": "lora_transformer",
    "text_encoder": "lora_te", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3",
}  # fmt: skip
_ALSO_READ = {"text_encoder": "lora_te1"}
_SUFFIXES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
}
_KNOWN = {*_SUFFIXES.values(), "alpha"}


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
        # (out,), or (1, out, 1, 1) of convolutions, here; (out, 1) or (out, 1, 1, 1) there.
        tensor = tensor.reshape(-1, *[1] * max(1, tensor.ndim - 1)) if "magnitude" in suffix else tensor
        tensors[f"{there}.{_SUFFIXES[suffix]}"] = tensor
        if suffix == "lora_A.weight":
            # A tensor for each module, since kohya's files have no config; readers divide it by the rank of lora_down.
            tensors[f"{there}.alpha"] = torch.tensor(float(_alpha(fields, part, module, len(tensor))))
    _write(folder / KOHYA_FILE, tensors, {_MODULES: json.dumps(modules), **metadata})


def from_kohya(source: Path, folder: Path, pipeline: Path | None = None) -> None:
    """Write kohya's file in the names of diffusers, the scale alpha / r folded into B.

    Args:
        pipeline: a folder of diffusers, whose modules a file without our metadata names.

    Raises:
        AdapterFileError: a file that isn't in kohya's layout, or whose modules can't be named.
    """
    path = source / KOHYA_FILE if source.is_dir() else source
    stored, metadata = read_tensors(path)
    if not any(".lora_down." in name for name in stored):
        raise AdapterFileError(f"'{path}' has no lora_down tensors, so it is not in kohya's layout")
    modules: Mapping[str, str] = json.loads(metadata.get(_MODULES, "{}"))
    modules = _modules_of(pipeline) if pipeline else modules
    unnamed = sorted({name.partition(".")[0] for name in stored} - set(modules))
    if unnamed and pipeline:
        raise AdapterFileError(
            f"'{path}' is for {listing(unnamed, 3)}, and '{pipeline}' has no such modules; pass the pipeline that it "
            "was made for, or load the file into that with diffusers (load_lora_weights) and save it again"
        )
    if unnamed:
        raise AdapterFileError(
            f"kohya's names leave out where a module's name has dots, and '{path}' doesn't say it for {unnamed[0]}; "
            "pass the folder of its pipeline by --base"
        )
    strangers = sorted({suffix for name in stored if (suffix := name.partition(".")[2]) not in _KNOWN})
    if strangers:
        raise AdapterFileError(
            f"'{path}' holds {listing(strangers, 3)}, which is no LoRA, and diffusers' file has no place for it"
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
        if suffix == "dora_scale":
            tensor = tensor.flatten() if tensor.ndim == 2 else tensor.transpose(0, 1)
        tensors[f"{modules[there]}.{back[suffix]}"] = tensor
    # Without configs: diffusers then takes alpha to be the rank, which it is now.
    _write(folder / DIFFUSERS_FILE, tensors, {})


def _modules_of(pipeline: Path) -> dict[str, str]:
    """The modules of a pipeline's parts by their names in kohya's layout. Raises: AdapterFileError."""
    modules: dict[str, str] = {}
    for part, prefix in _PREFIXES.items():
        headers = [read_header(file) for file in sorted(pipeline.glob(f"{part}/*.safetensors"))]
        names = {tensor.name.rpartition(".")[0] for header in headers for tensor in header}
        for module in sorted(names):
            for each in (prefix, _ALSO_READ.get(part, prefix)):
                there = f"{each}_{module.replace('.', '_')}"
                if modules.setdefault(there, f"{part}.{module}") != f"{part}.{module}":
                    raise AdapterFileError(f"'{modules[there]}' and '{part}.{module}' are both called {there} there")
    if not modules:
        raise AdapterFileError(
            f"'{pipeline}' is no pipeline of diffusers: it has no weights in {listing(_PREFIXES, 5)}; pass the folder "
            "that its save_pretrained wrote"
        )
    return modules


def _alpha(fields: Mapping[str, Any], part: str, module: str, rank: int) -> float:
    """s r, so that alpha / r is the scale s of a module; without a config, alpha is the rank."""
    own = {k.removeprefix(f"{part}."): v for k, v in fields.items() if k.startswith(f"{part}.")}
    if not own:
        return rank
    from slimtune.core.config import PeftConfig

    config: Any = PeftConfig.from_dict({"peft_type": "LORA", **own})
    return config.scale_for(module) * rank


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import load_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(path, tensors, {"format": "pt", **metadata})
    if checksum(load_file(path)) != checksum(tensors):
        raise AdapterFileError(f"'{path}' read back other than it was written; try again")
