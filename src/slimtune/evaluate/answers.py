"""The answers of an evaluation on disk: one line a question, and on the way there, what a killed run had reached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimtune.errors import OutputExistsError
from slimtune.evaluate.generation import Reply
from slimtune.evaluate.result import Answer
from slimtune.storage.atomic import staged_file


class AnswerFile:
    """A file of answers, there as a whole or not at all; beside it grows `FILE.part`, from which a new run goes on.

    Raises:
        OutputExistsError: the file is there already.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], overwrite: bool = False) -> None:
        """`about` is all that the answers follow from besides the prompts, such as the model."""
        if path.is_dir() or (path.exists() and not overwrite):
            what = "a folder" if path.is_dir() else "there already"
            raise OutputExistsError(f"the answers' file {path} is {what}; choose another name, or pass --overwrite")
        self.path, self.part, self.about = path, path.with_name(f"{path.name}.part"), about

    def begin(self, prompts: Sequence[str], max_new_tokens: int) -> dict[int, Reply]:
        """What a killed run of the same prompts has answered already, by the number of the question."""
        # The whole prompts, shots and template included: a changed template must not go on with old answers.
        facts = json.dumps([self.about, max_new_tokens, list(prompts)], sort_keys=True, default=str)
        key = hashlib.sha256(facts.encode()).hexdigest()
        known = _read(self.part, key)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew: a line that was cut short must not stay in the middle.
        self.part.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
        self.add(known)
        return known

    def add(self, replies: Mapping[int, Reply]) -> None:
        """Keep the answers of a batch."""
        # Appended and not synced: a power cut costs a batch of answers at most, and the next run asks them again.
        lines = [json.dumps([number, *reply]) for number, reply in replies.items()]
        with self.part.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def finish(self, answers: Sequence[Answer]) -> None:
        """Write the file, with all scores, in the order of the questions."""
        with staged_file(self.path) as scratch:
            lines = [json.dumps(answer.to_dict(), ensure_ascii=False) for answer in answers]
            scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.part.unlink(missing_ok=True)


def _read(part: Path, key: str) -> dict[int, Reply]:
    """The answers of a run that broke off, none if it was another one's."""
    if not part.is_file():
        return {}
    first, *lines = part.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        if json.loads(first) != {"key": key}:
            return {}
        # The last line is empty, or was cut short when the run was killed.
        rows = [json.loads(line) for line in lines[:-1]]
        return {int(number): Reply(str(text), bool(ended)) for number, text, ended in rows}
    except (ValueError, TypeError):
        return {}


def weights_of(source: str) -> list[Any]:
    """What tells a model from another one of the same name: its files' names, sizes and times."""
    folder = Path(source)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        source,
        # Sizes and times, not hashes: reading 16 GB to begin an evaluation would take longer than many evaluations.
        *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.suffix in (".safetensors", ".json")),
    ]
