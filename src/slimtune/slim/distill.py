"""Distillation: a training run whose loss is the distance from a teacher.

The run is that of `pipeline.train`, with its loop, checkpoints, exact resume, evaluation and files. A teacher is asked
once and its likeliest tokens are stored (`slim.cache`), or is run beside the student at each step; a classifier's is
always beside it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slimtune.console.progress import Counting
from slimtune.data.batches import Encoded, Objective, PadRight, pad_id_of
from slimtune.data.tasks.base import EncodedDataset
from slimtune.errors import ConfigError, did_you_mean, listing, require
from slimtune.evaluate.answers import weights_of
from slimtune.models.load import LoadOptions, load_model
from slimtune.pipeline.train import run
from slimtune.recipe.distillation import DistillationSettings
from slimtune.slim.cache import Request, TeacherCache, drawn_of
from slimtune.slim.losses import Distance
from slimtune.slim.readout import width_of
from slimtune.slim.trainer import DistillTrainer, LabelLoss, OnPolicy, StepLoss, Taught, TextLoss, WithStored
from slimtune.storage.source import cache_dir, folder_of
from slimtune.train.trainer import TrainerSpec

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.recipe.recipe import Recipe
    from slimtune.train.loop import Outcome

WAY_OUT = "let the teacher write answers and learn those (--seq-kd)"


def distill(
    recipe: Recipe, screen: Console, overwrite: bool = False, plans: bool = True, resume: bool = False,
    cache: Path | None = None,
) -> Outcome:  # fmt: skip
    """Train the model of a recipe by its section `distillation`, and write the output folder; raises SlimtuneError.

    Args:
        cache: where the teacher's answers are stored; by default beside the models that are downloaded.
    """
    settings = recipe.distillation
    if settings is None:
        raise ConfigError(
            "the recipe names no teacher; add distillation: {teacher: ...}, or run it with slimtune train"
        )
    if settings.lmbda:
        require("trl", extra="trl,train", purpose="distillation.lmbda, with which the model's own answers are drawn,")
    teaching = _Teaching(settings, recipe, screen, cache or cache_dir().with_name("teachers"))
    return run(recipe, screen, overwrite, plans, resume, teaching)


@dataclass(frozen=True)
class _Teaching:
    """How a student's examples and its Trainer become those of a distillation."""

    settings: DistillationSettings
    recipe: Recipe
    screen: Console
    cache: Path

    def __call__(
        self, model: Any, tokenizer: Any, data: Any, dataset: EncodedDataset
    ) -> tuple[EncodedDataset, TrainerSpec]:
        """The examples, perhaps with the teacher's stored answers, and the Trainer that learns from them."""
        settings = self.settings
        distance = Distance(settings.beta, settings.temperature, settings.alpha)
        facts = dataset.facts | {"teacher": settings.teacher} | {
            name: getattr(settings, name) for name in ("beta", "temperature", "alpha")
        }  # fmt: skip
        dataset = replace(dataset, facts=facts)
        if data.task_type != "CAUSAL_LM":
            self._check_text_settings()
            way_out = "train on what slimtune predict writes with the teacher"
            teacher = self._load(model, data, tokenizer, way_out)
            order = _order(data.names, teacher)
            collate = dataset.objective.collate if dataset.objective else PadRight(pad_id_of(tokenizer))
            return dataset, _spec(LabelLoss(distance, teacher, order, settings.hidden), collate)
        if settings.hidden:
            raise ConfigError("hidden compares the hidden states of classifiers; leave it out for a model of texts")
        load = functools.partial(self._load, model, data, tokenizer, WAY_OUT)
        objective = dataset.objective or Objective(PadRight(pad_id_of(tokenizer)))
        if settings.stored_tokens:
            return self._stored(dataset, objective, distance, width_of(model), load, tokenizer)
        teacher = load()
        width = min(width_of(model), width_of(teacher))
        rewrite = OnPolicy(settings, pad_id_of(tokenizer)) if settings.lmbda else None
        return dataset, _spec(TextLoss(distance, width, teacher), objective.collate, rewrite)

    def _load(self, model: Any, data: Any, tokenizer: Any, way_out: str) -> Any:
        """The teacher. Raises: ConfigError, where its tokenizer isn't the student's."""
        how = self.recipe.model
        options = LoadOptions(device=str(model.device), trust_remote_code=how.trust_remote_code, computes="batches")
        teacher, teachers_tokenizer = load_model(self.settings.teacher, data.model_task, options)
        check_tokenizers(tokenizer, teachers_tokenizer, way_out)
        return teacher.eval().requires_grad_(False)

    def _stored(
        self, dataset: EncodedDataset, objective: Objective, distance: Distance, width: int,
        load: Callable[[], Any], tokenizer: Any,
    ) -> tuple[EncodedDataset, TrainerSpec]:  # fmt: skip
        """The examples with numbers of stored answers, which are there when this returns.

        Args:
            load: gives the teacher, which takes memory and time only where an answer is missing.
        """
        examples = list(dict.fromkeys(map(_key, _flat([*dataset.examples, *dataset.held_out]))))
        request = Request(
            _identity(self.settings.teacher), _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True)), width,
            self.settings.stored_tokens, self.settings.temperature, drawn_of(self.settings.stored_tokens),
        )  # fmt: skip
        cache = TeacherCache(self.cache, request, [Encoded(list(ids), list(labels)) for ids, labels in examples])
        with Counting(self.screen) as counting:
            if cache.done < len(examples):
                counting.start("asking the teacher, examples", len(examples), cache.done)
                cache.fill(load(), pad_id_of(tokenizer), counting.advance)
        self.screen.print(f"teacher: {len(examples):,} examples answered, {cache.bytes / 1e6:.1f} MB in {cache.folder}")
        numbers = {key: number for number, key in enumerate(examples)}
        loss = TextLoss(distance, cache.width, drawn=cache.drawn)
        taught = replace(
            dataset, examples=_taught(dataset.examples, numbers), held_out=_taught(dataset.held_out, numbers)
        )
        return taught, _spec(loss, WithStored(objective.collate, cache))

    def _check_text_settings(self) -> None:
        given = [name for name in ("lmbda", "top_k") if getattr(self.settings, name)]
        if given:
            raise ConfigError(
                f"{listing(given)} is for models that write text, and these rows have labels; leave it out"
            )


def _spec(step_loss: StepLoss, collate: Any, rewrite: Any = None) -> TrainerSpec:
    return TrainerSpec(functools.partial(DistillTrainer, data_collator=collate, step_loss=step_loss, rewrite=rewrite))


def check_tokenizers(student: Any, teacher: Any, way_out: str) -> None:
    """Raises: ConfigError, where the two don't give the same ids to the same tokens."""
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine == theirs:
        return
    differing = [token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)]
    raise ConfigError(
        f"teacher and student have other tokenizers ({len(theirs):,} and {len(mine):,} tokens, of which "
        f"{len(differing):,} differ), so that their distributions can't be compared; {way_out}"
    )


def _order(labels: Sequence[str], teacher: Any) -> torch.Tensor:
    """The place of each of the student's labels among the teacher's. Raises: ConfigError."""
    places = {str(name): int(number) for number, name in teacher.config.id2label.items()}
    for name in labels:
        if name not in places:
            raise ConfigError(
                f"the teacher has no label '{name}', it has {listing(places)}{did_you_mean(name, places)}; "
                "choose one that was trained on these labels"
            )
    return torch.tensor([places[name] for name in labels])


def _flat(examples: Sequence[Any]) -> list[Encoded]:
    """The examples of packed rows, one by one."""
    return [one for row in examples for one in ([row] if isinstance(row, Encoded) else row)]


def _key(example: Encoded) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(example.input_ids), tuple(example.labels)


def _taught(examples: Sequence[Any], numbers: dict[Any, int]) -> list[Any]:
    def taught(example: Any) -> Any:
        if not isinstance(example, Encoded):
            return [taught(one) for one in example]
        return Taught(example.input_ids, example.labels, numbers[_key(example)])

    return [taught(example) for example in examples]


def _identity(teacher: str) -> str:
    """What tells a teacher from another one of the same name."""
    return _digest(json.dumps(weights_of(folder_of(teacher)), default=str))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
