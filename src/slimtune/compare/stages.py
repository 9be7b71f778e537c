"""The stages of a run: each keeps its result as a file once it is done, and together they are the run's result.

The functions of the stages are called in a process of their own (see `process`), so that what is heavy is imported
within them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from slimtune.compare.results import (
    RESULT,
    DomainLosses,
    Result,
    RunScore,
    RunSpectrum,
    ShownQuestion,
    Stage,
    Training,
    reading,
)  # fmt: skip
from slimtune.compare.setup import RECIPE, TUNED, ComparisonSetup, model_of
from slimtune.console.screen import open_screen
from slimtune.errors import DataError, TrainingError, counted
from slimtune.evaluate.model import EvaluatedModel
from slimtune.models.load import LoadOptions
from slimtune.recipe.candidates import Run
from slimtune.storage.hub import at_revision

ANSWERS = "answers.jsonl"


def stages_of(setup: ComparisonSetup, run: Run) -> list[Stage]:
    """The stages of a run in their order. The training comes first, so that the peak of memory is its own."""
    place, settings = setup.place(run), setup.settings
    if not run.candidate.is_trained:
        model = setup.recipe["model"]
        return [_evaluation(setup, run, at_revision(model["name"], model.get("revision")))]
    tuned = _source(setup, run, str(place / TUNED))
    stages = [
        Stage("train", partial(train, recipe=place / RECIPE, resume=_can_resume(place), computes=setup.computes)),
        _evaluation(setup, run, tuned.name),
    ]
    if setup.has_language_loss and settings.texts != 0:
        stages.append(Stage("forgetting", partial(forgetting, tuned=tuned, texts=settings.texts), is_needed=False))
    if settings.spectra == "all" or (settings.spectra == "first" and run.seed == 0):
        stages.append(Stage("spectra", partial(spectra, tuned=tuned), is_needed=False))
    return stages


def _can_resume(place: Path) -> bool:
    """Whether a kill left a checkpoint to go on from, to the same bits; a training that failed begins anew."""
    from slimtune.train.checkpointing import last_whole
    from slimtune.train.run_folder import folder_of

    broken_off = folder_of(place / TUNED)
    # A result there says that the run ended by itself: as a failure, whose checkpoint may be what it failed with.
    return not (place / RESULT).is_file() and broken_off.is_dir() and last_whole(broken_off) is not None


def _source(setup: ComparisonSetup, run: Run, name: str) -> EvaluatedModel:
    """The model of this name, loaded as it was while it was tuned."""
    fields = ("dtype", "device", "trust_remote_code", "quantize")
    # Quantized as it was trained: an adapter on the 16-bit base would answer for weights that it never saw.
    given = {key: value for key, value in model_of(setup, run.candidate).items() if key in fields and value}
    return EvaluatedModel(name, LoadOptions(**given, computes="batches" if setup.computes else None))


def _evaluation(setup: ComparisonSetup, run: Run, model: str) -> Stage:
    settings, candidate = setup.settings, run.candidate
    work = partial(
        evaluate,
        source=_source(setup, run, model),
        questions=setup.questions,
        answers=setup.place(run) / ANSWERS,
        scorer=settings.scorer,
        max_new_tokens=settings.max_new_tokens,
        examples=setup.train if candidate.shots else None,
        # Without examples nothing is drawn, and the answers say so by the seed 0.
        shots={"count": candidate.shots, "seed": run.seed, "random_labels": candidate.random_labels}
        if candidate.shots
        else {},
    )
    return Stage("evaluate", work)


def train(recipe: Path, resume: bool, computes: bool) -> dict[str, Any]:
    """Train as a recipe says, over what is there unless it is resumed. Raises: SlimtuneError.

    Args:
        computes: as in the record of the comparison.
    """
    from slimtune.pipeline.dtype import in_stored_dtype
    from slimtune.pipeline.train import run
    from slimtune.recipe.recipe import Recipe
    from slimtune.storage.text_files import read_mapping
    from slimtune.train.results import RESULTS

    settings = Recipe.of(read_mapping(recipe))
    if not computes and not resume:
        settings = replace(settings, model=in_stored_dtype(settings.model, settings.method))
    run(settings, open_screen(as_json=True), overwrite=not resume, resume=resume)
    return {"output": settings.output, **json.loads((Path(settings.output) / RESULTS).read_text(encoding="utf-8"))}


def evaluate(
    source: EvaluatedModel,
    questions: Path,
    answers: Path,
    scorer: str,
    max_new_tokens: int | None,
    examples: Path | None,
    shots: Mapping[str, Any],
) -> dict[str, Any]:
    """Ask a model the questions, with all answers written to a file. Raises: SlimtuneError.

    Args:
        shots: fields of `Shots`: how many of the `examples` stand in the prompt, and how they are drawn.
    """
    from slimtune.console.progress import Counting
    from slimtune.evaluate.in_context import Shots
    from slimtune.evaluate.run import prepare
    from slimtune.evaluate.scorers import EvaluationSettings
    from slimtune.evaluate.tasks import open_task

    # Over a finished file only: what a killed run has answered lies beside it, and is gone on from.
    file = source.answer_file(answers, overwrite=True)
    former = None if examples is None else open_task(str(examples))
    settings = EvaluationSettings(scorer, max_new_tokens)
    prepared = prepare(open_task(str(questions)), settings, Shots(**shots), former)
    with Counting(open_screen(as_json=True)) as counting:
        scored = source.evaluate(prepared, counting, file)
    return {"model": source.name, "task": str(questions), **scored.to_dict()}


def forgetting(tuned: EvaluatedModel, texts: int | None) -> dict[str, Any]:
    """Measure the loss on the first `texts` of each shipped set, before and after. Raises: SlimtuneError."""
    from slimtune.console.progress import Counting
    from slimtune.evaluate.domain_texts import texts as shipped
    from slimtune.evaluate.forgetting import measure

    model = _tuned(tuned)
    with Counting(open_screen(as_json=True)) as counting:
        measured = measure(model, shipped(limit=texts), worst=0, watch=counting.watch)
    return {"tuned": tuned.name, "base": model.base, **measured.to_dict()}


def spectra(tuned: EvaluatedModel) -> dict[str, Any]:
    """Decompose what tuning did to each matrix. Raises: SlimtuneError."""
    from slimtune.console.progress import Counting
    from slimtune.evaluate.intruders.spectra import measure, updates_of

    model = _tuned(tuned)
    updates = updates_of(model)
    with Counting(open_screen(as_json=True)) as counting:
        counting.start("decomposing matrices", len(updates.matrices))
        measured = measure(updates, on_matrix=counting.advance)
    return {"tuned": tuned.name, "base": model.base, **measured.to_dict()}


def _tuned(source: EvaluatedModel) -> Any:
    from slimtune.evaluate.tuned import Tuned

    return Tuned.find(source.name, **vars(source.options))


def result_of(setup: ComparisonSetup, run: Run, stages: Sequence[Stage], notes: list[str]) -> Result:
    """The result of a run, from what its stages have kept. Raises: DataError, for a file that is damaged."""
    place = setup.place(run)
    # A stage that isn't needed may have failed, and has kept nothing then.
    kept = {stage.name: stage.kept(place) for stage in stages if stage.is_needed or stage.kept(place).is_file()}
    return Result(
        candidate=run.candidate.name,
        seed=run.seed,
        status="done",
        score=_score(kept["evaluate"], place / ANSWERS),
        training=_training(kept["train"], place) if run.candidate.is_trained else None,
        forgetting=_domains(kept["forgetting"]) if "forgetting" in kept else None,
        spectrum=_spectrum(kept["spectra"]) if "spectra" in kept else None,
        notes=notes,
    )


def _score(path: Path, answers: Path) -> RunScore:
    lines = _answer_lines(answers)
    with reading(path):
        evaluation = json.loads(path.read_bytes())
        # Two files, written one after the other: a kill between them leaves answers of one evaluation beside the score
        # of another.
        if len(lines) != evaluation["count"]:
            raise DataError(
                f"{answers} has {len(lines)} answers of {evaluation['count']}; delete its folder to run it again"
            )
        return RunScore(
            name=evaluation["metric"].replace("_", " "),
            per_question=[line["score"] for line in lines],
            answers=[line["answer"] for line in lines],
            seconds=evaluation["seconds"],
        )


def _training(path: Path, place: Path) -> Training:
    from slimtune.storage.text_files import read_mapping

    with reading(path):
        results = json.loads(path.read_bytes())
        if results.get("interrupted"):
            raise TrainingError(f"stopped after {counted(results['steps'], 'step')}")
        settings = read_mapping(place / TUNED / RECIPE)["training"]
        gpu = results.get("peak_cuda_bytes")
        return Training(
            batch=settings["batch_size"] * settings["gradient_accumulation"],
            peak_bytes=gpu or results["peak_rss_bytes"],
            memory_of="gpu" if gpu else "process",
            size_bytes=sum(file.stat().st_size for file in (place / TUNED).glob("*.safetensors")),
            learning_rate=settings["learning_rate"],
            **{name: results[name] for name in ("steps", "tokens", "seconds", "trainable_parameters", "final_loss")},
        )


def _domains(path: Path) -> list[DomainLosses]:
    with reading(path):
        domains = json.loads(path.read_bytes())["domains"]
        return [DomainLosses(name=name, before=d["before"], after=d["after"]) for name, d in domains.items()]


def _spectrum(path: Path) -> RunSpectrum:
    with reading(path):
        spectra = json.loads(path.read_bytes())
        return RunSpectrum(
            intruders=spectra["intruders"], matrices=spectra["count"], effective_rank=spectra["effective_rank"]
        )


def questions_of(answers: Path) -> list[ShownQuestion]:
    """The questions, as they stand in a file of answers."""
    with reading(answers):
        return [
            ShownQuestion(text=_question_text(line["question"]), answer=line["expected"])
            for line in _answer_lines(answers)
        ]


def _answer_lines(path: Path) -> list[dict[str, Any]]:
    with reading(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _question_text(question: Any) -> str:
    """What a person would read of a question: the turns of a conversation without the system's."""
    if isinstance(question, str):
        return question
    if all(isinstance(part, dict) for part in question):
        return "\n".join(turn["content"] for turn in question if turn["role"] != "system")
    return "\n".join(map(str, question))
