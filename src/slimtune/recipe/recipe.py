"""A recipe: one run in full, from the model to the folder that is written, as a file or as options say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import TypeAdapter

from slimtune.data.settings import DataSettings
from slimtune.errors import ConfigError, check_choice, listing
from slimtune.evaluate.scorers import EvaluationSettings
from slimtune.models.device import DTYPES
from slimtune.quantization.config import settings_of
from slimtune.recipe.distillation import DistillationSettings
from slimtune.recipe.method import FEATURES, FULL, Method, configure, field_of, find, methods, plain_fields
from slimtune.recipe.preference import PREFERENCE_TASKS, SHARE_OF_RATE, PreferenceSettings
from slimtune.recipe.training import TrainSettings
from slimtune.recipe.validation import STRICT, read_as
from slimtune.storage.hub import at_revision, is_id, parted
from slimtune.storage.source import PACKAGED
from slimtune.storage.text_files import dump, parse, read_mapping

Task = Literal["auto", "text", "classification", "token-classification", "seq2seq", "dpo", "kto", "orpo", "grpo"]
"""What a model learns; auto is found by looking at the data."""

SPELLINGS = {"set": "method", "eval_data": "data.held_out", "eval_fraction": "data.held_out"}
"""Places of settings whose options were called otherwise."""

USED_BY_FEATURES = ("batch_size", "seed")
"""The settings of training that matter where no weight of the model is trained."""


@dataclass(frozen=True)
class ModelSettings:
    """The base that is tuned; raises ConfigError for values that can't be.

    Attributes:
        name: a folder, a Hub id or a packaged name; an id may have its revision behind it, organisation/name@revision.
        revision: of a Hub id: a branch, a tag or a commit; main by default.
        dtype: auto (as stored; float32 where the processor only emulates 16 bits), bfloat16, float16 or float32.
        device: auto, cpu, cuda, cuda:1, ...
        quantize: as what weights are held that are read in full: nf4, fp4, int8, int4, int8-torchao or int4-torchao.
        trust_remote_code: whether Python code that comes with the model is run.
    """

    name: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    quantize: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        name, behind = parted(self.name)
        if behind is not None and self.revision not in (None, behind):
            raise ConfigError(f"name says revision {behind}, and revision says {self.revision}; give one of them")
        # Parted in one place: everything behind reads name and revision apart, however they were written.
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "revision", self.revision or behind)
        if self.revision is not None and (name in PACKAGED or Path(name).exists() or not is_id(name)):
            raise ConfigError(f"revision would change nothing: {name} is not of the Hub; leave it out")
        check_choice("dtype", self.dtype, DTYPES)
        if self.quantize is not None:
            settings_of(self.quantize)

    @property
    def source(self) -> str:
        """What is loaded, by the name that it has everywhere: with its revision behind it."""
        return at_revision(self.name, self.revision)


@dataclass(frozen=True)
class PostTrainingEvaluation(EvaluationSettings):
    """How the tuned model is evaluated; raises ConfigError for values that can't be.

    Attributes:
        scorer: auto (by the kind of task), names as slimtune evaluate has them, between commas, or path.py:function.
        max_new_tokens: the longest answer; by default twice what the longest expected one has.
        batch_size: how many questions are answered at once.
        limit: how many held-out questions are answered, from the first on; by default all.
        too_long: error, or drop for questions that don't fit into the model together with an answer.
        forgetting: whether what the model lost on texts of other domains is measured.
    """

    forgetting: bool = False


@dataclass(frozen=True)
class MethodSettings:
    """How the model is tuned: a method by name, and every field of its config as a file holds it."""

    name: str
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, values: Any, base: str) -> MethodSettings:
        """From `name` and some fields, the others as the method has them; raises ConfigError."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"method takes a mapping with a name, found {values!r}; write method: {{name: lora}}")
        fields = {str(name): value for name, value in values.items()}
        name = fields.pop("name", "lora")
        # YAML reads `name: 3` and `name: off` as other types; as text they get the message of an unknown name.
        method = find(name if isinstance(name, str) else str(name))
        return cls(method.name, plain_fields(method, configure(method, fields, base)))

    @property
    def method(self) -> Method:
        """What the name stands for."""
        return find(self.name)

    def config(self) -> Any:
        """A fresh config: attaching and training write into it."""
        return configure(self.method, self.fields)


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on, each default filled in; raises ConfigError for sections that exclude each other.

    Attributes:
        evaluation: how held-out questions are answered and scored after training; None leaves it out.
        distillation: the teacher whose distribution is learned beside the labels; None for none.
        output: the folder to write.
    """

    model: ModelSettings
    data: DataSettings
    method: MethodSettings
    training: TrainSettings
    preferences: PreferenceSettings = dataclasses.field(default_factory=PreferenceSettings)
    evaluation: PostTrainingEvaluation | None = None
    distillation: DistillationSettings | None = None
    output: str = "tuned"
    task: Task = "auto"

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        method, quantize = self.method, self.model.quantize
        if not self.output.strip():
            raise ConfigError("output is empty; name the folder to write")
        self.preferences.check_for(self.task)
        self._check_evaluation()
        self._check_distillation()
        if self.data.streaming and self.training.max_steps is None:
            raise ConfigError(
                "data.streaming reads data whose length isn't known; say with training.max_steps when to stop"
            )
        if quantize is not None and method.name in (FULL, FEATURES):
            why = "trains all weights, and codes can't be trained"
            why = why if method.name == FULL else "takes a base as it is stored"
            raise ConfigError(
                f"model.quantize is {quantize}, and the method {method.name} {why}; leave --quantize out, or "
                "choose another method"
            )
        if self.training.lora_plus_ratio is not None and not method.method.has_low_rank_pair:
            raise ConfigError(f"training.lora_plus_ratio would change nothing with {method.name}; leave it out")
        if method.name == FEATURES:
            idle = [name for name in _changed(self.training) if name not in USED_BY_FEATURES]
            if idle:
                named = listing(f"training.{name}" for name in idle)
                raise ConfigError(f"{named} would change nothing with the method features; leave it out")

    def _check_evaluation(self) -> None:
        evaluation = self.evaluation
        if evaluation is None:
            return
        if self.method.name == FEATURES:
            raise ConfigError("evaluation would change nothing with the method features, which scores its labels")
        if not evaluation.forgetting and not self.data.held_out:
            raise ConfigError("evaluation asks held-out rows, and nothing is held out; set data.held_out")

    def _check_distillation(self) -> None:
        if self.distillation is None:
            return
        if self.method.name == FEATURES:
            raise ConfigError("distillation takes training steps, and the method features takes none; choose another")
        if self.task in (*PREFERENCE_TASKS, "seq2seq"):
            raise ConfigError(f"distillation is for texts and labels, and not for task {self.task}; leave it out")
        if self.data.streaming:
            raise ConfigError("distillation reads its data whole, and data.streaming doesn't; leave it out")
        if self.distillation.lmbda and self.data.packing:
            raise ConfigError(
                "lmbda draws an answer to each prompt, and data.packing hides where they end; leave it out"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Recipe:
        """From sections with some of their keys; raises ConfigError with the place of a mistake."""
        from slimtune.recipe.compare import CompareSettings

        sections = dict(values)
        # For another command, which finds its mistakes here too.
        CompareSettings.of(sections.pop("compare", None))
        base = sections.get("model")
        name = base.get("name", "") if isinstance(base, Mapping) else ""
        method = MethodSettings.of(sections.get("method", {}), str(name))
        # With all fields of the method's config, so that a later default changes no recipe that was written before.
        sections["method"] = dataclasses.asdict(method)
        training = sections.get("training", {})
        if isinstance(training, Mapping) and training.get("learning_rate") is None:
            rate = method.method.config.learning_rate
            # Preferences are learned by a model that answers already, in smaller steps than supervised tuning takes.
            rate = rate * SHARE_OF_RATE if sections.get("task") in PREFERENCE_TASKS else rate
            # Written into the recipe, which then says what a run depends on even where a later version has another
            # default.
            training = {**training, "learning_rate": rate}
        return read_as(cls, sections | {"training": training})

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """From a YAML file, changed by `section.key=value`; raises ConfigError."""
        return cls.of(overridden(read_mapping(Path(path)), overrides))

    @staticmethod
    def sections() -> dict[str, type]:
        """The sections that are dataclasses, by name."""
        return {
            "model": ModelSettings,
            "data": DataSettings,
            "training": TrainSettings,
            "preferences": PreferenceSettings,
            "evaluation": PostTrainingEvaluation,
            "distillation": DistillationSettings,
        }

    def trusting(self, trust_remote_code: bool) -> Recipe:
        """The recipe for whoever runs it, who says whether the model's own code is run.

        Raises: ConfigError, where the recipe wants it and they don't: who wrote it may be somebody else.
        """
        if self.model.trust_remote_code and not trust_remote_code:
            raise ConfigError(
                "the recipe wants Python code to be run that comes with its model (model.trust_remote_code); pass "
                "--trust-remote-code if you trust it"
            )
        # From whoever types the command, never from the file: a recipe is data, and running code is a decision.
        return replace(self, model=replace(self.model, trust_remote_code=trust_remote_code))

    def to_dict(self) -> dict[str, Any]:
        """All sections with all keys, in plain types, from which `of` makes the same recipe."""
        sections = TypeAdapter(Recipe).dump_python(self, mode="json")
        method = {"name": self.method.name, **self.method.fields}
        if self.task not in PREFERENCE_TASKS:
            del sections["preferences"]
        if self.distillation is None:
            del sections["distillation"]
        # For whoever reads the file: what is trained on what stands first.
        order = ("task", "model", "data", "method")
        return {name: sections[name] for name in order} | sections | {"method": method}

    def write(self, path: Path) -> None:
        """Write it in full."""
        path.write_text(dump(self.to_dict()), encoding="utf-8")


def overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sections changed by `section.key=value`, the values read as YAML; raises ConfigError."""
    changed = dict(values)
    for override in overrides:
        place, value = read_override(override)
        changed = _with(changed, place.split("."), value, place)
    return changed


def read_override(override: str) -> tuple[str, Any]:
    """The place and the value of `section.key=value`; raises ConfigError."""
    place, equals, text = override.partition("=")
    if not equals or not all(place.split(".")):
        raise ConfigError(f"an override is section.key=value, found '{override}'; pass for example training.epochs=1")
    try:
        return place, parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {place} is not YAML: '{text}'; put a text in quotes") from error


def keys() -> dict[str, str]:
    """The keys that sections have whatever the method, each with its place, as in `training.epochs`.

    A name that several sections have stands for the first of them.
    """
    places = {"task": "task"}
    for section, kind in Recipe.sections().items():
        # Written with their section always: an alpha alone is LoRA's.
        if section != "distillation":
            # The earlier section wins: `| places` puts what was there before on top.
            places = {name: f"{section}.{name}" for name in kind.__dataclass_fields__} | places
    return places


def place_of(name: str) -> str:
    """The place of the key that an option of this name stands for; empty if there is none."""
    place = SPELLINGS.get(name) or keys().get(name)
    if place is None:
        fields = (field_of(method, name) for method in _methods())
        place = next((f"method.{field}" for field in fields if field), "")
    return place


def type_of(place: str) -> Any:
    """The type of the value at a place; of a field that several methods have, in one of them."""
    section, _, key = place.partition(".")
    if section == "method":
        config = next((method.config for method in _methods() if key in method.fields), None)
        return get_type_hints(config)[key] if config else dict
    return get_type_hints(Recipe.sections()[section] if key else Recipe)[key or section]


def _methods() -> list[Method]:
    """All methods, LoRA first: what it has a field for is meant as its own."""
    return sorted(methods().values(), key=lambda method: method.name != "lora")


def _with(values: Any, keys: Sequence[str], value: Any, place: str) -> Any:
    """The values with another one at this place; what was given stays as it is."""
    key, *further = keys
    # `data.train.0.weight=2`: a number counts into a list, where there is one.
    if isinstance(values, list) and key.isdecimal() and int(key) < len(values):
        number = int(key)
        return [
            *values[:number],
            _with(values[number], further, value, place) if further else value,
            *values[number + 1 :],
        ]
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(f"{place} can't be set: what stands before '{key}' is {values!r}; set that as a whole")
    inner = (values or {}).get(key)
    return {**(values or {}), key: _with(inner, further, value, place) if further else value}


def _changed(settings: Any) -> list[str]:
    """The fields of a dataclass that differ from their defaults."""
    fresh = type(settings)()
    return [
        field.name
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != getattr(fresh, field.name)
    ]
