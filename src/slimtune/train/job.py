"""From data and a method to a written adapter: load, attach, show, train, judge, write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.data.lesson import Data, Lesson
from slimtune.delta import dtypes_of
from slimtune.errors import ConfigError
from slimtune.evaluate.classification import shown
from slimtune.loading import is_adapter, native_dtype, resolve
from slimtune.quantized.report import parts
from slimtune.staging import staged
from slimtune.train.card import Card
from slimtune.train.checks import DivergedError, trainable
from slimtune.train.method import FULL
from slimtune.train.results import rescue, write_results
from slimtune.train.run import Outcome, fine_tune
from slimtune.train.settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console


def load_for(
    name: str,
    config: Any,
    data: Data,
    source: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    seed: int,
    quantize: str | None = None,
) -> tuple[Any, Any, bool]:
    """The model made ready for a method, its tokenizer, and whether it computes in bf16 over float32 weights."""
    from transformers import set_seed

    if is_adapter(source):
        raise ConfigError(f"{source} is an adapter already; train its base, or merge it first with slimtune merge")
    # A new head is drawn while the model is loaded.
    set_seed(seed)
    if name != FULL:
        model, tokenizer = data.load(source, dtype, device, trust_remote_code, quantize)
        return adopt(model, config, seed, data.task_type), tokenizer, False
    # Updates of 1e-5 vanish in weights of 16 bits, so a full tuning holds them in 32.
    model, tokenizer = data.load(source, "float32", device, trust_remote_code)
    model.requires_grad_(True)
    return model, tokenizer, (native_dtype() if dtype == "auto" else dtype) == "bfloat16"


def adopt(model: Any, config: Any, seed: int, task_type: str = "CAUSAL_LM") -> Any:
    """The model with a new adapter, drawn the same for the same seed; raises ConfigError or TargetError."""
    from transformers import set_seed

    from slimtune import get_peft_model

    set_seed(seed)
    config.task_type = task_type
    name = getattr(config, "tokenizer_name_or_path", None)
    if name is None:
        return get_peft_model(model, config)
    # A prompt that begins as a text reads the tokenizer while it attaches; a packaged name holds on every machine.
    config.tokenizer_name_or_path = resolve(name)
    model = get_peft_model(model, config)
    config.tokenizer_name_or_path = name
    return model


def tune(
    screen: Console,
    model: Any,
    tokenizer: Any,
    data: Data,
    settings: TrainSettings,
    output: Path,
    overwrite: bool,
    method: dict[str, Any],
    autocast: bool = False,
    quantize: str | None = None,
) -> Outcome:
    """Show what will happen, train, and write the results; raises SlimtuneError, with what was learned put aside."""
    base = model.name_or_path
    trainable(model)
    show_trained(screen, model)
    lesson = data.lesson(screen, model, tokenizer)
    with staged(output, overwrite) as folder:
        outcome = _train_or_rescue(screen, model, tokenizer, lesson, settings, folder, output, autocast)
        if autocast:
            import torch

            model.to(torch.bfloat16)
        outcome = replace(outcome, scores=lesson.judge(model))
        method = method | {"base stored as": parts(model).line}
        card = Card(output.name, base, data.task_type, method, lesson.facts, settings, outcome, quantize)
        write_results(folder, model, tokenizer, card)
    screen.print(
        f"{outcome.steps} steps in {outcome.seconds:.0f} s, {outcome.tokens_per_second:,.0f} tokens/s, "
        f"loss {outcome.final_loss:.4f}"
        + (f", held out {outcome.eval_loss:.4f}" if outcome.eval_loss is not None else "")
    )
    if outcome.scores:
        screen.print(f"on the held-out rows: [bold]{shown(outcome.scores)}[/]")
    if outcome.interrupted:
        screen.print(f"[yellow]stopped by hand[/] after {outcome.steps} steps; what was learned so far is written")
    return outcome


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
    lesson: Lesson,
    settings: TrainSettings,
    folder: Path,
    output: Path,
    autocast: bool,
) -> Outcome:
    try:
        return fine_tune(
            model, tokenizer, lesson.examples, settings, folder, screen, lesson.held_out, autocast, lesson.objective
        )
    except DivergedError as error:
        if not error.kept_steps:
            raise
        aside = output.with_name(f"{output.name}-until-step-{error.kept_steps}")
        rescue(aside, model, tokenizer)
        raise DivergedError(f"{error}; the state after step {error.kept_steps} is kept in {aside}", 0) from error
