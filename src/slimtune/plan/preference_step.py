"""The step of dpo, kto, orpo and grpo by TRL's own trainers.

They are made as `slimtune train` makes them, with one row of data that is not looked at, so that the loss, the
reference and what TRL changes in a model are those of a training. Apart from the other steps, which need no Trainer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from slimtune.errors import require
from slimtune.plan.build import check_length
from slimtune.plan.memory import Setting
from slimtune.recipe.preference import PreferenceSettings
from slimtune.recipe.training import TrainSettings
from slimtune.train.arguments import arguments
from slimtune.train.checks import LastGood
from slimtune.train.preferences import ReferenceModel, preference

Batch = dict[str, Any]

_TRL_ROWS: dict[str, dict[str, Any]] = {
    "dpo": {"prompt": "a", "chosen": "a", "rejected": "a"},
    "orpo": {"prompt": "a", "chosen": "a", "rejected": "a"},
    "kto": {"prompt": "a", "completion": "a", "label": True},
    "grpo": {"prompt": "a", "answer": "a"},
}


def preference_step(
    model: Any, setting: Setting, last_good: LastGood
) -> tuple[Callable[[], Batch], Callable[[Batch], Tensor]]:
    """What makes a batch of dpo, kto, orpo or grpo (pairs, judged answers, or answers that were drawn), and its loss.

    Raises:
        ConfigError: a model or method that TRL can't train so.
        MissingDependencyError: TRL isn't installed.
    """
    # grpo scores prompt and answer in one sequence: both need positions.
    longest = setting.sequence + (setting.drawn_tokens if setting.task == "grpo" else 0)
    check_length(model.config, longest)
    trainer = _trainer(model, setting, last_good, longest)

    def loss(batch: Batch) -> Tensor:
        return trainer.compute_loss(model, dict(batch))

    return lambda: _preference_batch(trainer, setting), loss


def _trainer(model: Any, setting: Setting, last_good: LastGood, longest: int) -> Any:
    require("datasets", extra="train", purpose="a plan of preference tuning")
    from datasets import Dataset

    task = str(setting.task)
    drawn: dict[str, Any] = (
        {"generations": setting.generations, "max_new_tokens": setting.drawn_tokens} if task == "grpo" else {}
    )
    with unset_fake_temporarily():
        kind = preference(task, model, _tokenizer(), PreferenceSettings(**drawn), longest)
        rows = Dataset.from_list([_TRL_ROWS[task]])
    # The rate is any: TRL looks at it when the optimizer is made, which the simulation does itself.
    options = TrainSettings(batch_size=setting.batch, gradient_accumulation=setting.accumulation)
    with tempfile.TemporaryDirectory() as folder:
        args: Any = arguments(kind, options, 1e-4, "cpu", Path(folder), rows, evaluates=False, autocast=False)
        # Where all weights are trained, the reference's log-probabilities are computed before the first step, and no
        # reference is there during it.
        is_precomputed = getattr(args, "precompute_ref_log_probs", False)
        stand_in: dict[str, Any] = {"ref_model": ReferenceModel(model)} if is_precomputed else {}
        if is_precomputed:
            args.precompute_ref_log_probs = False
        trainer: Any = kind.trainer(
            model=model, args=args, train_dataset=rows, last_good=last_good, checkpointer=None, callbacks=[], **stand_in
        )
    if is_precomputed:
        trainer.ref_model, trainer.precompute_ref_logps = None, True
    trainer.current_gradient_accumulation_steps = setting.accumulation
    return trainer


def _tokenizer() -> Any:
    """A tokenizer of one word, which TRL needs; its ids are replaced by as many as are planned."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words: Any = models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="<end>", eos_token="<end>", pad_token="<end>"
    )


def _preference_batch(trainer: Any, setting: Setting) -> Batch:
    with unset_fake_temporarily():
        if setting.task == "grpo":
            return _grpo_batch(setting)
        return trainer.data_collator([_preference_row(setting, number) for number in range(setting.batch)])


def _preference_row(setting: Setting, number: int) -> dict[str, Any]:
    """A row in the columns that TRL's collators read, half of it the prompt; the first is a token shorter."""
    # How a row is divided into prompt and answer changes no shape: both are read as one sequence. Ids are any in the
    # vocabulary.
    prompt = [1] * (setting.sequence // 2)
    answer = [1] * (setting.sequence - len(prompt) - (setting.padded and setting.batch > 1 and not number))
    if setting.task == "dpo":
        reference = {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} if setting.method is None else {}
        return {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer, **reference}
    if setting.task == "kto":
        reference = {"ref_logps": 0.0, "ref_KL_logps": 0.0} if setting.method is None else {}
        return {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": answer, "label": not number % 2,
                **reference}  # fmt: skip
    # orpo: TRL's collator pads both answers to one length and joins them into a batch of 2 B rows.
    row: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name in ("chosen", "rejected"):
        row[f"{name}_input_ids"] = prompt + answer
        row[f"{name}_attention_mask"] = [1] * len(prompt + answer)
        row[f"{name}_labels"] = [-100] * len(prompt) + answer
    return row


def _grpo_batch(setting: Setting) -> Batch:
    """Answers that were drawn, with their advantages, as TRL's GRPO hands them to its loss."""
    # prompt_ids (B, sequence) and completion_ids (B, drawn), advantages (B,); TRL concatenates them along the tokens.
    rows, answers = setting.batch, setting.drawn_tokens
    prompt, answer = (torch.ones(rows, length, dtype=torch.long) for length in (setting.sequence, answers))
    batch: Batch = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": answer,
                    "completion_mask": torch.ones_like(answer)}  # fmt: skip
    items = torch.tensor(rows * answers * setting.accumulation)
    return batch | {"advantages": torch.ones(rows), "num_items_in_batch": items}
