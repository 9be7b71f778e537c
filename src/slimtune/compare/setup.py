"""What all runs of a comparison share, and the recipe that each of them makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.compare.results import RESULT, read_result
from slimtune.errors import ConfigError, OutputExistsError, did_you_mean
from slimtune.quantization.config import require_for
from slimtune.recipe.candidates import LEARNING_RATE, QUANTIZED, Candidate, Run
from slimtune.recipe.compare import CompareSettings
from slimtune.storage.atomic import write_file

RECIPE, TUNED = "recipe.yaml", "tuned"
DATA_KEPT = ("max_length", "too_long", "packing")
"""What of the data section is left once the data is written down."""


@dataclass(frozen=True)
class ComparisonSetup:
    """What all runs share.

    Attributes:
        recipe: sections of the recipe, the comparison's own left out.
        train, questions: the files that were written for all runs.
        kind: of the data: text or classification.
        computes: as in the record of the comparison.
    """

    folder: Path
    recipe: dict[str, Any]
    settings: CompareSettings
    train: Path
    questions: Path
    kind: str = "text"
    computes: bool = True

    @property
    def has_language_loss(self) -> bool:
        """Whether what is tuned predicts the next token; a classifier doesn't, so that forgetting has no measure."""
        return self.kind == "text"

    def place(self, run: Run) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / run.slug


def recipe_of(setup: ComparisonSetup, run: Run) -> dict[str, Any]:
    """The recipe of one run: the same for all but the method, its learning rate, its base and the seed."""
    candidate, sections = run.candidate, setup.recipe
    fields = {name: _value(text) for name, text in candidate.fields if name != LEARNING_RATE}
    training = {**(sections.get("training") or {}), "seed": run.seed}
    # Dropped first: where nothing names a rate for this method, it is to have its own and not the recipe's.
    training.pop(LEARNING_RATE, None)
    training |= {LEARNING_RATE: rate} if (rate := _learning_rate(setup, candidate)) is not None else {}
    if setup.settings.max_steps is not None:
        training["max_steps"] = setup.settings.max_steps
    # The questions are held out of every run alike, and no checkpoint is chosen by them.
    data = {name: value for name, value in sections["data"].items() if name in DATA_KEPT}
    return sections | {
        "model": model_of(setup, candidate),
        "data": data | {"train": str(setup.train), "held_out": 0},
        "method": _same_method(sections.get("method"), candidate.method) | {"name": candidate.method} | fields,
        "training": training,
        "output": str(setup.place(run) / TUNED),
    }


def model_of(setup: ComparisonSetup, candidate: Candidate) -> dict[str, Any]:
    """The model section for a candidate."""
    return setup.recipe["model"] | ({"quantize": candidate.quantize} if candidate.quantize else {})


def write_recipe(setup: ComparisonSetup, run: Run) -> None:
    """Write the recipe of a run into its folder; what came of another one is deleted."""
    from slimtune.storage.text_files import dump, read_mapping

    path, recipe = setup.place(run) / RECIPE, recipe_of(setup, run)
    if path.is_file() and read_mapping(path) != recipe:
        for answer in path.parent.glob("*.json"):
            # That the run failed must stay known: a training that failed begins anew.
            if answer.name != RESULT:
                answer.unlink()
    write_file(path, dump(recipe))


def check_candidates(setup: ComparisonSetup) -> None:
    """See that every candidate can be trained, before anything is run.

    Raises:
        ConfigError: a method or a field that is none.
        MissingDependencyError: the library of a quantized base isn't installed.
    """
    from slimtune.recipe.method import methods
    from slimtune.recipe.recipe import Recipe

    known = [*methods(), *QUANTIZED, *(candidate.name for candidate in setup.settings.candidates)]
    for name in setup.settings.learning_rates:
        if name not in known:
            raise ConfigError(f"compare.learning_rates names no method '{name}'{did_you_mean(name, known)}")
    for candidate in setup.settings.candidates:
        if candidate.is_trained:
            require_for(model_of(setup, candidate).get("quantize") or "dense")
            try:
                Recipe.of(recipe_of(setup, Run(candidate, 0)))
            except ConfigError as error:
                raise ConfigError(f"{candidate.name}: {error}") from error


def check_unchanged(setup: ComparisonSetup, runs: Sequence[Run]) -> None:
    """Raises: OutputExistsError, for a run with other settings than it was begun with; what failed may change."""
    from slimtune.storage.text_files import read_mapping

    for run in runs:
        path, result = setup.place(run) / RECIPE, setup.place(run) / RESULT
        if run.candidate.is_trained and path.is_file() and not (result.is_file() and read_result(result).reason):
            refuse_changes(read_mapping(path), recipe_of(setup, run), f"the run {run} in {setup.folder}")


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Raises: OutputExistsError, with what was changed."""
    changed = [f"{place} was {old} and is now {new}" for place, old, new in _differences(before, now)]
    if changed:
        raise OutputExistsError(
            f"{what} was begun with other settings: {'; '.join(changed[:4])}; choose another --output, or go back to "
            f"what they were"
        )


def _differences(before: Any, now: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = list(dict.fromkeys([*before, *now]))
        nested = (_differences(before.get(name), now.get(name), f"{place}.{name}".lstrip(".")) for name in names)
        return [difference for differences in nested for difference in differences]
    return [] if before == now else [(place, before, now)]


def _learning_rate(setup: ComparisonSetup, candidate: Candidate) -> float | None:
    """The variant's own, else that of the compare section, else the recipe's; None is the method's own.

    The recipe's is for the kind of method that it names: what suits LoRA is ten times too much for full tuning.
    """
    from slimtune.recipe.method import find

    fields, rates = dict(candidate.fields), setup.settings.learning_rates
    if LEARNING_RATE in fields:
        return _value(fields[LEARNING_RATE])
    named = next((name for name in (candidate.name, candidate.name.partition(":")[0]) if name in rates), None)
    if named is not None:
        return rates[named]
    own = (setup.recipe.get("method") or {}).get("name", "lora")
    # By the class of the config, which lora and dora share.
    is_alike = find(own).config is find(candidate.method or own).config
    return (setup.recipe.get("training") or {}).get(LEARNING_RATE) if is_alike else None


def _same_method(section: Any, method: str | None) -> dict[str, Any]:
    """The recipe's fields of a method are for that method: others have their own defaults."""
    if not isinstance(section, Mapping) or section.get("name", "lora") != method:
        return {}
    return {name: value for name, value in section.items() if name != "name"}


def _value(text: str) -> Any:
    from slimtune.storage.text_files import parse

    return parse(text)
