"""What a run leaves behind: the adapter or model, the tokenizer, the loss curve and the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimtune.errors import MissingDependencyError
from slimtune.evaluate.result import Evaluation
from slimtune.quantization.report import parts
from slimtune.recipe.recipe import Recipe
from slimtune.train.card import Card
from slimtune.train.measurements import Figures, Memory


def write_results(
    folder: Path, model: Any, tokenizer: Any, recipe: Recipe, card: Card, evaluation: Evaluation | None = None
) -> None:
    """Write everything but `loss.jsonl`, which the run wrote step by step."""
    _save(folder, model)
    # With its chat template: a model that is asked in another template answers worse than untuned.
    tokenizer.save_pretrained(folder)
    plot_losses(folder / "loss.jsonl", folder / "loss.png")
    card.write(folder)
    recipe.write(folder / "recipe.yaml")
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    Figures(
        recipe,
        card.task_type,
        card.outcome,
        card.data["examples"],
        trainable_parameters=sum(count for count, is_trained in counts if is_trained),
        memory=Memory.peak(),
        parameters=sum(count for count, _ in counts),
        parts=parts(model).to_dict(),
        evaluation=evaluation and evaluation.to_dict(),
    ).write(folder)


def rescue(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write the weights of a run that broke off, so that what was learned isn't lost."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, model)
    tokenizer.save_pretrained(folder)


def _save(folder: Path, model: Any) -> None:
    model.save_pretrained(folder)
    if not model.can_generate():
        # The names of the labels stand in the model's configuration, of which an adapter has no copy.
        model.config.save_pretrained(folder)


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
