"""The steps of preference tuning and of learning by a reward: those of TRL's own trainers, on the planned model.

The trainers are made as `slimtune train` makes them, with one row of data that is not looked at, so that the loss, the
reference and whatever TRL changes in a model are those of a training.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from slimtune.errors import MissingDependencyError
from slimtune.plan.setting import Setting
from slimtune.plan.step import Batch, Step, check_length
from slimtune.recipe.preference import PreferenceSettings
from slimtune.recipe.training import TrainSettings
from slimtune.train.arguments import arguments
from slimtune.train.checks import LastGood
from slimtune.train.preferences import ReferenceModel, preference

ROWS: dict[str, dict[str, Any]] = {
    "dpo": {"prompt": "a", "chosen": "a", "rejected": "a"},
    "orpo": {"prompt": "a", "chosen": "a", "rejected": "a"},
    "kto": {"prompt": "a", "completion": "a", "label": True},
    "grpo": {"prompt": "a", "answer": "a"},
}


def preferred_step(model: Any, setting: Setting, last_good: LastGood) -> Step:
    """The step of dpo, kto, orpo or grpo; the batch is of pairs, judged answers or answers that were drawn.

    Raises:
        ConfigError: a model or method that TRL can't train so.
        MissingDependencyError: TRL isn't installed.
    """
    longest = setting.sequence + (setting.drawn_tokens if setting.task == "grpo" else 0)
    check_length(model.config, longest)
    trainer = _trainer(model, setting, last_good, longest)

    def loss(batch: Batch) -> Tensor:
        return trainer.compute_loss(model, dict(batch))

    return Step(lambda: _batch(trainer, setting), loss)


def _trainer(model: Any, setting: Setting, last_good: LastGood, longest: int) -> Any:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise MissingDependencyError("preferences are planned with data sets: pip install slimtune[train]") from error
    task = str(setting.task)
    drawn: dict[str, Any] = (
        {"generations": setting.generations, "max_new_tokens": setting.drawn_tokens} if task == "grpo" else {}
    )
    with unset_fake_temporarily():
        kind = preference(task, model, _tokenizer(), PreferenceSettings(**drawn), longest)
        rows = Dataset.from_list([ROWS[task]])
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
    """One that knows a single word: TRL asks for a tokenizer, whose ids are replaced by as many as are planned."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words: Any = models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="<end>", eos_token="<end>", pad_token="<end>"
    )


def _batch(trainer: Any, setting: Setting) -> Batch:
    with unset_fake_temporarily():
        if setting.task == "grpo":
            return _drawn(setting)
        return trainer.data_collator([_row(setting, number) for number in range(setting.batch)])


def _row(setting: Setting, number: int) -> dict[str, Any]:
    """A row in the columns that TRL's collators read, half of it the prompt; the first is a token shorter."""
    prompt = [1] * (setting.sequence // 2)
    answer = [1] * (setting.sequence - len(prompt) - (setting.padded and setting.batch > 1 and not number))
    if setting.task == "dpo":
        asked = {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} if setting.method is None else {}
        return {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer, **asked}
    if setting.task == "kto":
        asked = {"ref_logps": 0.0, "ref_KL_logps": 0.0} if setting.method is None else {}
        return {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": answer, "label": not number % 2,
                **asked}  # fmt: skip
    row: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name in ("chosen", "rejected"):
        row[f"{name}_input_ids"] = prompt + answer
        row[f"{name}_attention_mask"] = [1] * len(prompt + answer)
        row[f"{name}_labels"] = [-100] * len(prompt) + answer
    return row


def _drawn(setting: Setting) -> Batch:
    """Answers that were drawn, with their advantages, as TRL's GRPO hands them to its loss."""
    rows, answers = setting.batch, setting.drawn_tokens
    prompt, answer = (torch.ones(rows, length, dtype=torch.long) for length in (setting.sequence, answers))
    batch: Batch = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": answer,
                    "completion_mask": torch.ones_like(answer)}  # fmt: skip
    items = torch.tensor(rows * answers * setting.accumulation)
    return batch | {"advantages": torch.ones(rows), "num_items_in_batch": items}
