"""The loss curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from slimtune.errors import MissingDependencyError


def plot_losses(loss_file: Path, picture: Path) -> None:
    """Draw `loss.jsonl` as PNG; raises MissingDependencyError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("the loss curve needs matplotlib: run `pip install 'slimtune[train]'`") from error
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
