"""Preference tuning and reinforcement by a reward, through TRL's trainers: DPO, KTO, ORPO and GRPO.

DPO (Rafailov et al. 2023, arXiv:2305.18290), KTO (Ethayarajh et al. 2024, arXiv:2402.01306), ORPO (Hong et al. 2024,
arXiv:2403.07691), GRPO (Shao et al. 2024, arXiv:2402.03300).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from slimtune.errors import ConfigError, MissingDependencyError, SlimtuneError, check_choice
from slimtune.recipe.preference import EXACT_MATCH, PREFERENCE_TASKS, SHARE_OF_RATE, PreferenceSettings
from slimtune.train.checks import WATCHED_STEPS, EachDeltaLearns
from slimtune.train.reference import WithoutAdapter, as_it_was, check_trl_reaches
from slimtune.train.reward import Reward, reward_of
from slimtune.train.trainer import AnswerTrainer, Kind

if TYPE_CHECKING:
    from slimtune.recipe.recipe import Recipe


def check_recipe(recipe: Recipe, task: str) -> None:
    """See that a recipe goes with the task that its data is for; raises ConfigError, MissingDependencyError."""
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
    check(task, recipe.preferences)


def check(task: str, settings: PreferenceSettings) -> None:
    """All that can be told before a model is loaded; raises ConfigError, MissingDependencyError."""
    check_choice("task", task, PREFERENCE_TASKS)
    settings.check_for(task)
    for library in ("trl", "datasets"):
        if importlib.util.find_spec(library) is None:
            raise MissingDependencyError(f"task {task} trains through {library}: pip install slimtune[trl,train]")
    if task == "grpo":
        reward_of(settings.reward or EXACT_MATCH)


def preference(task: str, model: Any, tokenizer: Any, settings: PreferenceSettings, max_length: int) -> Kind:
    """How `fine_tune` trains for "dpo", "kto", "orpo" or "grpo", on a `datasets.Dataset` in TRL's columns.

    There is one base in memory: the reference is the model with its adapters off, and where all weights are trained
    its log-probabilities are computed before the first step.

    Args:
        max_length: in tokens of prompt and answer; rows are within it already.

    Raises:
        ConfigError: no such task, settings that it hasn't, or a model or adapter that TRL can't train so.
        MissingDependencyError: TRL isn't installed.
    """
    check(task, settings)
    options = settings.for_trl(task)
    reward = reward_of(settings.reward or EXACT_MATCH) if task == "grpo" else None
    trainer, arguments = _from_trl(task)
    has_adapter = bool(getattr(model, "peft_config", None))
    check_trl_reaches(model, fused_head=task != "orpo")
    if task in ("dpo", "kto", "orpo"):
        options["max_length"] = max_length
    if task in ("dpo", "kto") and not has_adapter:
        options["precompute_ref_log_probs"] = True
    if task == "grpo" and options.get("beta") and not has_adapter:
        raise ConfigError(
            "grpo with beta above 0 compares with the base, and training all weights leaves no base to compare with; "
            "leave beta out, or train an adapter"
        )
    build = _Build(task, trainer, tokenizer, has_adapter, reward, options.pop("beta", None) if task == "grpo" else None)
    return Kind(build, _arguments(task, arguments, options), as_it_was, SHARE_OF_RATE)


@dataclass(frozen=True)
class _Build:
    """Makes TRL's trainer from what `fine_tune` gives every trainer."""

    task: str
    trainer: type
    tokenizer: Any
    has_adapter: bool
    reward: Reward | None
    beta: float | None

    def __call__(self, model: Any, optimizer_cls_and_kwargs: Any = None, **options: Any) -> AnswerTrainer:
        if self.task == "grpo":
            options["reward_funcs"] = [self.reward]
            options["callbacks"] = [
                _RewardsDiffer(callback.warn) if isinstance(callback, EachDeltaLearns) else callback
                for callback in options["callbacks"]
            ]
        elif self.task != "orpo" and self.has_adapter:
            options["ref_model"] = WithoutAdapter(model)
        with _refusals(self.task), _no_bars():
            trainer = self.trainer(model=model, processing_class=self.tokenizer, **options)
        trainer.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        if self.beta:
            # Set afterwards: given a beta, TRL's GRPO would load a second base.
            trainer.beta, trainer.ref_model = self.beta, WithoutAdapter(model)
        return trainer


def _arguments(task: str, config: Any, options: dict[str, Any]) -> Callable[..., TrainingArguments]:
    def made(**common: Any) -> TrainingArguments:
        common |= options | {
            "gradient_checkpointing": False,  # `fine_tune` sees to it
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "include_num_input_tokens_seen": "no",
        }
        if task == "grpo":
            answers = common.setdefault("num_generations", 8)
            drawn = common["per_device_train_batch_size"] * common["gradient_accumulation_steps"]
            if answers < 2 or drawn % answers:
                raise ConfigError(
                    f"a step of {drawn} answers can't hold whole groups of {answers} to one prompt; let batch_size x "
                    f"gradient_accumulation be a multiple of generations, which is 2 or more"
                )
            common["per_device_eval_batch_size"] = answers
        with _refusals(task):
            return config(**common)

    return made


@contextmanager
def _refusals(task: str) -> Iterator[None]:
    try:
        yield
    except SlimtuneError:
        raise
    except ValueError as error:
        raise ConfigError(f"TRL refuses these settings for {task}: {error}") from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without a bar for each pass over the rows, which are done in no time beside the training."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    was_shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            enable_progress_bar()


def _from_trl(task: str) -> tuple[type, Any]:
    # TRL warns of its experimental part, where ORPO lives, on import.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if task == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return _watched(ORPOTrainer), ORPOConfig
    import trl

    name = task.upper()
    return _watched(getattr(trl, f"{name}Trainer")), getattr(trl, f"{name}Config")


def _watched(trainer: Any) -> type:
    """TRL's trainer with the watch that every run is under; it reports nothing to the Hub."""

    class Watched(AnswerTrainer, trainer):
        def _send_telemetry(self) -> None:
            pass

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            # TRL's own counts begin anew with a resumed run; GRPO's doesn't, and has no masks here.
            for name in ("attention_mask", "chosen_attention_mask", "rejected_attention_mask"):
                if name in inputs:
                    self.state.num_input_tokens_seen += int(inputs[name].sum())
            return super().training_step(model, inputs, *args, **kwargs)

        def items_of(self, inputs: Any) -> torch.Tensor:
            # TRL's losses are means over the rows of a batch.
            return torch.tensor(find_batch_size(inputs) or len(inputs))

    return Watched


class _RewardsDiffer(TrainerCallback):
    """After the first steps, says if all answers were worth the same: nothing can have moved then."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.learned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Look whether some group of answers differs in its rewards."""
        self.learned |= (logs or {}).get("frac_reward_zero_std", 1) < 1
        if state.global_step == WATCHED_STEPS and not self.learned and logs and "loss" in logs:
            self.warn(
                f"in the first {WATCHED_STEPS} steps all answers to a prompt got the same reward, from which nothing "
                "is learned; raise temperature or generations, or give a reward that tells answers apart"
            )
