"""The commands that make up a run, each kept as a file once it is done, and what of their answers is the result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.compare.results import RESULT, Domain, Question, Result, Score, Spectrum, Training
from slimtune.compare.task import RECIPE, TUNED, Task, model_of
from slimtune.errors import DataError, TrainingError
from slimtune.recipe.candidates import Run
from slimtune.storage.hub import at_revision

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    Attributes:
        is_needed: whether the run fails without it; else the page says that it is missing, and why.
    """

    arguments: list[str]
    is_needed: bool = True

    @property
    def name(self) -> str:
        """Of the command."""
        return self.arguments[0]

    def kept(self, place: Path) -> Path:
        """Where its answer is kept in the folder of the run, once it is done."""
        return place / f"{self.name}.json"

    def read(self, place: Path) -> dict[str, Any]:
        """The answer. Raises: DataError, for one that is damaged."""
        path = self.kept(place)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is damaged; delete its folder, and the run is done again") from error


def stages_of(task: Task, run: Run) -> list[Stage]:
    """The commands of a run in their order."""
    place = task.place(run)
    loading = _loading(task, run)
    if not run.arm.is_trained:
        model = task.recipe["model"]
        return [_evaluation(task, run, at_revision(model["name"], model.get("revision")), loading)]
    tuned = str(place / TUNED)
    settings = task.settings
    stages = [
        Stage(["train", str(place / RECIPE), _how_to_begin(place), "--json"]),
        _evaluation(task, run, tuned, loading),
    ]
    if task.has_language_loss and settings.texts != 0:
        texts = [] if settings.texts is None else ["--texts", str(settings.texts)]
        stages.append(Stage(["forgetting", tuned, *texts, "--worst", "0", *loading, "--json"], is_needed=False))
    if settings.spectra == "all" or (settings.spectra == "first" and run.seed == 0):
        stages.append(Stage(["spectra", tuned, *loading, "--json"], is_needed=False))
    return stages


def _how_to_begin(place: Path) -> str:
    """Where a kill left a checkpoint it goes on to the same bits; a training that failed begins anew."""
    from slimtune.train.checkpointing import last_whole
    from slimtune.train.run_folder import folder_of

    broken_off = folder_of(place / TUNED)
    can_go_on = not (place / RESULT).is_file() and broken_off.is_dir() and last_whole(broken_off) is not None
    return "--resume" if can_go_on else "--overwrite"


def _evaluation(task: Task, run: Run, model: str, loading: list[str]) -> Stage:
    place, settings = task.place(run), task.settings
    arguments = ["evaluate", model, str(task.questions), "--answers", str(place / ANSWERS), "--overwrite", *loading]
    arguments += ["--scorer", settings.scorer]
    if settings.max_new_tokens is not None:
        arguments += ["--max-new-tokens", str(settings.max_new_tokens)]
    arm = run.arm
    if arm.shots:
        arguments += ["--shots", str(arm.shots), "--examples", str(task.train), "--seed", str(run.seed)]
        arguments += ["--random-labels"] if arm.random_labels else []
    return Stage([*arguments, "--json"])


def result_of(task: Task, run: Run, found: dict[str, dict[str, Any]], notes: list[str]) -> Result:
    """What the commands of a run came to."""
    place = task.place(run)
    return Result(
        arm=run.arm.name,
        seed=run.seed,
        status="done",
        score=_score(found["evaluate"], place / ANSWERS),
        training=_training(found["train"], place) if run.arm.is_trained else None,
        forgetting=_domains(found.get("forgetting")),
        spectrum=_spectrum(found.get("spectra")),
        notes=notes,
    )


def questions_of(answers: Path) -> list[Question]:
    """What was asked, as it stands in a file of answers."""
    return [Question(text=_asked(line["question"]), answer=line["expected"]) for line in _lines(answers)]


def _score(found: dict[str, Any], answers: Path) -> Score:
    lines = _lines(answers)
    if len(lines) != found["count"]:
        raise DataError(f"{answers} has {len(lines)} answers of {found['count']}; delete its folder to run it again")
    return Score(
        name=found["metric"].replace("_", " "),
        per_question=[line["score"] for line in lines],
        answers=[line["answer"] for line in lines],
        seconds=found["seconds"],
    )


def _training(found: dict[str, Any], place: Path) -> Training:
    from slimtune.storage.text_files import read_mapping

    settings = read_mapping(place / TUNED / RECIPE)["training"]
    if found.get("interrupted"):
        raise TrainingError(f"stopped after {found['steps']} steps")
    gpu = found.get("peak_cuda_bytes")
    return Training(
        steps=found["steps"],
        batch=settings["batch_size"] * settings["gradient_accumulation"],
        tokens=found["tokens"],
        seconds=found["seconds"],
        peak_bytes=gpu or found["peak_rss_bytes"],
        memory_of="gpu" if gpu else "process",
        trainable_parameters=found["trainable_parameters"],
        size_bytes=sum(path.stat().st_size for path in (place / TUNED).glob("*.safetensors")),
        learning_rate=settings["learning_rate"],
        final_loss=found["final_loss"],
    )


def _domains(found: dict[str, Any] | None) -> list[Domain] | None:
    if found is None:
        return None
    return [Domain(name=name, before=d["before"], after=d["after"]) for name, d in found["domains"].items()]


def _spectrum(found: dict[str, Any] | None) -> Spectrum | None:
    if found is None:
        return None
    return Spectrum(intruders=found["intruders"], matrices=found["count"], effective_rank=found["effective_rank"])


def _loading(task: Task, run: Run) -> list[str]:
    """How the model is loaded, as options: as it was while it was tuned."""
    model = model_of(task, run.arm)
    options = [[f"--{name}", str(model[name])] for name in ("dtype", "device", "quantize") if model.get(name)]
    trusted = ["--trust-remote-code"] if model.get("trust_remote_code") else []
    return [word for option in options for word in option] + trusted


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise DataError(f"{path} is damaged; delete its folder, and the run is done again") from error


def _asked(question: Any) -> str:
    """What a person would read of a question: the turns of a conversation without the system's."""
    if isinstance(question, str):
        return question
    if all(isinstance(part, dict) for part in question):
        return "\n".join(turn["content"] for turn in question if turn["role"] != "system")
    return "\n".join(map(str, question))
