"""The results of runs and of their stages, one JSON file each: everything on the page is computed from these."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from slimtune.errors import DataError, SlimtuneError, first_line
from slimtune.storage.atomic import write_file

RESULT = "result.json"


class _Strict(BaseModel):
    # Forbidden: what a later version adds means something, and would be lost where a file is written anew.
    model_config = ConfigDict(extra="forbid", frozen=True)


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
    """None where it was NaN or infinite."""


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

    # Earlier versions called it an arm.
    candidate: str = Field(validation_alias=AliasChoices("candidate", "arm"))
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
        write_file(path, self.model_dump_json(indent=1) + "\n")


class ShownQuestion(_Strict):
    """What was asked, and the answer that would have been right."""

    text: str
    answer: str


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        work: a partial of a function of `stages`; it is pickled to the process that calls it.
        is_needed: whether the run fails without it; else the page says that it is missing, and why.
    """

    name: str
    work: Callable[[], dict[str, Any]]
    is_needed: bool = True

    def kept(self, place: Path) -> Path:
        """Where its result is kept in the folder of the run, once it is done."""
        return place / f"{self.name}.json"


@contextmanager
def reading(path: Path, advice: str = "delete its folder, and the run is done again") -> Iterator[None]:
    """A block that reads a file and takes it apart. Raises: DataError, naming the file, for whatever is wrong with it.

    The file is anybody's: of what it may lack or hold instead there is no list, so that every failure is its damage.
    """
    try:
        yield
    except SlimtuneError:
        raise
    except Exception as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
        raise DataError(f"{path} is damaged ({problem}); {advice}") from error


def read_result(path: Path) -> Result:
    """The result of a run. Raises: DataError, for a file that is damaged or of another kind."""
    with reading(path, "delete it, and the run is done again"):
        return Result.model_validate_json(path.read_bytes())


def read_questions(path: Path) -> list[ShownQuestion]:
    """The questions of a comparison, one a line. Raises: DataError, with the number of a broken line."""
    questions = []
    with reading(path, "start with a new --output"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            with reading(Path(f"{path}, line {number}"), "start with a new --output"):
                questions.append(ShownQuestion.model_validate_json(line))
    return questions


def write_questions(path: Path, questions: Sequence[ShownQuestion]) -> None:
    """One a line."""
    lines = (json.dumps(question.model_dump(), ensure_ascii=False) + "\n" for question in questions)
    write_file(path, "".join(lines))
