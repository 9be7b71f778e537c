"""A recipe for making a model smaller in steps, each measured, with a bound on what a step may lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimtune.data.settings import DataSettings
from slimtune.errors import ConfigError, check_choice, check_number, did_you_mean
from slimtune.recipe.recipe import PostTrainingEvaluation, Recipe, overridden
from slimtune.recipe.validation import STRICT, read_as
from slimtune.slim.prune import PruneConfig
from slimtune.slim.quantize import QuantizeConfig
from slimtune.storage.text_files import read_mapping

SETTINGS: Mapping[str, Any] = {"prune": PruneConfig, "quantize": QuantizeConfig}
"""What the fields of a step are, where it isn't a training."""
FOLDER = Path(__file__).with_name("recipes")
KINDS = ("tune", "prune", "distill", "quantize")
"""What a step can be."""
_AFTER_QUANTIZE = {
    "prune": "weights in codes have no parts to leave out",
    "quantize": "codes that are rounded again lose more than once",
    "tune": "what is learned would be merged into codes, which rounds most of it away",
    "distill": "what is learned would be merged into codes, which rounds most of it away",
}
"""Why a step can't follow a quantization."""
EXPORTS = (None, "gguf")


@dataclass(frozen=True)
class StopBounds:
    """How much a step may lose against the first row; None for any.

    Attributes:
        task: the lowest change of the task's score, as -0.02.
        perplexity: the highest ratio of the perplexities, as 1.15.
    """

    task: float | None = None
    perplexity: float | None = None

    def __post_init__(self) -> None:
        if self.task is not None and not -1 <= self.task <= 0:
            raise ConfigError(f"stop.task is the lowest change of a score, from -1 to 0, found {self.task}")
        if self.perplexity is not None:
            check_number("stop.perplexity", self.perplexity, 1)


@dataclass(frozen=True)
class SlimRecipe:
    """A model, data, and steps; raises ConfigError for what can't be, before anything is loaded.

    Attributes:
        model: a folder, a Hub id, a packaged name or an adapter, which is merged first.
        data: as of a training recipe; the steps learn from its rows and the task is scored on those held out.
        steps: each a mapping with one key: tune, with `method` and `training`; prune, with the fields of
            `PruneConfig`; distill, with those of `DistillationSettings`, `method` and `training`; quantize, with those
            of `QuantizeConfig`, as the last one. The teacher is the tuned model, or the first one, unless it is named.
        evaluation: how the held-out questions are scored; None leaves the score out.
        stop: what a step may lose, against the tuned model or the first one.
        export: gguf for a file for llama.cpp beside the last step's folder.
    """

    model: str
    data: DataSettings
    steps: list[dict[str, dict[str, Any]]]
    output: str
    evaluation: PostTrainingEvaluation | None = None
    stop: StopBounds = field(default_factory=StopBounds)
    export: str | None = None

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if not self.output.strip():
            raise ConfigError("output is empty; name the folder to write")
        if not self.steps:
            raise ConfigError("steps is empty; name a step, as - prune: {layers: 24}")
        check_choice("export", self.export, EXPORTS)
        is_quantized = False
        for number, step in enumerate(self.steps):
            place = f"steps.{number}"
            if len(step) != 1:
                raise ConfigError(
                    f"{place} has the keys {', '.join(step) or 'none'}; a step is one: {', '.join(KINDS)}"
                )
            ((kind, fields),) = step.items()
            if kind not in KINDS:
                near = did_you_mean(kind, KINDS) or f"; there are {', '.join(KINDS)}"
                raise ConfigError(f"{place} is no step '{kind}'{near}")
            if is_quantized:
                raise ConfigError(f"{place}: {kind} can't follow quantize: {_AFTER_QUANTIZE[kind]}; put it before")
            is_quantized = kind == "quantize"
            if kind in SETTINGS:
                read_as(SETTINGS[kind], fields, f"{place}.{kind}")
            else:
                self.training_of(kind, fields, "student", "teacher", "out")
        if self.evaluation is None and self.stop.task is not None:
            raise ConfigError("stop.task needs a score to bound; add evaluation: {}")
        if self.evaluation is not None and not self.data.held_out:
            raise ConfigError("evaluation asks held-out rows, and nothing is held out; set data.held_out")

    def training_of(self, kind: str, fields: Mapping[str, Any], student: str, teacher: str, output: str) -> Recipe:
        """The training that a step is: one on the data, or a distillation. Raises: ConfigError."""
        own = {name: value for name, value in fields.items() if name != "teacher"}
        sections: dict[str, Any] = {name: own.pop(name) for name in ("method", "training") if name in own}
        from pydantic import TypeAdapter

        data = TypeAdapter(DataSettings).dump_python(self.data, mode="json")
        if kind == "distill":
            sections["distillation"] = {"teacher": fields.get("teacher", teacher), **own}
        elif "teacher" in fields or own:
            stranger = next(iter(own), "teacher")
            raise ConfigError(f"steps: tune has no {stranger}; it takes method and training")
        return Recipe.of({"model": {"name": student}, "data": data, "output": output} | sections)

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = (), output: Path | None = None) -> SlimRecipe:
        """From a YAML file, changed by `section.key=value`; raises ConfigError."""
        values = overridden(read_mapping(path), overrides)
        return read_as(cls, values | ({} if output is None else {"output": str(output)}))


def shipped() -> dict[str, str]:
    """The recipes that ship, by name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yaml"))}
