"""What a folder holds, read from its files alone: every kind of folder that slimtune writes, and models of others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimtune.errors import AdapterFileError, ModelNotFoundError, SlimtuneError, did_you_mean, listing
from slimtune.models.compatibility import largest_rank, rank_pattern, verdicts
from slimtune.models.headers import Folder, StoredTensor, read_folder, read_from_hub, read_header, read_object
from slimtune.storage.compressed import PACKED, SCALE, SHAPE, ZERO, is_compressed, read_config, scheme_for
from slimtune.storage.foreign import reading_files, refuse_special_files
from slimtune.storage.hub import fetched, is_id
from slimtune.storage.source import name_here

Facts = dict[str, Any]

_TRAINED = ("steps", "examples", "final_loss", "eval_loss", "best_step", "scores")
_MODEL = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@reading_files()
def contents(source: str) -> tuple[Facts, list[Any]]:
    """The facts about a folder or a Hub id, its `kind` first, and for an adapter what engines make of it.

    Raises:
        ModelNotFoundError: there is no such folder, or it is of no kind that is known.
        AdapterFileError: a file in it is damaged.
    """
    path = Path(source)
    # Where the first half of the name is a folder here, the second was mistyped; it isn't looked for on the Hub then.
    if not path.exists() and not path.parent.is_dir() and is_id(source):
        # The headers of a safetensors file are its first bytes, which the Hub serves by range: no weights are
        # downloaded.
        path = fetched(source, weights=False)
        if (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            return _of_model(read_from_hub(source, path)), []
    if not path.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        advice = did_you_mean(path.name, siblings) or "; pass a folder that slimtune wrote, or that of a model"
        what = f"{path} is a file, not a folder" if path.exists() else f"no folder {path}"
        raise ModelNotFoundError(what + advice)
    refuse_special_files(path, AdapterFileError)
    reader = next((reader for marks, reader in _KINDS.items() if all((path / mark).is_file() for mark in marks)), None)
    if reader is None:
        return _several(path), []
    try:
        return reader(path)
    except SlimtuneError:
        raise
    # Whatever a reader trips over in a file of foreign origin is that file's damage, and not a bug to be shown as one.
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"a configuration in {path} is damaged: {error}; restore it") from error


def _adapter(path: Path) -> tuple[Facts, list[Any]]:
    folder = read_folder(path, "adapter_config.json", "adapter_model*.safetensors")
    config = folder.config
    named = config.get("base_model_name_or_path")
    facts = {"kind": "adapter", "method": _method(config), "base": named and name_here(named)}
    if config.get("revision"):
        facts["revision"] = config["revision"]
    if config.get("constraint"):
        facts["constraint"] = {name: value for name, value in config["constraint"].items() if value}
    if config.get("r"):
        facts |= {"rank": config["r"], "alpha": config.get("lora_alpha"), "largest_rank": largest_rank(config)}
    # A list is shown sorted, because peft writes a set, in another order each time; a string is an expression or a
    # name.
    targets = config.get("target_modules")
    facts["targets"] = sorted(map(str, targets)) if isinstance(targets, list) else targets
    ranks = config | {"rank_pattern": rank_pattern(config)}
    for name in ("modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern"):
        if ranks.get(name):
            facts[name] = ranks[name]
    if config.get("bias", "none") != "none":
        facts["bias"] = config["bias"]
    further = _inside(path, "adapter_config.json")
    facts |= {"further_adapters": further} if further else {}
    return facts | _stored(folder) | _trained(path), verdicts(config, folder.tensors)


def _model(path: Path) -> tuple[Facts, list[Any]]:
    return _of_model(read_folder(path, "config.json", "model*.safetensors")), []


def _of_model(folder: Folder) -> Facts:
    config = folder.config
    facts = {"kind": "model", "architecture": ", ".join(config.get("architectures") or ["unknown"])}
    quantized = {"quantized": _quantized(config["quantization_config"])} if config.get("quantization_config") else {}
    known = {name: config[name] for name in _MODEL if name in config}
    tuned = _trained(folder.path)
    origin = {"tuned_from": read_object(folder.path / "results.json").get("base")} if tuned else {}
    return facts | origin | known | quantized | _stored(folder) | _unpacked(folder) | tuned


def _classifier(path: Path) -> tuple[Facts, list[Any]]:
    folder = read_folder(path, "features.json", "classifier.safetensors")
    facts = {"kind": "classifier on features", "base": folder.config.get("base")}
    known = {name: folder.config[name] for name in ("pooling", "labels", "max_length") if name in folder.config}
    return facts | known | _stored(folder) | _trained(path), []


def _diffusers_lora(path: Path) -> tuple[Facts, list[Any]]:
    file = path / "pytorch_lora_weights.safetensors"
    tensors = read_header(file)
    parts = sorted({tensor.name.partition(".")[0] for tensor in tensors})
    return {"kind": "LoRA of diffusers", "parts": parts, **_counted(tensors), "bytes": file.stat().st_size}, []


def _run(path: Path) -> tuple[Facts, list[Any]]:
    recipe = read_object(path / "run.json").get("recipe") or {}
    base, method = (recipe.get(name) or {} for name in ("model", "method"))
    checkpoints = (name for name in _inside(path, "manifest.json") if _CHECKPOINT.fullmatch(name))
    steps = sorted(int(name.rpartition("-")[2]) for name in checkpoints)
    facts = {"kind": "run that was not finished", "base": base.get("name"), "method": method.get("name")}
    # From the recipe that is kept with the run: a run that broke off has written nothing to its output yet.
    return facts | {"writes": recipe.get("output"), "checkpoints": steps, "bytes": _bytes(path)}, []


def _checkpoint(path: Path) -> tuple[Facts, list[Any]]:
    written, step = read_object(path / "facts.json"), read_object(path / "manifest.json").get("step")
    tensors = [tensor for file in sorted(path.glob("weights-*.safetensors")) for tensor in read_header(file)]
    facts = {"kind": "checkpoint", "step": step, "finished": bool(written.get("finished"))}
    facts |= {"seconds": written.get("seconds"), "written_with": written.get("environment") or {}}
    return facts | _counted(tensors) | {"bytes": _bytes(path)}, []


def _comparison(path: Path) -> tuple[Facts, list[Any]]:
    comparison = read_object(path / "comparison.json")
    results = [read_object(file) for file in sorted(path.glob("runs/*/result.json"))]
    # Earlier versions called candidates arms.
    comparison.setdefault("candidates", comparison.get("arms"))
    facts = {"kind": "comparison"} | {
        name: comparison.get(name) for name in ("model", "data", "candidates", "seeds", "date")
    }
    for status in ("done", "failed"):
        facts[f"runs_{status}"] = sum(result.get("status") == status for result in results)
    report = path / "report.json"
    return facts | ({"result": read_object(report).get("headline")} if report.is_file() else {}), []


def _compared(path: Path) -> tuple[Facts, list[Any]]:
    result = read_object(path / "result.json")
    result.setdefault("candidate", result.get("arm"))
    facts = {"kind": "run of a comparison"} | {name: result.get(name) for name in ("candidate", "seed", "status")}
    if result.get("reason"):
        facts["reason"] = result["reason"]
    score = result.get("score") or {}
    values = score.get("per_question") or []
    if values:
        facts |= {str(score.get("name", "score")): sum(values) / len(values), "questions": len(values)}
    return facts, []


def _several(path: Path) -> Facts:
    """A folder of folders, as several adapters, a demo or the runs of a comparison are."""
    adapters, models = _inside(path, "adapter_config.json"), _inside(path, "config.json")
    models = [name for name in models if name not in adapters]
    if not adapters and not models:
        entries = listing(entry.name for entry in path.iterdir()) or "nothing"
        raise ModelNotFoundError(
            f"{path} holds neither an adapter, nor a model, nor a run of slimtune: none of adapter_config.json, "
            f"config.json, run.json, comparison.json or features.json is there (found: {entries})"
        )
    return {"kind": "folder", "adapters": adapters, "models": models}


_KINDS: dict[tuple[str, ...], Callable[[Path], tuple[Facts, list[Any]]]] = {
    ("comparison.json",): _comparison,
    ("result.json",): _compared,
    ("run.json",): _run,
    ("manifest.json", "facts.json"): _checkpoint,
    ("features.json",): _classifier,
    ("adapter_config.json",): _adapter,
    ("pytorch_lora_weights.safetensors",): _diffusers_lora,
    ("config.json",): _model,
}
"""What reads a folder, by files that no folder of another kind has; the first that fits."""


def _inside(path: Path, name: str) -> list[str]:
    return sorted(file.parent.name for file in path.glob(f"*/{name}"))


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _trained(path: Path) -> Facts:
    """What `slimtune train` wrote beside the weights of how they came about."""
    if not (path / "results.json").is_file():
        return {}
    results = read_object(path / "results.json")
    return {name: results[name] for name in _TRAINED if results.get(name) not in (None, {}, 0)}


def _quantized(config: Facts) -> str:
    method = str(config.get("quant_method", "unknown"))
    if is_compressed(config):
        try:
            return ", ".join(dict.fromkeys(scheme.name for scheme in read_config(config)[0]))
        except SlimtuneError:
            # Of another kind than is read here; its tensors can be told all the same.
            return method
    if config.get("load_in_8bit"):
        return f"{method}, int8"
    # GPTQ, AWQ and the like say all in their name; bitsandbytes alone has one method for three formats.
    if not config.get("load_in_4bit"):
        return method
    double = ", double" if config.get("bnb_4bit_use_double_quant") else ""
    return f"{method}, {config.get('bnb_4bit_quant_type', 'fp4')}{double}"


def _stored(folder: Folder) -> Facts:
    return _counted(folder.tensors) | {"bytes": folder.stored_bytes}


def _unpacked(folder: Folder) -> Facts:
    """The numbers that integer codes stand for, where a folder holds them eight or four to an int32."""
    stored = folder.config.get("quantization_config") or {}
    if not is_compressed(stored):
        return {}
    try:
        schemes, _ = read_config(stored)
    except SlimtuneError:
        return {}
    count = 0
    for tensor in folder.tensors:
        module, _, part = tensor.name.rpartition(".")
        if part == PACKED:
            scheme = scheme_for(module, "Linear", schemes, ()) or schemes[0]
            count += tensor.parameters * 32 // scheme.bits
        elif part not in (SCALE, SHAPE, ZERO):
            count += tensor.parameters
    return {"parameters": count}


def _counted(tensors: list[StoredTensor]) -> Facts:
    return {
        "parameters": sum(tensor.parameters for tensor in tensors),
        "tensors": len(tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors)),
    }


def _method(config: Facts) -> str:
    if config.get("constraint"):
        # "CONSTRAINED_LORA", which no engine takes for the plain method.
        config = config | {"peft_type": str(config.get("peft_type")).partition("_")[2]}
    if config.get("peft_type") == "FULL":
        whole = config.get("store") == "whole"
        return f"full tuning, {'weights stored whole' if whole else 'stored as a difference'}"
    variant = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}
    if config.get("peft_type") == "LORA":
        return " + ".join(name for flag, name in variant.items() if config.get(flag)) or "LoRA"
    return str(config.get("peft_type", "unknown"))
