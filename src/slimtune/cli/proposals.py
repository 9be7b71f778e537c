"""What a shell proposes behind commands and options; read without torch, for the shell asks at each Tab."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

MARKS = ("adapter_config.json", "config.json", "features.json")
"""Files by which the folder of an adapter, a model or a classifier is known."""


def methods(incomplete: str) -> list[str]:
    """Methods of tuning."""
    from slimtune.recipe.method import names

    return _beginning(incomplete, names())


def lists_of_methods(incomplete: str) -> list[str]:
    """Methods between commas, of which the last is completed."""
    from slimtune.recipe.candidates import QLORA
    from slimtune.recipe.method import names

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _beginning(last, [*names(), QLORA])]


def recipes(incomplete: str) -> list[tuple[str, str]]:
    """Recipes that ship, with what each is for."""
    from slimtune.recipe.shipped import shipped

    return [(name, what) for name, what in shipped().items() if name.startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    """Devices to plan for, without the spaces of their names, which a shell would break at."""
    from slimtune.plan.devices import devices as known

    return _beginning(incomplete, ["auto", "cpu", *(name.replace(" ", "-") for name in known())])


def torch_devices(incomplete: str) -> list[str]:
    """Devices to compute on."""
    return _beginning(incomplete, ["auto", "cpu", "cuda", "mps"])


def models(incomplete: str) -> list[str]:
    """Packaged models, and folders that hold a model or an adapter."""
    from slimtune.storage.source import PACKAGED

    return [*_beginning(incomplete, PACKAGED), *_folders(incomplete)]


def models_and_recipes(incomplete: str) -> list[str]:
    """Models, and files of recipes."""
    return [*models(incomplete), *sorted(map(str, _paths(incomplete, "*.yaml")))]


def dtypes(incomplete: str) -> list[str]:
    """Types of numbers to compute in."""
    return _beginning(incomplete, ["auto", "bfloat16", "float16", "float32"])


def quantizations(incomplete: str) -> list[str]:
    """How a base is quantized while it is loaded."""
    return _beginning(incomplete, ["nf4", "fp4", "int8", "int4", "int8-torchao", "int4-torchao"])


def formats(incomplete: str) -> list[str]:
    """What a model is exported to."""
    return _beginning(incomplete, ["hf", "gguf", "gguf-lora", "ollama", "vllm", "peft", "diffusers", "kohya", "onnx"])


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _folders(incomplete: str) -> list[str]:
    return sorted(str(path) for path in _paths(incomplete, "*") if any((path / mark).is_file() for mark in MARKS))


def _paths(incomplete: str, pattern: str) -> list[Path]:
    folder, _, begun = incomplete.rpartition("/")
    place = Path(folder or ("/" if incomplete.startswith("/") else "."))
    return [path for path in place.glob(pattern) if path.name.startswith(begun)] if place.is_dir() else []
