"""A dry run of a recipe: everything that can be checked without weights is checked, and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimtune.data.tasks.base import splits_report
from slimtune.data.tasks.registry import Data, read
from slimtune.errors import OutputExistsError, SlimtuneError
from slimtune.models.device import pick_device
from slimtune.models.load import load_tokenizer
from slimtune.pipeline.dtype import in_computing_dtype
from slimtune.pipeline.evaluation import held_out_questions
from slimtune.pipeline.memory_check import plan_training
from slimtune.pipeline.show_data import show_report
from slimtune.pipeline.train import check_preferences, encode
from slimtune.plan.build import build
from slimtune.plan.memory import Setting
from slimtune.plan.plan import read_config
from slimtune.recipe.method import FEATURES
from slimtune.recipe.optimizers import check_runs
from slimtune.recipe.recipe import ModelSettings, Recipe
from slimtune.recipe.training import check_installed
from slimtune.storage.atomic import refuse_existing
from slimtune.storage.source import refuse_adapter
from slimtune.train.arguments import check_device
from slimtune.train.results import check_dependencies

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class DryRun:
    """The result of a dry run.

    Attributes:
        problems: what would stop the training, or ruin it.
        notes: what should be known besides.
        data: what is learned, in figures.
        needed_bytes: of the device's memory, at the peak; None where it wasn't planned.
        memory_bytes: what the device has.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    task_type: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    needed_bytes: int | None = None
    memory_bytes: int | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note a user's mistake as a problem, and go on with the next check."""
        try:
            yield
        except SlimtuneError as error:
            self.problems.append(str(error))


def dry_run(recipe: Recipe, screen: Console) -> DryRun:
    """Read and encode the data, attach the method to the model's shape, and simulate a step of training."""
    result, model, takes_steps = DryRun(), recipe.model, recipe.method.name != FEATURES
    try:
        refuse_existing(Path(recipe.output))
    except OutputExistsError as error:
        result.notes.append(str(error))
    with result.collecting():
        device = check_device(pick_device(model.device))
        if takes_steps:
            check_dependencies()
            check_runs(recipe.training.optim, device)
            check_installed(recipe.training.trackers)
    with result.collecting():
        refuse_adapter(model.source)
        # Whether examples that share a row see each other can't be tried without weights.
        data = read(replace(recipe.data, packing=False), recipe.task, recipe.training.seed)
        show_report(screen, splits_report(data.splits))
        result.task_type = data.task_type
        check_preferences(recipe, data.task)
        held_out_questions(recipe.evaluation, data)
        shape, tokenizer = _without_weights(model, data)
        result.data = encode(screen, data, shape, tokenizer).facts
        if takes_steps:
            _plan(recipe, data, result)
    return result


def _without_weights(model: ModelSettings, data: Data) -> tuple[Any, Any]:
    """The model on torch's meta device, in its shape only, and its tokenizer."""
    config = read_config(model.source, model.trust_remote_code)
    tokenizer = load_tokenizer(model.source, model.trust_remote_code)
    # Parameters with shapes and no values: any model is built without memory, and encodes as the real one does.
    with torch.device("meta"):
        return build(config, Setting(trust_remote_code=model.trust_remote_code), data.task_type), tokenizer


def _plan(recipe: Recipe, data: Data, result: DryRun) -> None:
    base, why = in_computing_dtype(recipe.model, recipe.method)
    sections = base, recipe.method, recipe.data, recipe.training, recipe.preferences
    try:
        plan, device = plan_training(*sections, data, always=True)
    except SlimtuneError:
        raise
    # Whatever the simulation trips over, as a model whose code can't run on the meta device, may train all the same.
    except Exception as error:
        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        result.notes.append(f"the memory it takes could not be planned: {first}")
        return
    assert plan is not None
    result.device, result.memory_bytes = device.name, device.memory_bytes
    result.needed_bytes = int(device.needed_bytes(plan.peak_bytes))
    result.notes += [f"computed in {why}"] * (why is not None) + [*plan.notes]
