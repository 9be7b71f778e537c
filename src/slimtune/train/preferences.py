"""Preference tuning and reinforcement by a reward, through TRL's trainers.

- DPO (Rafailov et al. 2023, arXiv:2305.18290), KTO (Ethayarajh et al. 2024, arXiv:2402.01306), ORPO (Hong et al. 2024,
  arXiv:2403.07691), GRPO (Shao et al. 2024, arXiv:2402.03300): `preference` sets a trainer of TRL up for `fine_tune`.
- The reference model is the tuned model with its adapters off (`ReferenceModel`), not a second copy.
- The reward of GRPO is exact match with the answer in the data, or a function of the user's own (`reward_of`).
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from slimtune.adapters.trl_forward import check_head, is_from_trl, on_learned_tokens
from slimtune.console.process import this_process
from slimtune.core.frozen import deltas_of
from slimtune.engine.weights import reordered_weights
from slimtune.errors import ConfigError, SlimtuneError, TrainingError, check_choice, did_you_mean, listing, require
from slimtune.evaluate.generation import equal_prompts_read_once
from slimtune.evaluate.user_scorer import function_of
from slimtune.recipe.preference import EXACT_MATCH, PREFERENCE_TASKS, SHARE_OF_RATE, PreferenceSettings
from slimtune.train.checks import WATCHED_STEPS, EachDeltaLearns
from slimtune.train.drawing import draw
from slimtune.train.processes import of_all
from slimtune.train.trainer import AnswerTrainer, TrainerSpec


def check_task(task: str, settings: PreferenceSettings) -> None:
    """Check all that needs no model; raises ConfigError, MissingDependencyError."""
    check_choice("task", task, PREFERENCE_TASKS)
    settings.check_for(task)
    require("trl", extra="trl,train", purpose=f"task {task}")
    require("datasets", extra="trl,train", purpose=f"task {task}")
    if task == "grpo":
        reward_of(settings.reward or EXACT_MATCH)


def preference(task: str, model: Any, tokenizer: Any, settings: PreferenceSettings, max_length: int) -> TrainerSpec:
    """How `fine_tune` trains for "dpo", "kto", "orpo" or "grpo", on a `datasets.Dataset` in TRL's columns.

    There is one base in memory: the reference is the model with its adapters off, and where all weights are trained
    its log-probabilities are computed before the first step.

    Args:
        max_length: in tokens of prompt and answer; rows are within it already.

    Raises:
        ConfigError: no such task, settings that it hasn't, or a model or adapter that TRL can't train so.
        MissingDependencyError: TRL isn't installed.
    """
    check_task(task, settings)
    options = settings.for_trl(task)
    reward = reward_of(settings.reward or EXACT_MATCH) if task == "grpo" else None
    trainer, arguments = _from_trl(task)
    has_adapter = bool(getattr(model, "peft_config", None))
    check_trl_reaches(model, fused_head=task != "orpo")
    # GRPO has none: its prompts are within the limit already, and its answers have a limit of their own.
    if task in ("dpo", "kto", "orpo"):
        options["max_length"] = max_length
    if task in ("dpo", "kto") and not has_adapter:
        # (rows,) log-probabilities of each answer, in place of a frozen copy of all weights.
        options["precompute_ref_log_probs"] = True
    if task == "grpo" and options.get("beta") and not has_adapter:
        raise ConfigError(
            "grpo with beta above 0 compares with the base, and training all weights leaves no base to compare with; "
            "leave beta out, or train an adapter"
        )
    build = _Build(task, trainer, tokenizer, has_adapter, reward, options.pop("beta", None) if task == "grpo" else None)
    return TrainerSpec(build, _arguments(task, arguments, options), undo_trl_changes, SHARE_OF_RATE)


@dataclass(frozen=True)
class _Build:
    """Builds TRL's trainer from the arguments that `fine_tune` passes to every trainer."""

    task: str
    trainer: type
    tokenizer: Any
    has_adapter: bool
    reward: Reward | None
    beta: float | None

    def __call__(self, model: Any, optimizer_cls_and_kwargs: Any = None, **options: Any) -> AnswerTrainer:
        if self.task == "grpo":
            options["reward_funcs"] = [self.reward]
            # Where all rewards are equal there is no gradient, and no delta is at fault.
            options["callbacks"] = [
                RewardsDiffer(callback.warn) if isinstance(callback, EachDeltaLearns) else callback
                for callback in options["callbacks"]
            ]
        elif self.task != "orpo" and self.has_adapter:
            # Without it TRL would copy the model, in which it sees no adapter of peft's.
            options["ref_model"] = ReferenceModel(model)
        with _as_config_error(self.task), _no_progress_bars():
            trainer = self.trainer(model=model, processing_class=self.tokenizer, **options)
        trainer.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        if self.beta:
            # Set afterwards: given a beta, TRL's GRPO would load a second base.
            trainer.beta, trainer.ref_model = self.beta, ReferenceModel(model)
        return trainer


def _arguments(task: str, config: Any, options: dict[str, Any]) -> Callable[..., TrainingArguments]:
    def make(**common: Any) -> TrainingArguments:
        common |= options | {
            "gradient_checkpointing": False,  # `fine_tune` sees to it
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "include_num_input_tokens_seen": "no",
        }
        if task == "grpo":
            # TRL's batch is of answers, of which each prompt has `num_generations`.
            answers = common.setdefault("num_generations", 8)
            drawn = common["per_device_train_batch_size"] * common["gradient_accumulation_steps"]
            drawn *= this_process().count
            if answers < 2 or drawn % answers:
                raise ConfigError(
                    f"a step of {drawn} answers can't hold whole groups of {answers} to one prompt; let batch_size x "
                    f"gradient_accumulation be a multiple of generations, which is 2 or more"
                )
            # Of one prompt: whole groups always divide, however few held-out prompts there are.
            common["per_device_eval_batch_size"] = answers
        with _as_config_error(task):
            return config(**common)

    return make


@contextmanager
def _as_config_error(task: str) -> Iterator[None]:
    try:
        yield
    # A ConfigError is a ValueError too, and says better what is wrong.
    except SlimtuneError:
        raise
    except ValueError as error:
        raise ConfigError(f"TRL refuses these settings for {task}: {error}") from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets` within the block."""
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

        return _with_checks(ORPOTrainer), ORPOConfig
    import trl

    name = task.upper()
    return _with_checks(getattr(trl, f"{name}Trainer")), getattr(trl, f"{name}Config")


def _with_checks(trainer: Any) -> type:
    """TRL's trainer with the checks and checkpoints of every run; it reports nothing to the Hub."""

    class CheckedTrainer(AnswerTrainer, trainer):
        def _send_telemetry(self) -> None:
            pass

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            # TRL's own counts begin anew with a resumed run; GRPO's doesn't, and has no masks here.
            masks = ("attention_mask", "chosen_attention_mask", "rejected_attention_mask")
            tokens = sum(int(inputs[name].sum()) for name in masks if name in inputs)
            self.state.num_input_tokens_seen += sum(of_all(tokens))
            return super().training_step(model, inputs, *args, **kwargs)

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            # GRPO spends most of a step on drawing its answers.
            model: Any = self.accelerator.unwrap_model(self.model)
            drawn = self._drawn(model, *args, **kwargs)
            if drawn is not None:
                # Without their log probabilities: those are computed in the step, with gradients.
                return drawn, None
            with equal_prompts_read_once(model), reordered_weights(model, self.max_completion_length):
                return super()._generate_single_turn(*args, **kwargs)

        def _drawn(self, model: Any, *args: Any, **kwargs: Any) -> list[list[int]] | None:
            """The answers by the engine; None where TRL draws them itself, in whatever way it was told to."""
            # TRL promises nothing of this function, which was another one in other versions.
            known = tuple(inspect.signature(trainer._generate_single_turn).parameters)
            others = ("use_vllm", "use_transformers_continuous_batching", "tools", "rollout_func")
            if known != ("self", *_DRAWING) or any(getattr(self, name, None) for name in others):
                return None
            given = dict(zip(_DRAWING, args, strict=False)) | kwargs
            settings = (self.args.generation_kwargs, self.args.cache_implementation)
            if given.get("images") or given.get("multimodal_fields") or any(settings):
                return None
            names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            sampling = {name: value for name in names if (value := getattr(self, name, None)) is not None}
            prompts = given["prompt_ids"]
            return draw(model, self.processing_class, prompts, self.max_completion_length, **sampling)

        def items_of(self, inputs: Any) -> torch.Tensor:
            # TRL's losses are means over the rows of a batch.
            return torch.tensor(find_batch_size(inputs) or len(inputs))

    return CheckedTrainer


_DRAWING = ("prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images")
"""What TRL gives to the function that draws answers, in the versions in which these are known."""


class RewardsDiffer(TrainerCallback):
    """Warns after the first steps if all answers to each prompt got the same reward, from which nothing is learned."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.learned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """See whether some group of answers differs in its rewards."""
        # TRL logs the share of groups whose rewards are all equal; below 1 some group gives a gradient.
        self.learned |= (logs or {}).get("frac_reward_zero_std", 1) < 1
        if state.global_step == WATCHED_STEPS and not self.learned and logs and "loss" in logs:
            self.warn(
                f"in the first {WATCHED_STEPS} steps all answers to a prompt got the same reward, from which nothing "
                "is learned; raise temperature or generations, or give a reward that tells answers apart"
            )


class ReferenceModel(nn.Module):
    """An adopted model with its adapters off, as a model of its own that holds no tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        # In a tuple, so that its parameters aren't counted, moved or stored a second time.
        self.shared = (model,)
        self.config = model.config

    def __setattr__(self, name: str, value: Any) -> None:
        """As any module's; a forward that TRL puts here scores the learned tokens alone, as one on the model does."""
        if name == "forward" and is_from_trl(value):
            value = on_learned_tokens(self.shared[0], value)
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base computes, dropout off."""
        with _base_alone(self.shared[0]) as model:
            return model(*args, **kwargs)

    def base_model(self, *args: Any, **kwargs: Any) -> Any:
        """What the base computes up to its last hidden state; TRL's fused head asks a model for it by this name."""
        with _base_alone(self.shared[0]) as model:
            return model.base_model(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The frozen head."""
        return self.shared[0].get_output_embeddings()


@contextmanager
def _base_alone(model: Any) -> Iterator[Any]:
    # Dropout would make the reference another one at each step.
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield model
    finally:
        model.train(was_training)


def check_trl_reaches(model: Any, fused_head: bool) -> None:
    """Check that no delta is bypassed where TRL takes the last hidden state of the layers, not the model's output.

    Args:
        fused_head: whether TRL multiplies by the head's weight itself too, in place of calling the head.

    Raises: ConfigError, for adapters around the whole model, and with a fused head for those on it or one in few bits.
    """
    if deltas_of(model):
        kinds = listing(str(model.peft_config[name].peft_type) for name in deltas_of(model))
        raise ConfigError(
            f"TRL reads a model's layers past what {kinds} puts around the whole model, which would not be trained; "
            f"choose a method inside of the layers (lora)"
        )
    if fused_head:
        check_head(model, otherwise=", or choose task orpo")


@contextmanager
def undo_trl_changes(model: Any) -> Iterator[None]:
    """Undo at the end of the block what TRL changes in a model: its forward, its dropout, its padding id."""
    # TRL puts a forward of its own on the instance, beside which one of this library may stand.
    forwards = {name: vars(model).get(name) for name in ("forward", "instance_forward")}
    # `disable_dropout` sets p to 0 for good.
    dropout = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    configs = [model.config.get_text_config(), model.generation_config]
    padding = [config.pad_token_id for config in configs]
    tags = getattr(model, "model_tags", None)
    try:
        with warnings.catch_warnings():
            # TRL asks transformers for checkpointing by names of which some versions say that they will change.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            yield
    finally:
        for name, forward in forwards.items():
            vars(model).pop(name, None)
            if forward is not None:
                vars(model)[name] = forward
        for module, p in dropout.items():
            module.p = p
        for config, pad_id in zip(configs, padding, strict=True):
            config.pad_token_id = pad_id
        model.model_tags = tags


class Reward:
    """A reward as TRL calls it; the function sees texts: `f(prompts=[...], completions=[...], column=[...], ...)`."""

    def __init__(self, name: str, function: Callable[..., Sequence[float]]) -> None:
        self.__name__ = name
        self.function = function

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """A number for each completion; raises TrainingError for anything else."""
        for internal in ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments"):
            # TRL's own, of which a user's function knows nothing.
            columns.pop(internal, None)
        texts = [_text(completion) for completion in completions]
        values = self.function(prompts=[_text(prompt) for prompt in prompts], completions=texts, **columns)
        try:
            rewards = [float(value) for value in values]
        except (TypeError, ValueError) as error:
            problem = f"the reward '{self.__name__}' gave no list of numbers ({error})"
            raise TrainingError(f"{problem}; return one for each answer") from error
        if len(rewards) != len(texts) or not all(map(math.isfinite, rewards)):
            shown = ", ".join(map(str, rewards[:4]))
            raise TrainingError(
                f"the reward '{self.__name__}' gave {len(rewards)} numbers ({shown}, ...) for {len(texts)} answers; "
                f"return one finite number for each"
            )
        return rewards


def reward_of(name: str) -> Reward:
    """The reward "exact-match", or a function of a file, `path.py:function`; raises ConfigError."""
    if name == EXACT_MATCH:
        return Reward("exact_match", exact_match)
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        near = did_you_mean(name, [EXACT_MATCH])
        raise ConfigError(f"no reward '{name}'; pass {EXACT_MATCH}, or path.py:function{near}")
    return Reward(function, function_of(Path(path), function, "reward"))


def exact_match(completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion is the row's `answer` (or `completion`), white space around it aside, else 0."""
    expected = columns.get("answer", columns.get("completion"))
    if expected is None:
        raise ConfigError(f"the reward {EXACT_MATCH} needs the field answer in each row of the data; add it")
    return [float(c.strip() == str(answer).strip()) for c, answer in zip(completions, expected, strict=True)]


def _text(completion: Any) -> str:
    """A text, or the messages of a conversation, as text."""
    return completion if isinstance(completion, str) else "\n".join(message["content"] for message in completion)
