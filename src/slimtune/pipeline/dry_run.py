"""A recipe tried without training: all that can be known beforehand is found out, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimtune.data.tasks.registry import Data, read
from slimtune.errors import OutputExistsError, SlimtuneError
from slimtune.models.device import pick_device
from slimtune.models.load import load_tokenizer
from slimtune.pipeline.evaluation import held_out_questions
from slimtune.pipeline.memory_check import planned
from slimtune.pipeline.show_data import show_report
from slimtune.plan.build import build
from slimtune.plan.plan import read_config
from slimtune.plan.setting import Setting
from slimtune.recipe.method import FEATURES
from slimtune.recipe.optimizers import check_runs
from slimtune.recipe.recipe import Recipe
from slimtune.recipe.trackers import check_installed
from slimtune.storage.atomic import refuse_existing
from slimtune.storage.source import refuse_adapter
from slimtune.train.arguments import check_device
from slimtune.train.preferences import check_recipe

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Rehearsal:
    """What was found.

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
    def noting(self) -> Iterator[None]:
        """What a user can cause is a problem, and no reason to stop looking."""
        try:
            yield
        except SlimtuneError as error:
            self.problems.append(str(error))


def rehearse(recipe: Recipe, screen: Console) -> Rehearsal:
    """Read and encode the data, attach the method to the model's shape, and simulate a step of training."""
    found, model, device = Rehearsal(), recipe.model, "cpu"
    try:
        refuse_existing(Path(recipe.output))
    except OutputExistsError as error:
        found.notes.append(str(error))
    with found.noting():
        device = check_device(pick_device(model.device))
        if recipe.method.name != FEATURES:
            check_runs(recipe.training.optim, device)
            check_installed(recipe.training.trackers)
    with found.noting():
        refuse_adapter(model.source)
        # Whether examples that share a row see each other can't be tried without weights.
        data = read(replace(recipe.data, packing=False), recipe.task, recipe.training.seed)
        found.task_type = data.task_type
        check_recipe(recipe, data.task)
        held_out_questions(recipe, data)
        found.data = _encoded(recipe, data, screen)
        if recipe.method.name != FEATURES:
            _plan(recipe, data.task, found)
    return found


def _encoded(recipe: Recipe, data: Data, screen: Console) -> dict[str, Any]:
    """What the data comes to, encoded for a model that is there in shape only."""
    name, trusts = recipe.model.source, recipe.model.trust_remote_code
    config = read_config(name, trusts)
    tokenizer = load_tokenizer(name, trusts)
    dataset = data.encode(_shape(config, data), tokenizer)
    show_report(screen, dataset.report)
    return dataset.facts


def _shape(config: Any, data: Data) -> Any:
    with torch.device("meta"):
        return build(config, Setting(), data.task_type)


def _plan(recipe: Recipe, task: str, found: Rehearsal) -> None:
    try:
        plan, where = planned(recipe, task, in_full=True)
    except SlimtuneError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        found.notes.append(f"the memory it takes could not be planned: {first}")
        return
    assert plan is not None
    found.device, found.memory_bytes = where.name, where.memory_bytes
    found.needed_bytes = int(where.needed_bytes(plan.peak_bytes))
    found.notes += plan.notes
