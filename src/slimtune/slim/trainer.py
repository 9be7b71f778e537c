"""The step of a distillation: the Trainer of every run, with the teacher's distribution in the loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from slimtune.data.batches import IGNORED, Encoded, PadRight
from slimtune.errors import ConfigError, TrainingError
from slimtune.recipe.distillation import DistillationSettings
from slimtune.slim.cache import TeacherCache
from slimtune.slim.losses import Distance, Teacher, TopKTeacher, WholeTeacher, distillation_loss, label_loss
from slimtune.slim.readout import read_out
from slimtune.train.trainer import AnswerTrainer

STORED = ("ids", "log_probs", "rest")


class StepLoss(Protocol):
    """The loss of a student on one batch, summed over its learned tokens or texts."""

    def __call__(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum, and of how many."""
        ...


class Distills(Trainer):
    """A Trainer whose loss is that of a distillation.

    Args:
        step_loss: of a batch.
        rewrite: what becomes of the batches of a step before it, such as answers that the student draws itself.
    """

    def __init__(
        self, *args: Any, step_loss: StepLoss, rewrite: Callable[[Any, Any], Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.step_loss, self.rewrite = step_loss, rewrite

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum over the batch by the number of items in the step, so that its batches add up."""
        total, count = self.step_loss(model, dict(inputs))
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, with the batches rewritten and their items counted again."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.rewrite is None:
            return batches, items
        batches = [self.rewrite(self.model, batch) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, self.args.device)


class DistillTrainer(AnswerTrainer, Distills):
    """The checks and checkpoints of every run around the loss of a distillation."""


@dataclass(frozen=True)
class TextLoss:
    """Of a model that writes text, at its learned tokens.

    Attributes:
        teacher: the model; None where its answers come with the batch.
        width: how many tokens both have.
        drawn: how many of the stored tokens were drawn.
    """

    distance: Distance
    width: int
    teacher: Any = None
    drawn: int = 0

    def __call__(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum over the learned tokens, and their number."""
        labels_BT = inputs.pop("labels")
        stored = {name: inputs.pop(name) for name in STORED if name in inputs}
        # The token before a label predicts it.
        learned_BT = labels_BT[:, 1:] != IGNORED
        places_BT = F.pad(learned_BT, (0, 1))
        student = read_out(model, inputs).at(places_BT)
        teacher: Teacher
        if self.teacher is None:
            teacher = TopKTeacher(**stored, drawn=self.drawn)
            if len(teacher.rest) != len(student.hidden):
                raise TrainingError(
                    f"{len(student.hidden)} tokens are learned and the teacher's answers are for {len(teacher.rest)}; "
                    "remove the folder of its answers"
                )
        else:
            with torch.no_grad():
                teacher = WholeTeacher(read_out(self.teacher, inputs).at(places_BT))
        labels_N = labels_BT[:, 1:][learned_BT]
        return distillation_loss(student, teacher, labels_N, self.distance, self.width), learned_BT.sum()


@dataclass(frozen=True)
class LabelLoss:
    """Of a classifier of texts or tokens: its logits, and on request its hidden states.

    Attributes:
        order: the place among the teacher's labels of each label of the student's.
        hidden: the weight of the hidden states.
    """

    distance: Distance
    teacher: Any
    order: Tensor
    hidden: float = 0.0

    def __call__(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum over the texts or tokens with a label, and their number."""
        labels = inputs.pop("labels").flatten()
        counts, states = labels != IGNORED, self.hidden > 0
        mine = model(**inputs, output_hidden_states=states)
        with torch.no_grad():
            theirs = self.teacher(**inputs, output_hidden_states=states)
        logits = mine.logits.reshape(len(labels), -1)[counts]
        target = theirs.logits.reshape(len(labels), -1)[counts][:, self.order.to(labels.device)]
        total, count = label_loss(logits, target, labels[counts], self.distance), counts.sum()
        if states:
            apart = hidden_distance(mine.hidden_states, theirs.hidden_states, inputs["attention_mask"])
            total = total + self.hidden * count * apart
        return total, count


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
    """The mean squared distance of hidden states (B, T, features) over the student's layers and the attended tokens.

    Of S layers and L of the teacher's, layer i learns from layer round(i L / S); the first is the embedding.

    Raises:
        ConfigError: the two have other widths.
    """
    if student[0].shape[-1] != teacher[0].shape[-1]:
        raise ConfigError(
            f"the student's hidden states have {student[0].shape[-1]} features and the teacher's "
            f"{teacher[0].shape[-1]}, so that they can't be compared; leave hidden out"
        )
    layers, theirs = len(student) - 1, len(teacher) - 1
    kept = mask_BT.bool()
    pairs = [(student[i], teacher[round(i * theirs / layers)]) for i in range(layers + 1)]
    return torch.stack([(a[kept].float() - b[kept].float()).square().mean() for a, b in pairs]).mean()


@dataclass(frozen=True)
class Taught(Encoded):
    """An example with its number among those whose teacher's answers are stored."""

    number: int


class WithStored:
    """Collate examples as before, with the teacher's stored answers beside them."""

    def __init__(self, collate: Callable[[Sequence[Any]], Mapping[str, Any]], cache: TeacherCache) -> None:
        self.collate, self.cache = collate, cache

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The batch; the answers are in the order of its learned tokens, row by row."""
        flat: list[Any] = [one for row in examples for one in ([row] if isinstance(row, Encoded) else row)]
        stored = self.cache.answers([example.number for example in flat])
        return {**self.collate(examples), **{name: getattr(stored, name) for name in STORED}}


class OnPolicy:
    """Draws the student's own answers to a share of the batches, by TRL's function for it (arXiv:2306.13649)."""

    def __init__(self, settings: DistillationSettings, pad_id: int) -> None:
        self.settings, self.pad_id = settings, pad_id

    def __call__(self, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with answers drawn to its prompts, or as it is."""
        from transformers import GenerationConfig

        # TRL warns of its experimental part, where GKD lives, on import.
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.gkd import GKDTrainer

        # torch's generator is stored with each checkpoint, so that a resumed run draws the same.
        if float(torch.rand(())) >= self.settings.lmbda:
            return batch
        own = model.generation_config
        config = GenerationConfig(
            max_new_tokens=self.settings.max_new_tokens, temperature=self.settings.temperature, do_sample=True,
            top_k=0, top_p=1.0, use_cache=True, pad_token_id=self.pad_id, eos_token_id=own.eos_token_id,
        )  # fmt: skip
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                ids, mask, labels = GKDTrainer.generate_on_policy_outputs(model, self._prompts(batch, model), config)
        finally:
            model.train(was_training)
        # Padding in front would shift the positions of models that learned one vector for each.
        rows = [(i[m == 1], n[m == 1]) for i, n, m in zip(ids, labels, mask, strict=True)]
        return dict(PadRight(self.pad_id)([Encoded(i.tolist(), n.tolist()) for i, n in rows]))

    def _prompts(self, batch: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
        """What stands before the last answer of each row, with padding in front."""
        rows = []
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            learned = (labels != IGNORED).nonzero().flatten().tolist()
            # The start of the last run of learned tokens.
            first = next(p for p in reversed(learned) if p - 1 not in learned)
            rows.append(ids[:first])
        longest = max(map(len, rows))
        prompts = torch.stack([F.pad(row, (longest - len(row), 0), value=self.pad_id) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
        return {"prompts": prompts.to(model.device), "prompt_attention_mask": mask.to(model.device)}
