"""From loaded files to a written adapter: what `train` and `demo` have in common."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.cli.report import show_data, show_preview, show_trained
from slimtune.errors import ConfigError, DataError, did_you_mean
from slimtune.loading import load_text_model, native_dtype
from slimtune.staging import staged
from slimtune.train.card import Card
from slimtune.train.checks import DivergedError, trainable
from slimtune.train.data import TOO_LONG, Encoded, encode
from slimtune.train.results import rescue, write_results
from slimtune.train.rows import Row, read_rows
from slimtune.train.run import Outcome, fine_tune, is_adopted
from slimtune.train.settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Data:
    """Rows to learn from and rows to evaluate on, and what to do with long ones."""

    source: str
    rows: list[Row]
    held_out: list[Row]
    max_length: int
    too_long: str

    @classmethod
    def read(
        cls, path: Path, eval_path: Path | None, eval_fraction: float, max_length: int, too_long: str, seed: int
    ) -> Data:
        """Read the files; raises DataError or ConfigError."""
        if too_long not in TOO_LONG:
            near = did_you_mean(too_long, TOO_LONG)
            raise ConfigError(f"--too-long takes {', '.join(TOO_LONG)}, found '{too_long}'{near}")
        if eval_path and eval_fraction:
            raise ConfigError("--eval-data and --eval-fraction were both given; pass one of them")
        rows = read_rows(path)
        if eval_path:
            return cls(str(path), rows, read_rows(eval_path), max_length, too_long)
        random.Random(seed).shuffle(rows)
        count = round(len(rows) * eval_fraction)
        if count == len(rows):
            raise DataError(f"nothing is left of {len(rows)} examples to learn from; lower --eval-fraction")
        return cls(str(path), rows[count:], rows[:count], max_length, too_long)


def load_for(
    config: Any, source: str, dtype: str, device: str, trust_remote_code: bool, seed: int
) -> tuple[Any, Any, bool]:
    """The model made ready for a method, its tokenizer, and whether it computes in bf16 over float32 weights."""
    if config is not None:
        model, tokenizer = load_text_model(source, dtype, device, trust_remote_code)
        if is_adopted(model):
            raise ConfigError(f"{source} is an adapter already; train its base, or merge it first with slimtune merge")
        return adopt(model, config, seed), tokenizer, False
    # Updates of 1e-5 vanish in weights of 16 bits, so a full tuning holds them in 32.
    model, tokenizer = load_text_model(source, "float32", device, trust_remote_code)
    model.requires_grad_(True)
    return model, tokenizer, (native_dtype() if dtype == "auto" else dtype) == "bfloat16"


def adopt(model: Any, config: Any, seed: int) -> Any:
    """The model with a new adapter, drawn the same for the same seed; raises ConfigError or TargetError."""
    from transformers import set_seed

    from slimtune import get_peft_model

    set_seed(seed)
    return get_peft_model(model, config)


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
) -> Outcome:
    """Show what will happen, train, and write the results; raises SlimtuneError, with what was learned put aside."""
    base = model.name_or_path
    trainable(model)
    prepared = encode(data.rows, tokenizer, data.max_length, data.too_long)
    held_out = encode(data.held_out, tokenizer, data.max_length, data.too_long).examples if data.held_out else []
    show_trained(screen, model)
    show_data(screen, prepared, held_out, data.max_length)
    show_preview(screen, tokenizer, prepared.examples[0])
    facts = {
        "source": Path(data.source).name,
        "examples": len(prepared.examples),
        "held out": len(held_out),
        "tokens": f"{prepared.tokens:,}",
        "learned": f"{prepared.learned / prepared.tokens:.0%}",
        "maximum length": data.max_length,
    }
    with staged(output, overwrite) as folder:
        outcome = _train_or_rescue(
            screen, model, tokenizer, prepared.examples, held_out, settings, folder, output, autocast
        )
        if autocast:
            import torch

            model.to(torch.bfloat16)
        write_results(folder, model, tokenizer, Card(output.name, base, method, facts, settings, outcome))
    screen.print(
        f"{outcome.steps} steps in {outcome.seconds:.0f} s, {outcome.tokens_per_second:,.0f} tokens/s, "
        f"loss {outcome.final_loss:.4f}"
        + (f", held out {outcome.eval_loss:.4f}" if outcome.eval_loss is not None else "")
    )
    if outcome.interrupted:
        screen.print(f"[yellow]stopped by hand[/] after {outcome.steps} steps; what was learned so far is written")
    return outcome


def _train_or_rescue(
    screen: Console,
    model: Any,
    tokenizer: Any,
    examples: list[Encoded],
    held_out: list[Encoded],
    settings: TrainSettings,
    folder: Path,
    output: Path,
    autocast: bool,
) -> Outcome:
    try:
        return fine_tune(model, tokenizer, examples, settings, folder, screen, held_out, autocast)
    except DivergedError as error:
        if not error.kept_steps:
            raise
        aside = output.with_name(f"{output.name}-until-step-{error.kept_steps}")
        rescue(aside, model, tokenizer)
        raise DivergedError(f"{error}; the state after step {error.kept_steps} is kept in {aside}", 0) from error
