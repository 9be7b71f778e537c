"""The results of a run: its weights, its loss curve, and results.json."""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from slimtune.errors import require
from slimtune.recipe.recipe import ModelSettings
from slimtune.storage.permissions import by_umask
from slimtune.train.loop import Outcome
from slimtune.train.processes import shards

RESULTS = "results.json"
_VERSIONED = ("slimtune", "torch", "transformers", "accelerate", "datasets", "trl", "bitsandbytes", "torchao")


def save_model(folder: Path, model: Any, tokenizer: Any, writes: bool = True, half: bool = False) -> None:
    """Write the adapter or the model, and its tokenizer.

    Args:
        writes: off in all but one of several processes, which take part in gathering a model that is sharded.
        half: write the weights of a sharded model in bfloat16; one that is whole is in the type to write.
    """
    if shards() and not hasattr(model, "peft_config"):
        # An adopted model gathers its adapter itself.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(model, options=options)
        if half:
            state = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in state.items()}
        model.save_pretrained(folder, is_main_process=writes, state_dict=state)
    else:
        model.save_pretrained(folder, is_main_process=writes)
    if not writes:
        return
    for file in folder.glob("*.safetensors"):
        # transformers leaves them to the owner alone.
        by_umask(file)
    if not model.can_generate():
        # The names of the labels stand in the model's configuration, of which an adapter has no copy.
        model.config.save_pretrained(folder)
    # With its chat template: a model that is asked in another template answers worse than untuned.
    tokenizer.save_pretrained(folder)


def check_dependencies() -> None:
    """See that what a run needs at its end is there, and its Trainer from the start. Raises: MissingDependencyError."""
    require("matplotlib", extra="train", purpose="the loss curve")
    require("accelerate", extra="train", purpose="the Trainer")


def plot_losses(loss_file: Path, picture: Path) -> None:
    """Draw `loss.jsonl` as PNG."""
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in loss_file.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per learned token", title="Training")
    steps, losses = _series(entries, "loss")
    axes.plot(steps, losses, alpha=0.35, color="tab:blue", label="each step")
    axes.plot(steps, _smoothed(losses), color="tab:blue", label="smoothed")
    held_out = _series(entries, "eval_loss")
    if held_out[0]:
        axes.plot(*held_out, "o-", color="tab:orange", label="held out")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def _series(entries: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    chosen = [entry for entry in entries if name in entry]
    return [entry["step"] for entry in chosen], [entry[name] for entry in chosen]


def _smoothed(values: list[float], keep: float = 0.8) -> list[float]:
    smooth, weight, result = 0.0, 0.0, []
    for value in values:
        smooth, weight = keep * smooth + (1 - keep) * value, keep * weight + (1 - keep)
        # Divided by the weights so far, or the first values would be drawn towards zero.
        result.append(smooth / weight)
    return result


@dataclass(frozen=True)
class Memory:
    """Peaks of memory.

    Attributes:
        rss_bytes: of the whole process since it began, imports and loading included.
        cuda_bytes: of torch's tensors since `watch`, None without a CUDA device.
    """

    rss_bytes: int
    cuda_bytes: int | None

    @staticmethod
    def watch() -> None:
        """Start measuring the peak of CUDA memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @classmethod
    def peak(cls) -> Memory:
        """The peaks so far."""
        cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return cls(_peak_rss_bytes(), cuda)


def _peak_rss_bytes() -> int:
    """The largest resident set of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # What getrusage says begins with the memory of the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Results:
    """The results of a run, as results.json holds them.

    Attributes:
        base: the section `model` of its recipe.
        examples: how many were learned from.
        parts: how the base was stored.
        evaluation: of the answers to held-out questions.
    """

    base: ModelSettings
    method: str
    task_type: str
    outcome: Outcome
    examples: int
    trainable_parameters: int
    parameters: int | None = None
    parts: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    memory: Memory = field(default_factory=Memory.peak)

    def write(self, folder: Path) -> None:
        """Write results.json into a folder that holds everything else already."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        values = self.to_dict() | {"disk_bytes": sum(path.stat().st_size for path in files)}
        (folder / RESULTS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The results in JSON's types; NaN is null."""
        outcome = asdict(self.outcome) | {"tokens_per_second": self.outcome.tokens_per_second}
        return {
            "base": self.base.name,
            "revision": self.base.revision,
            "method": self.method,
            "task_type": self.task_type,
            "quantize": self.base.quantize,
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
    """The versions of Python and of the installed libraries that a run depends on."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _finite(value: Any) -> Any:
    # JSON has no NaN.
    return None if isinstance(value, float) and not math.isfinite(value) else value
