"""The steps of a recipe one after the other: do, measure, hold against the bounds, go on.

    OUTPUT.slim/00-model     the model as a plain folder, if it is an adapter or not a folder
    OUTPUT.slim/01-prune     what each step wrote, with 01-prune.json: what it follows from, and its row of the report

A pipeline that was broken off goes on behind the last step that is there, and a changed recipe behind the last step
that it shares. The output is written once, at the end: the last step's folder with the report.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.console.progress import Counting
from slimtune.errors import RefusedStepError
from slimtune.evaluate.answers import weights_of
from slimtune.export.formats import ExportOptions, export
from slimtune.export.gguf.model import MODEL_FILE
from slimtune.models.export import merge_to_folder
from slimtune.models.load import load_model, read_model_config
from slimtune.pipeline.train import run
from slimtune.recipe.validation import read_as
from slimtune.slim.data import calibration_batches
from slimtune.slim.depth import check_layers
from slimtune.slim.distill import distill
from slimtune.slim.folder import quantize_to_folder
from slimtune.slim.measure import SlimRow, measured
from slimtune.slim.prune import batches_for, prune, write_pruned
from slimtune.slim.quantize import QuantizeConfig
from slimtune.slim.recipe import SETTINGS
from slimtune.slim.report import SlimReport, write_report
from slimtune.storage.atomic import refuse_existing, staged, write_file
from slimtune.storage.source import folder_of, is_adapter
from slimtune.train.checkpointing import last_whole
from slimtune.train.run_folder import folder_of as run_folder_of

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.slim.recipe import SlimRecipe

SUFFIX = ".slim"


def slim(recipe: SlimRecipe, screen: Console, overwrite: bool = False) -> SlimReport:
    """Do the steps of a recipe, and write the last one's model with the report.

    Raises:
        RefusedStepError: a step lost more than the recipe allows; the output isn't written.
        OutputExistsError: the output holds something.
        SlimtuneError: a step that can't be done.
    """
    output = Path(recipe.output).absolute()
    refuse_existing(output, overwrite)
    work = output.with_name(output.name + SUFFIX)
    work.mkdir(parents=True, exist_ok=True)
    steps: list[tuple[str, Mapping[str, Any]]] = [next(iter(step.items())) for step in recipe.steps]
    before = first = teacher = _first(recipe.model, work)
    _check_layers(recipe, first)
    key = _digest([weights_of(first), recipe.data, recipe.evaluation])
    losses = work / f"losses-{_digest(weights_of(first))[:20]}.json"
    rows: list[SlimRow] = []
    reference: SlimRow | None = None
    for number, (kind, fields) in enumerate([("model", {}), *steps]):
        key = _digest([key, kind, fields])
        name = f"{number:02d}-{kind}"
        folder = work / name if number else Path(first)
        row = _known(work / f"{name}.json", key, folder)
        if row is None:
            screen.print(f"step {number} of {len(steps)}: {kind}" if number else "measuring the model", markup=False)
            began = time.monotonic()
            if number:
                _remove(folder)
                _do(kind, fields, str(before), teacher, folder, recipe, screen)
            seconds = time.monotonic() - began
            row = measured(name, str(folder), first, recipe.data, recipe.evaluation, seconds, losses)
            write_file(work / f"{name}.json", json.dumps({"key": key, "row": row.to_dict()}))
        rows.append(row)
        _refuse_beyond(recipe, reference or row, row)
        before = str(folder)
        if reference is None or kind == "tune":
            # What is tuned is what later steps are to keep.
            reference, teacher = row, str(folder)
    report = SlimReport(recipe.model, rows)
    with staged(output, overwrite) as written:
        shutil.copytree(before, written, dirs_exist_ok=True)
        if recipe.export is not None:
            export(before, recipe.export, work / "exported", ExportOptions(), overwrite=True)
            shutil.move(work / "exported" / MODEL_FILE, written / MODEL_FILE)
        write_report(written, report)
    shutil.rmtree(work)
    return report


def _do(
    kind: str, fields: Mapping[str, Any], source: str, teacher: str, folder: Path, recipe: SlimRecipe, screen: Console
) -> None:
    """Write the folder of one step."""
    if kind in SETTINGS:
        model, tokenizer = load_model(source, "text")
        data = Path(recipe.data.train[0].path)
        config = read_as(SETTINGS[kind], dict(fields), kind)
        _change(config, model, tokenizer, data if data.is_file() else None, folder, screen)
        return
    trained = folder.with_name(f"{folder.name}.trained")
    training = recipe.training_of(kind, fields, source, teacher, str(trained))
    if not trained.is_dir():
        learn = distill if kind == "distill" else run
        learn(training, screen, plans=False, resume=last_whole(run_folder_of(trained)) is not None)
    if is_adapter(str(trained)):
        model, tokenizer = load_model(str(trained), "text")
        merge_to_folder(model, tokenizer, folder)
        shutil.rmtree(trained)
    else:
        trained.rename(folder)


def _change(config: Any, model: Any, tokenizer: Any, data: Path | None, folder: Path, screen: Console) -> None:
    """Prune or quantize by these texts, or by the shipped ones."""
    if isinstance(config, QuantizeConfig):
        batches = calibration_batches(tokenizer, data) if config.needs_data else []
        batches = [{name: ids.to(model.device) for name, ids in batch.items()} for batch in batches]
        with Counting(screen) as counting:
            quantize_to_folder(model, tokenizer, folder, config, batches, watch=counting.watch)
        return
    batches = batches_for(config, model, tokenizer, data)
    smaller, report = prune(model, config, batches)
    write_pruned(smaller, tokenizer, report, folder, batches[0] if batches else None)


def _first(model: str, work: Path) -> str:
    """The model as a plain folder; an adapter is merged into one."""
    if not is_adapter(model):
        return folder_of(model)
    folder = work / "00-model"
    if not folder.is_dir():
        loaded, tokenizer = load_model(model, "text")
        merge_to_folder(loaded, tokenizer, folder)
    return str(folder)


def _check_layers(recipe: SlimRecipe, first: str) -> None:
    """Find layers out of range before anything is measured. Raises: ConfigError."""
    count = getattr(read_model_config(first).get_text_config(), "num_hidden_layers", None)
    for step in recipe.steps:
        layers = step.get("prune", {}).get("layers")
        if layers is not None and count is not None:
            check_layers(layers, count)
            count = layers


def _known(path: Path, key: str, folder: Path) -> SlimRow | None:
    """The row of a step that was done already, if it follows from the same."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return read_as(SlimRow, stored["row"]) if stored["key"] == key and folder.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_beyond(recipe: SlimRecipe, first: SlimRow, row: SlimRow) -> None:
    """Raises: RefusedStepError, for a row beyond the recipe's bounds."""
    stop, lost = recipe.stop, []
    # Written so that a number that is none is refused as well.
    scored = stop.task is not None and first.score is not None and row.score is not None
    if scored and not row.score - first.score >= stop.task:  # pyright: ignore
        lost.append(f"the task's score went from {first.score:.3f} to {row.score:.3f}, beyond {stop.task:+g}")
    if stop.perplexity is not None and not row.perplexity <= stop.perplexity * first.perplexity:
        lost.append(
            f"the perplexity went from {first.perplexity:.2f} to {row.perplexity:.2f}, beyond {stop.perplexity:g} times"
        )
    if lost:
        raise RefusedStepError(
            f"step {row.name} lost too much: {'; '.join(lost)}. Nothing was written to the output; take less away, let "
            f"it recover for longer, or loosen stop. What was done is in {Path(recipe.output).name}{SUFFIX}, and a "
            "changed recipe goes on behind the last step that it shares"
        )


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
