"""results.json: what a run came to, for machines."""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from slimtune.recipe.recipe import Recipe
from slimtune.train.loop import Outcome

RESULTS = "results.json"
_VERSIONED = ("slimtune", "torch", "transformers", "accelerate", "datasets", "trl", "bitsandbytes", "torchao")


@dataclass(frozen=True)
class Memory:
    """The peaks so far.

    Attributes:
        rss_bytes: of the whole process since it began, imports and loading included.
        cuda_bytes: of torch's tensors since `watch`, None without a CUDA device.
    """

    rss_bytes: int
    cuda_bytes: int | None

    @staticmethod
    def watch() -> None:
        """Begin to look for the peak of CUDA memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @classmethod
    def peak(cls) -> Memory:
        """The peaks at this moment."""
        cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return cls(_peak_rss_bytes(), cuda)


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        # What getrusage says begins with the memory of the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Figures:
    """What a run came to.

    Attributes:
        examples: how many were learned from.
        parts: as what the base was stored.
        evaluation: of the answers to held-out questions.
    """

    recipe: Recipe
    task_type: str
    outcome: Outcome
    examples: int
    trainable_parameters: int
    memory: Memory
    parameters: int | None = None
    parts: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write results.json into a folder that holds everything else already."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        found = self.to_dict() | {"disk_bytes": sum(path.stat().st_size for path in files)}
        (folder / RESULTS).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """In plain types; what is no number is null."""
        outcome = asdict(self.outcome) | {"tokens_per_second": self.outcome.tokens_per_second}
        return {
            "base": self.recipe.model.name,
            "revision": self.recipe.model.revision,
            "method": self.recipe.method.name,
            "task_type": self.task_type,
            "quantize": self.recipe.model.quantize,
            "examples": self.examples,
            **{name: _finite(value) for name, value in outcome.items()},
            "evaluation": self.evaluation,
            "trainable_parameters": self.trainable_parameters,
            "parameters": self.parameters,
            "peak_rss_bytes": self.memory.rss_bytes,
            "peak_cuda_bytes": self.memory.cuda_bytes,
            "parts": self.parts,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a run depends on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:
    # JSON has no NaN.
    return None if isinstance(value, float) and not math.isfinite(value) else value
