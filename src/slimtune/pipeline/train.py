"""From a recipe to a written folder: load, attach, show, train, judge, write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.delta import dtypes_of
from slimtune.data.tasks.base import EncodedDataset
from slimtune.data.tasks.registry import Data, read
from slimtune.errors import ConfigError
from slimtune.metrics.classification import shown
from slimtune.models.device import native_dtype, pick_device
from slimtune.pipeline.evaluation import ask, held_out_questions, measure_forgetting
from slimtune.pipeline.memory_check import refuse_what_does_not_fit
from slimtune.pipeline.show_data import show_report
from slimtune.quantization.report import parts
from slimtune.recipe.method import FEATURES, FULL, table
from slimtune.recipe.optimizers import check_runs
from slimtune.recipe.preference import PREFERENCE_TASKS
from slimtune.recipe.recipe import Recipe
from slimtune.storage.atomic import staged
from slimtune.storage.hub import parted
from slimtune.storage.source import folder_of, refuse_adapter
from slimtune.train.arguments import check_device
from slimtune.train.card import Card
from slimtune.train.checks import DivergedError, trainable
from slimtune.train.eva_start import start_by_eva
from slimtune.train.features import train_on_features
from slimtune.train.loop import Outcome, fine_tune
from slimtune.train.measurements import Memory
from slimtune.train.preferences import check_recipe, preference
from slimtune.train.results import rescue, write_results
from slimtune.train.run_folder import check_start, run_folder

if TYPE_CHECKING:
    from rich.console import Console


def run(recipe: Recipe, screen: Console, overwrite: bool = False, plans: bool = True, resume: bool = False) -> Outcome:
    """From a recipe to a written folder, the one way there is; raises SlimtuneError.

    Args:
        plans: refuse what can't fit before anything is loaded.
        resume: go on with the run of this recipe that was broken off.
    """
    # All that needs no model comes first: a slip of the pen must not cost a download.
    if resume and recipe.method.name == FEATURES:
        raise ConfigError("--resume would change nothing with the method features, which takes no steps; leave it out")
    check_start(Path(recipe.output), recipe.to_dict(), overwrite, resume)
    data = read(recipe.data, recipe.task, recipe.training.seed)
    check_recipe(recipe, data.task)
    held_out_questions(recipe, data)
    if recipe.method.name == FEATURES:
        return train_on_features(screen, recipe, data, overwrite)
    refuse_adapter(recipe.model.source)
    check_runs(recipe.training.optim, check_device(pick_device(recipe.model.device)))
    if plans:
        refuse_what_does_not_fit(screen, recipe, data.task)
    Memory.watch()
    model, tokenizer, autocast = load_for(recipe, data)
    outcome = tune(screen, model, tokenizer, data, recipe, overwrite, autocast, resume)
    if recipe.evaluation and recipe.evaluation.forgetting:
        # Two models at once may not fit.
        del model
        measure_forgetting(screen, recipe)
    return outcome


def load_for(recipe: Recipe, data: Data) -> tuple[Any, Any, bool]:
    """The model made ready for its method, its tokenizer, and whether it computes in bf16 over float32 weights."""
    from transformers import set_seed

    model, seed = recipe.model, recipe.training.seed
    # A new head is drawn while the model is loaded.
    set_seed(seed)
    if recipe.method.name != FULL:
        how = (model.dtype, model.device, model.trust_remote_code, model.quantize)
        loaded, tokenizer = data.load(model.source, *how)
        return adopt(loaded, recipe.method.config(), seed, data.task_type), tokenizer, False
    # Updates of 1e-5 vanish in weights of 16 bits, so a full tuning holds them in 32.
    loaded, tokenizer = data.load(model.source, "float32", model.device, model.trust_remote_code)
    loaded.requires_grad_(True)
    return loaded, tokenizer, (native_dtype() if model.dtype == "auto" else model.dtype) == "bfloat16"


def adopt(model: Any, config: Any, seed: int, task_type: str = "CAUSAL_LM") -> Any:
    """The model with a new adapter, drawn the same for the same seed; raises ConfigError or TargetError."""
    from transformers import set_seed

    from slimtune.adapters.model import get_peft_model

    set_seed(seed)
    config.task_type = task_type
    name = getattr(config, "tokenizer_name_or_path", None)
    if name is None:
        return get_peft_model(model, config)
    # A prompt that begins as a text reads the tokenizer while it attaches; a packaged name holds on every machine.
    base = model.name_or_path
    config.tokenizer_name_or_path = folder_of(base if name == parted(base)[0] else name, weights=False)
    model = get_peft_model(model, config)
    config.tokenizer_name_or_path = name
    return model


def tune(
    screen: Console,
    model: Any,
    tokenizer: Any,
    data: Data,
    recipe: Recipe,
    overwrite: bool,
    autocast: bool = False,
    resume: bool = False,
) -> Outcome:
    """Show what will happen, train, and write the results; raises SlimtuneError, with what was learned put aside.

    Args:
        resume: go on with the run that was broken off before it could write its output.
    """
    base, output = parted(model.name_or_path)[0], Path(recipe.output)
    trainable(model)
    show_trained(screen, model)
    lesson = data.encode(model, tokenizer)
    show_report(screen, lesson.report)
    with run_folder(output, recipe.to_dict(), overwrite, resume) as place:
        start_by_eva(model, tokenizer, lesson, recipe.training, place.path, screen.print)
        outcome = _train_or_rescue(screen, model, tokenizer, lesson, recipe, place.path, autocast, resume)
        if autocast:
            import torch

            model.to(torch.bfloat16)
        evaluation = ask(screen, model, tokenizer, held_out_questions(recipe, data))
        asked = evaluation.scores if evaluation else {}
        outcome = replace(outcome, scores=outcome.scores | lesson.judge(model) | asked)
        method = table(recipe.method.method, recipe.method.config()) | {"base stored as": parts(model).line}
        facts, stored = lesson.facts | lesson.after(), recipe.model.quantize
        card = Card(
            output.name, base, data.task_type, method, facts, recipe.training, outcome, stored, recipe.model.revision
        )
        with staged(output, place.overwrite) as folder:
            place.hand_over(folder)
            write_results(folder, model, tokenizer, recipe, card, evaluation)
    for name, value in lesson.after().items():
        screen.print(f"{name}: {value:,}")
    show_outcome(screen, outcome, recipe.training.best_by)
    return outcome


def show_outcome(screen: Console, outcome: Outcome, best_by: str | None) -> None:
    """The result in a line or three."""
    screen.print(
        f"{outcome.steps} steps in {outcome.seconds:.0f} s, {outcome.tokens_per_second:,.0f} tokens/s, "
        f"loss {outcome.final_loss:.4f}"
        + (f", held out {outcome.eval_loss:.4f}" if outcome.eval_loss is not None else "")
    )
    if outcome.scores:
        screen.print(f"on the held-out rows: [bold]{shown(outcome.scores)}[/]")
    if outcome.best_step is not None:
        screen.print(f"written are the weights of step {outcome.best_step}, the best by {best_by}")


def show_trained(screen: Console, model: Any) -> None:
    """Which modules are trained, in which types of number."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if getattr(model, "peft_config", None):
        screen.print(str(model.coverage()), markup=False)
    else:
        screen.print(f"all weights are trained: {sum(p.numel() for p in trainable):,} parameters")
    screen.print(f"trained in {dtypes_of(trainable)}, on {model.device}; the base: {parts(model).line}", markup=False)


def _train_or_rescue(
    screen: Console,
    model: Any,
    tokenizer: Any,
    lesson: EncodedDataset,
    recipe: Recipe,
    folder: Path,
    autocast: bool,
    resume: bool,
) -> Outcome:
    kind = None
    if recipe.task in PREFERENCE_TASKS:
        kind = preference(recipe.task, model, tokenizer, recipe.preferences, recipe.data.max_length)
    try:
        return fine_tune(
            model, tokenizer, lesson.examples, recipe.training, folder, screen, lesson.held_out, autocast,
            lesson.objective, kind, lesson.judge, resume,
        )  # fmt: skip
    except DivergedError as error:
        if not error.kept_steps:
            raise
        output = Path(recipe.output)
        aside = output.with_name(f"{output.name}-until-step-{error.kept_steps}")
        rescue(aside, model, tokenizer)
        raise DivergedError(f"{error}; the state after step {error.kept_steps} is kept in {aside}", 0) from error
