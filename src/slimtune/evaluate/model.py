"""A model by name as evaluations load it, and its answers to prepared questions, whatever head it has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimtune.console.progress import Counting
    from slimtune.evaluate.answers import AnswerFile
    from slimtune.evaluate.result import Evaluation
    from slimtune.evaluate.run import Prepared


@dataclass(frozen=True)
class EvaluatedModel:
    """A model by name, and how it is loaded.

    Attributes:
        name: a folder, a Hub id or a packaged name.
        options: dtype, device and trust_remote_code, as `slimtune.load` takes them.
    """

    name: str
    quantize: str | None = None
    options: tuple[str, str, bool] = ("auto", "auto", False)

    def load(self) -> tuple[Any, Any]:
        """A model that writes text, and its tokenizer."""
        from slimtune.models.load import LoadOptions, load_model

        return load_model(self.name, "text", LoadOptions(*self.options, quantize=self.quantize))

    def answer_file(self, path: Path, overwrite: bool) -> AnswerFile:
        """The file of answers, with what they follow from, by which those of a killed evaluation are known again."""
        from slimtune.evaluate.answers import AnswerFile, weights_of

        about = {"model": weights_of(self.name), "quantize": self.quantize, "options": self.options}
        return AnswerFile(path, about, overwrite)

    def evaluate(self, prepared: Prepared, counting: Counting, file: AnswerFile | None = None) -> Evaluation:
        """Ask the questions: of a classifier its labels, of any other model its text. Raises: SlimtuneError."""
        from slimtune.evaluate.labelling import evaluate_classifier, is_classifier
        from slimtune.evaluate.run import evaluate

        if is_classifier(self.name):
            return evaluate_classifier(self.name, prepared, self.quantize, self.options, file, counting.watch)
        model, tokenizer = self.load()
        counting.start("asking questions", len(prepared.questions))
        return evaluate(model, tokenizer, prepared, counting.reach, file)
