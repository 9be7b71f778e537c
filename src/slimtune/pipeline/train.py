"""A whole training run: validate, read the data, check memory, load, train, evaluate, write.

`run` and `tune` are the list of these stages. A stage takes its own section of the recipe; only what checks sections
against each other, and what writes the recipe down, sees all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.adapters.constrain import PRUNED, constraint_of, keep_zeros, zero_share
from slimtune.adapters.model import get_peft_model
from slimtune.console.process import this_process, warn_of_one_process
from slimtune.core.frozen import dtypes_of
from slimtune.data.features import check_solver
from slimtune.data.tasks.base import EncodedDataset, splits_report
from slimtune.data.tasks.registry import Data, read
from slimtune.errors import ConfigError, TrainingError, counted, first_line
from slimtune.evaluate.result import Evaluation
from slimtune.metrics.classification import shown
from slimtune.models.device import cost_of_emulation, is_emulated, pick_device
from slimtune.models.load import LoadOptions, load_model
from slimtune.pipeline.dtype import in_computing_dtype
from slimtune.pipeline.evaluation import evaluate_answers, held_out_questions, measure_forgetting
from slimtune.pipeline.memory_check import autocasts, check_memory
from slimtune.pipeline.show_data import show_report
from slimtune.quantization.report import parts
from slimtune.recipe.method import FEATURES, FULL, table
from slimtune.recipe.optimizers import check_runs
from slimtune.recipe.preference import PREFERENCE_TASKS
from slimtune.recipe.recipe import MethodSettings, ModelSettings, Recipe
from slimtune.storage.atomic import staged
from slimtune.storage.hub import parted
from slimtune.storage.source import folder_of, name_elsewhere, refuse_adapter
from slimtune.train.arguments import check_device
from slimtune.train.card import Card
from slimtune.train.checks import DivergedError, trainable
from slimtune.train.eva_start import start_by_eva
from slimtune.train.features import train_on_features
from slimtune.train.loop import Outcome, fine_tune
from slimtune.train.preferences import check_task, preference
from slimtune.train.processes import check_processes, shards, share_of, start
from slimtune.train.results import Memory, Results, check_dependencies, plot_losses, save_model
from slimtune.train.run_folder import RunFolder, run_folder
from slimtune.train.trainer import TrainerSpec

if TYPE_CHECKING:
    from rich.console import Console

Teaching = Callable[[Any, Any, Data, EncodedDataset], tuple[EncodedDataset, TrainerSpec]]
"""Model, tokenizer, data and their encoded examples to the examples and the Trainer of another objective."""


def run(
    recipe: Recipe,
    screen: Console,
    overwrite: bool = False,
    plans: bool = True,
    resume: bool = False,
    teaching: Teaching | None = None,
) -> Outcome:
    """Train as a recipe says, and write the output folder; raises SlimtuneError.

    Args:
        plans: refuse what can't fit before anything is loaded.
        resume: go on with the run of this recipe that was broken off.
        teaching: what is learned in place of the task's own objective, as by a distillation.
    """
    if recipe.distillation is not None and teaching is None:
        raise ConfigError(
            "the recipe has a teacher to learn from; run it with slimtune distill, or leave distillation out"
        )
    output, takes_steps = Path(recipe.output), recipe.method.name != FEATURES
    # All that needs no model comes first: a slip of the pen must not cost a download.
    if resume and not takes_steps:
        raise ConfigError("--resume would change nothing with the method features, which takes no steps; leave it out")
    process = this_process()
    if process.count > 1 and not (takes_steps and teaching is None):
        what = "a distillation" if takes_steps else "the method features, which takes no steps,"
        raise ConfigError(f"{what} runs in one process, and there are {process.count}; start it without a launcher")
    warn_of_one_process(screen)
    device = pick_device(recipe.model.device)
    if takes_steps:
        device = check_device(device)
        check_processes(device, recipe.training)
        check_dependencies()
        process = start(device)
    # One prints and writes: the others do the same, unheard.
    screen.quiet = screen.quiet or not process.is_main
    with run_folder(output, recipe.to_dict(), overwrite, resume) as folder:
        data = read(recipe.data, recipe.task, recipe.training.seed)
        show_report(screen, splits_report(data.splits))
        check_preferences(recipe, data.task)
        held_out_questions(recipe.evaluation, data)
        refuse_adapter(recipe.model.source)
        if not takes_steps:
            return _train_features(screen, data, recipe, overwrite)
        check_runs(recipe.training.optim, device)
        base = _settled(screen, recipe, folder)
        if plans and process.is_main:
            folder.planned = check_memory(
                screen, base, recipe.method, recipe.data, share_of(recipe.training), recipe.preferences,
                data,
            )  # fmt: skip
        Memory.watch()
        model, tokenizer, autocast = load_for_training(base, recipe.method, data, recipe.training.seed)
        outcome = tune(screen, model, tokenizer, data, recipe, folder, autocast, teaching)
    # After the folder is written: the base and the tuned model are read from disk, one after the other.
    if recipe.evaluation and recipe.evaluation.forgetting and process.is_main:
        # Two models at once may not fit.
        del model
        measure_forgetting(screen, base, output)
    return outcome


def _settled(screen: Console, recipe: Recipe, folder: RunFolder) -> ModelSettings:
    """The model in the dtype that the run is to have, or was begun in; the run's folder keeps which one that is."""
    if folder.resume:
        return replace(recipe.model, dtype=folder.recipe["model"]["dtype"])
    base, why = in_computing_dtype(recipe.model, recipe.method)
    folder.recipe = replace(recipe, model=base).to_dict()
    if why is not None:
        screen.print(f"computed in {why}")
    return base


def tune(
    screen: Console,
    model: Any,
    tokenizer: Any,
    data: Data,
    recipe: Recipe,
    folder: RunFolder,
    autocast: bool = False,
    teaching: Teaching | None = None,
) -> Outcome:
    """The second half of a run, on a model that is loaded: train, evaluate, write.

    Args:
        autocast: whether the model computes in bf16 over float32 weights.
        teaching: as of `run`.

    Raises:
        SlimtuneError: what was learned until then is written beside the output, or can be gone on with.
    """
    trainable(model)
    show_trained(screen, model)
    dataset = encode(screen, data, model, tokenizer)
    # From here on there is something to go on with; what fails before leaves no run behind.
    folder.begin()
    start_by_eva(model, tokenizer, dataset, recipe.training, folder.path, screen.print)
    spec = None
    if recipe.task in PREFERENCE_TASKS:
        spec = preference(recipe.task, model, tokenizer, recipe.preferences, recipe.data.max_length)
    if teaching is not None:
        dataset, spec = teaching(model, tokenizer, data, dataset)
    outcome = _train(screen, model, tokenizer, dataset, recipe, spec, folder, autocast)
    outcome = _write(screen, model, tokenizer, data, dataset, recipe, folder, outcome, autocast)
    for name, value in dataset.after().items():
        screen.print(f"{name}: {value:,}")
    show_outcome(screen, outcome, recipe.training.best_by)
    return outcome


def _write(
    screen: Console,
    model: Any,
    tokenizer: Any,
    data: Data,
    dataset: EncodedDataset,
    recipe: Recipe,
    folder: RunFolder,
    outcome: Outcome,
    autocast: bool,
) -> Outcome:
    """Write the weights, then evaluate them and write the results.

    Raises: TrainingError, where the evaluation or the results fail; the weights are in the output then, too.
    """
    output, failure = Path(recipe.output), None
    if not this_process().is_main:
        # A model that is sharded is saved, and answers, by all of them.
        save_model(output, model, tokenizer, writes=False, half=autocast)
        return _judged(screen, model, tokenizer, data, dataset, recipe, outcome)[0]
    with staged(output, folder.overwrite) as written:
        folder.hand_over(written)
        save_model(written, model, tokenizer, half=autocast)
        recipe.write(written / "recipe.yaml")
        try:
            outcome, evaluation = _judged(screen, model, tokenizer, data, dataset, recipe, outcome)
            plot_losses(written / "loss.jsonl", written / "loss.png")
            _card(output.name, model, data, dataset, recipe, outcome).write(written)
            _results(model, data, dataset, recipe, outcome, evaluation).write(written)
        except BaseException as error:
            # Kept until the folder is in its place: hours of training must not go with a plot.
            failure = error
    folder.is_done = True
    if isinstance(failure, Exception):
        raise TrainingError(
            f"the weights are written to {output}, but what comes after training failed: "
            f"{first_line(failure)}; score them with slimtune evaluate"
        ) from failure
    if failure is not None:
        raise failure
    return outcome


def _judged(
    screen: Console, model: Any, tokenizer: Any, data: Data, dataset: EncodedDataset, recipe: Recipe, outcome: Outcome
) -> tuple[Outcome, Evaluation | None]:
    """The outcome with the scores of the trained model, and how it answered held-out questions."""
    evaluation = evaluate_answers(screen, model, tokenizer, held_out_questions(recipe.evaluation, data))
    answered = evaluation.scores if evaluation else {}
    return replace(outcome, scores=outcome.scores | dataset.judge(model) | answered), evaluation


def check_preferences(recipe: Recipe, task: str) -> None:
    """Check a recipe against the preferences in its data; raises ConfigError, MissingDependencyError."""
    if task not in PREFERENCE_TASKS:
        return
    if recipe.task == "auto":
        can = "dpo, orpo or kto" if task == "dpo" else task
        raise ConfigError(f"{recipe.data.train[0].path} can be learned from in several ways; say which: task={can}")
    if str(recipe.method.fields.get("init_lora_weights")).lower() == "eva":
        raise ConfigError(
            f"EVA starts from texts and their answers, of which task {task} has others; choose another start with "
            "method.init_lora_weights"
        )
    if recipe.training.samples:
        raise ConfigError(f"training.samples would change nothing with task {task}; leave it out")
    check_task(task, recipe.preferences)


def load_for_training(model: ModelSettings, method: MethodSettings, data: Data, seed: int) -> tuple[Any, Any, bool]:
    """The model made ready for its method, its tokenizer, and whether it computes in bf16 over float32 weights."""
    from transformers import set_seed

    # A new head is drawn while the model is loaded.
    set_seed(seed)
    autocast = method.name == FULL and autocasts(model)
    if shards() and this_process().count > 1:
        # No GPU is to hold all of it: each gets its shard from main memory.
        model = replace(model, device="cpu")
    if method.name != FULL:
        how = (model.dtype, model.device, model.trust_remote_code, model.quantize)
        loaded, tokenizer = load_model(model.source, data.model_task, LoadOptions(*how), data.names)
        config = method.config()
        keep_zeros(loaded, config)
        return adopt(loaded, config, seed, data.task_type), tokenizer, False
    # Updates of 1e-5 vanish in weights of 16 bits, so a full tuning holds them in 32.
    options = LoadOptions("float32", model.device, model.trust_remote_code)
    loaded, tokenizer = load_model(model.source, data.model_task, options, data.names)
    loaded.requires_grad_(True)
    keep_zeros(loaded)
    return loaded, tokenizer, autocast


def adopt(model: Any, config: Any, seed: int, task_type: str = "CAUSAL_LM") -> Any:
    """The model with a new adapter, drawn the same for the same seed; raises ConfigError or TargetError."""
    from transformers import set_seed

    set_seed(seed)
    config.task_type = task_type
    name = getattr(config, "tokenizer_name_or_path", None)
    if name is None:
        return get_peft_model(model, config)
    # A prompt that begins as a text reads the tokenizer while it attaches.
    base = model.name_or_path
    config.tokenizer_name_or_path = folder_of(base if name == parted(base)[0] else name, weights=False)
    model = get_peft_model(model, config)
    config.tokenizer_name_or_path = name_elsewhere(name)
    return model


def encode(screen: Console, data: Data, model: Any, tokenizer: Any) -> EncodedDataset:
    """The examples encoded for this model, and shown; raises DataError, ConfigError."""
    dataset = data.encode(model, tokenizer)
    show_report(screen, dataset.report)
    return dataset


def show_trained(screen: Console, model: Any) -> None:
    """Print which modules are trained, in which dtypes."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if getattr(model, "peft_config", None):
        screen.print(str(model.coverage()), markup=False)
    else:
        screen.print(f"all weights are trained: {sum(p.numel() for p in trainable):,} parameters")
    constraint = constraint_of(model)
    if constraint:
        screen.print(f"held to what the merged weights are to be: {constraint}", markup=False)
    share = zero_share(model)
    if share >= PRUNED:
        keeps = constraint is None or constraint.mask
        screen.print(
            f"{share:.1%} of the weights of the blocks are zero{' and stay so' if keeps else ''}", markup=False
        )
    screen.print(f"trained in {dtypes_of(trainable)}, on {model.device}; the base: {parts(model).line}", markup=False)
    held = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    emulated = sorted(dtype for dtype in held if is_emulated(dtype, model.device.type))
    # What several processes share lies in main memory until it is dealt out to their GPUs.
    if emulated and not (shards() and this_process().count > 1):
        screen.print(cost_of_emulation(emulated), style="yellow", markup=False)


def show_outcome(screen: Console, outcome: Outcome, best_by: str | None) -> None:
    """Print the result in one to three lines."""
    screen.print(
        f"{counted(outcome.steps, 'step')} in {outcome.seconds:.0f} s, {outcome.tokens_per_second:,.0f} tokens/s, "
        f"loss {outcome.final_loss:.4f}"
        + (f", held out {outcome.eval_loss:.4f}" if outcome.eval_loss is not None else "")
    )
    if outcome.scores:
        screen.print(f"on the held-out rows: [bold]{shown(outcome.scores)}[/]")
    if outcome.best_step is not None:
        screen.print(f"written are the weights of step {outcome.best_step}, the best by {best_by}")


def _train(
    screen: Console,
    model: Any,
    tokenizer: Any,
    dataset: EncodedDataset,
    recipe: Recipe,
    spec: TrainerSpec | None,
    folder: RunFolder,
    autocast: bool,
) -> Outcome:
    """Train in place; of a run that diverged, the last good weights are written beside the output."""
    output = Path(recipe.output)
    try:
        outcome = fine_tune(
            model, tokenizer, dataset.examples, recipe.training, folder.path, screen, dataset.held_out, autocast,
            dataset.objective, spec, dataset.judge, folder.resume,
        )  # fmt: skip
    except DivergedError as error:
        if not error.kept_steps:
            raise
        # Beside the output and not in it: a folder of that name would look like a training that succeeded.
        aside, writes = output.with_name(f"{output.name}-until-step-{error.kept_steps}"), this_process().is_main
        if writes:
            aside.mkdir(parents=True, exist_ok=True)
        save_model(aside, model, tokenizer, writes)
        raise DivergedError(f"{error}; the state after step {error.kept_steps} is kept in {aside}", 0) from error
    if autocast and not shards():
        import torch

        # The float32 weights were for training alone: what is judged and written are those that will be used.
        model.to(torch.bfloat16)
    return outcome


def _card(name: str, model: Any, data: Data, dataset: EncodedDataset, recipe: Recipe, outcome: Outcome) -> Card:
    return Card(
        name,
        base=parted(model.name_or_path)[0],
        task_type=data.task_type,
        method=_method_of(model, recipe) | {"base stored as": parts(model).line},
        data=dataset.facts | dataset.after(),
        settings=recipe.training,
        outcome=outcome,
        quantize=recipe.model.quantize,
        revision=recipe.model.revision,
    )


def _method_of(model: Any, recipe: Recipe) -> dict[str, Any]:
    """The method with the fields that aren't as they come; a constraint as it is, which zeros of the base may set."""
    fields = table(recipe.method.method, recipe.method.config())
    constraint = constraint_of(model)
    return {name: f for name, f in fields.items() if name != "constraint"} | (
        {"constraint": str(constraint)} if constraint else {}
    )


def _results(
    model: Any, data: Data, dataset: EncodedDataset, recipe: Recipe, outcome: Outcome, evaluation: Evaluation | None
) -> Results:
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Results(
        recipe.model,
        recipe.method.name,
        data.task_type,
        outcome,
        examples=dataset.facts["examples"],
        trainable_parameters=sum(count for count, is_trained in counts if is_trained),
        parameters=sum(count for count, _ in counts),
        parts=parts(model).to_dict(),
        evaluation=evaluation and evaluation.to_dict(),
    )


def _train_features(screen: Console, data: Data, recipe: Recipe, overwrite: bool) -> Outcome:
    """Train a classifier on features of the frozen base, and write it."""
    check_solver(recipe.method.config())
    Memory.watch()
    classifier, outcome, examples = train_on_features(
        screen, data, recipe.model, recipe.method.config(), recipe.training.batch_size
    )
    trained = classifier.weight.numel() + classifier.bias.numel()
    with staged(Path(recipe.output), overwrite) as written:
        classifier.save(written)
        recipe.write(written / "recipe.yaml")
        Results(recipe.model, recipe.method.name, data.task_type, outcome, examples, trained).write(written)
    return outcome
