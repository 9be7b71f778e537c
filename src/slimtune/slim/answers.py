"""Imitation of written answers (sequence-level distillation, Kim and Rush 2016, arXiv:1606.07947).

A teacher answers the prompts of the data, and the student learns those answers as any others. Teacher and student need
no tokenizer in common.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.console.progress import Counting
from slimtune.data.chat_template import render
from slimtune.data.rows import Document
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.causal_lm import Conversations
from slimtune.data.tasks.registry import read
from slimtune.errors import DataError, counted
from slimtune.evaluate.answers import AnswerFile, weights_of
from slimtune.evaluate.generation import Reply, generate_replies
from slimtune.models.load import LoadOptions, load_model
from slimtune.storage.atomic import write_file
from slimtune.storage.source import folder_of

if TYPE_CHECKING:
    from rich.console import Console


def write_answers(
    teacher: str, data: DataSettings, path: Path, screen: Console, max_new_tokens: int = 128,
    options: LoadOptions | None = None, batch_size: int = 16,
) -> Path:  # fmt: skip
    """Write the teacher's greedy answers to the prompts of the data, a conversation a line; the file.

    A run that was broken off goes on behind its last batch (`FILE.part`). Answers that weren't at their end after
    `max_new_tokens` are left out, and counted on the screen.

    Raises:
        DataError: the data has no prompts, or no answer came to its end.
    """
    rows = read(data, "text")
    assert isinstance(rows, Conversations)
    asked = [row for source in rows.splits.train for row in source.rows]
    if any(isinstance(row, Document) for row in asked):
        raise DataError("plain texts have no prompts that a teacher could answer; pass conversations or pairs")
    model, tokenizer = load_model(teacher, "text", options or LoadOptions(computes="batches"))
    turns = [_before_last_answer(row.turns()) for row in asked]
    tools = [getattr(row, "tools", None) for row in asked]
    prompts = [render(tokenizer, t, for_answer=True, tools=own) for t, own in zip(turns, tools, strict=True)]
    file = AnswerFile(path, {"teacher": weights_of(folder_of(teacher))}, overwrite=True)
    known = file.begin(prompts, max_new_tokens)
    replies = known | _generate(model, tokenizer, prompts, known, file, screen, max_new_tokens, batch_size)
    lines = []
    for number, (before, own) in enumerate(zip(turns, tools, strict=True)):
        if replies[number].ended and replies[number].text:
            answered = {"messages": [*before, {"role": "assistant", "content": replies[number].text}]}
            lines.append(json.dumps(answered | ({"tools": own} if own else {}), ensure_ascii=False))
    if not lines:
        raise DataError(
            f"none of the {len(turns)} answers of {teacher} came to an end within {max_new_tokens} tokens; let it "
            "write more (--max-new-tokens), or choose a teacher that was tuned to answer"
        )
    write_file(path, "".join(f"{line}\n" for line in lines))
    file.part.unlink(missing_ok=True)
    cut = len(turns) - len(lines)
    left_out = (
        f"; {cut:,} that were empty or not at their end after {max_new_tokens} tokens are left out" if cut else ""
    )
    screen.print(f"teacher: {counted(len(lines), 'answer')} in {path}{left_out}", markup=False)
    return path


def _generate(
    model: Any, tokenizer: Any, prompts: list[str], known: dict[int, Reply], file: AnswerFile, screen: Console,
    max_new_tokens: int, batch_size: int,
) -> dict[int, Reply]:  # fmt: skip
    missing = [number for number in range(len(prompts)) if number not in known]
    if not missing:
        return {}
    with Counting(screen) as counting:
        counting.start("asking the teacher, prompts", len(prompts), len(known))

        def keep(batch: dict[int, Reply]) -> None:
            file.add({missing[index]: reply for index, reply in batch.items()})
            counting.advance(len(batch))

        asked = [prompts[number] for number in missing]
        replies = generate_replies(model, tokenizer, asked, max_new_tokens, 0.0, batch_size, keep)
    return dict(zip(missing, replies, strict=True))


def _before_last_answer(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns that the last answer follows. Raises: DataError, where there are none."""
    last = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    if not turns[:last]:
        raise DataError("a conversation begins with its only answer, so that there is nothing to ask; remove it")
    return turns[:last]


def answers_beside(output: Path) -> Path:
    """The file beside an output folder that a teacher's answers go to."""
    return output.with_name(f"{output.name}.answers.jsonl")
