"""What a run leaves behind: the adapter or model, the tokenizer, the loss curve and the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimtune.evaluate.result import Evaluation
from slimtune.quantized.report import parts
from slimtune.train.card import Card
from slimtune.train.figures import Figures, Memory
from slimtune.train.plot import plot_losses
from slimtune.train.recipe import Recipe


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
