"""What a run came to, one JSON file each: all that the page tells is computed from these."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slimtune.errors import DataError
from slimtune.storage.atomic import staged_file

RESULT = "result.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class RunScore(_Strict):
    """How the answers to the questions were judged."""

    name: str
    """Of the scorer, as `slimtune evaluate` names it."""
    per_question: list[float] = Field(min_length=1)
    answers: list[str]
    seconds: float = Field(ge=0)
    """Of answering, loading not counted."""
    higher_is_better: bool = True

    @model_validator(mode="after")
    def _one_answer_each(self) -> RunScore:
        if len(self.answers) != len(self.per_question):
            raise ValueError(f"{len(self.answers)} answers to {len(self.per_question)} scored questions")
        return self

    @property
    def mean(self) -> float:
        """Over the questions."""
        return sum(self.per_question) / len(self.per_question)


class Training(_Strict):
    """What the training took."""

    steps: int
    batch: int
    """Examples a step."""
    tokens: int
    seconds: float = Field(ge=0)
    peak_bytes: int
    """Of the process or, where there is one, of the GPU; see `memory_of`."""
    memory_of: Literal["process", "gpu"] = "process"
    trainable_parameters: int
    size_bytes: int
    """Of the weights that are written."""
    learning_rate: float
    final_loss: float | None
    """None where it was no number."""


class DomainLosses(_Strict):
    """Loss per token on text outside of the task, before and after."""

    name: str
    before: float
    after: float

    @property
    def rise(self) -> float:
        """In nats per token; above 0 is forgetting."""
        return self.after - self.before


class RunSpectrum(_Strict):
    """What the singular vectors of the updated weights say (Shuttleworth et al. 2024)."""

    intruders: int
    """Directions among the leading ones of the tuned weights that none of the base's resemble, in all matrices."""
    matrices: int
    effective_rank: float | None = None

    @property
    def intruders_per_matrix(self) -> float:
        """Comparable between methods that change different numbers of matrices."""
        return self.intruders / self.matrices


class Result(_Strict):
    """One run: done with a score, or failed with a reason."""

    candidate: str = Field(validation_alias="arm", serialization_alias="arm")
    seed: int
    status: Literal["done", "failed"]
    reason: str = ""
    score: RunScore | None = None
    training: Training | None = None
    forgetting: list[DomainLosses] | None = None
    spectrum: RunSpectrum | None = None
    notes: list[str] = []
    """What is missing and why, in sentences."""

    @model_validator(mode="after")
    def _fits_its_status(self) -> Result:
        if (self.status == "done") != (self.score is not None) or (self.status == "failed") != bool(self.reason):
            raise ValueError("a run is done with a score, or failed with a reason")
        return self

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        with staged_file(path) as scratch:
            scratch.write_text(self.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")


class ShownQuestion(_Strict):
    """What was asked, and the answer that would have been right."""

    text: str
    answer: str


def read_result(path: Path) -> Result:
    """Raises: DataError, for a file that is damaged or of another kind."""
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "not UTF-8"
        raise DataError(f"{path} is no result of a run ({what}); delete it, and the run is done again") from error


def read_questions(path: Path) -> list[ShownQuestion]:
    """The questions of a comparison, one a line; raises DataError with the number of a broken line."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            questions.append(ShownQuestion.model_validate_json(line))
        except ValidationError as error:
            raise DataError(f"{path}, line {number}: {error.errors()[0]['msg']}; start with a new --output") from error
    return questions


def write_questions(path: Path, questions: Sequence[ShownQuestion]) -> None:
    """One a line."""
    with staged_file(path) as scratch:
        lines = (json.dumps(question.model_dump(), ensure_ascii=False) + "\n" for question in questions)
        scratch.write_text("".join(lines), encoding="utf-8")
