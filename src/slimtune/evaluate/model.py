"""A model by name as evaluations load it, and its answers to prepared questions, whatever head it has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.models.load import LoadOptions, load_model

if TYPE_CHECKING:
    from slimtune.console.progress import Counting
    from slimtune.evaluate.answers import AnswerFile
    from slimtune.evaluate.result import Evaluation
    from slimtune.evaluate.run import PreparedTask


@dataclass(frozen=True)
class EvaluatedModel:
    """A model by name, and how it is loaded.

    Attributes:
        name: a folder, a Hub id or a packaged name.
    """

    name: str
    options: LoadOptions

    def load(self) -> tuple[Any, Any]:
        """A model that writes text, and its tokenizer."""
        return load_model(self.name, "text", self.options)

    def answer_file(self, path: Path, overwrite: bool) -> AnswerFile:
        """The file of answers; the model and its options tell whether a killed evaluation can be resumed from it."""
        from slimtune.evaluate.answers import AnswerFile, weights_of

        options = asdict(self.options)
        # Answers of earlier versions, which knew no such option, are gone on from where nothing else has changed.
        if options["computes"] is None:
            del options["computes"]
        return AnswerFile(path, {"model": weights_of(self.name), "options": options}, overwrite)

    def evaluate(self, prepared: PreparedTask, counting: Counting, file: AnswerFile | None = None) -> Evaluation:
        """Score the labels of a classifier, or the text that any other model generates. Raises: SlimtuneError."""
        from slimtune.evaluate.labelling import evaluate_classifier, is_classifier
        from slimtune.evaluate.run import evaluate

        if is_classifier(self.name):
            return evaluate_classifier(self.name, prepared, self.options, file, counting.watch)
        model, tokenizer = self.load()
        counting.start("asking questions", len(prepared.questions))
        return evaluate(model, tokenizer, prepared, counting.reach, file)
