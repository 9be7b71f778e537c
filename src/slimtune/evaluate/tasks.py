"""Questions with the answers that are expected, read from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slimtune.data.chat_template import Message, assistant_spans, has_template, render
from slimtune.data.reading import read_labelled, read_rows, task_of
from slimtune.data.rows import Document, Labelled, Pair, Row, Text
from slimtune.data.settings import Source
from slimtune.errors import ConfigError, DataError, did_you_mean, require

MADE = "reasoning-gym:"
"""In front of the names of tasks that are made, not read."""
BETWEEN_SHOTS = "\n\n"
"""What separates examples in a text for models without a chat template."""


@dataclass(frozen=True)
class Question:
    """What is asked, and the one answer that is expected.

    Attributes:
        turns: the conversation up to the answer.
        expected: the answer.
        plain: the question as text, for models without a chat template.
        gap: what stands between that text and the answer.
        text: what a classifier is shown, where the task has labels.
        tools: what the model may call, shown to it by the template.
        entry: the row that a task brought along for its own scorer.
    """

    turns: list[Message]
    expected: str
    plain: str
    gap: str = ""
    text: Text | None = None
    tools: list[Any] | None = None
    entry: Any = None

    @property
    def user_text(self) -> str:
        """The question without a system message, by which two of them are known as the same."""
        return "\n".join(turn["content"] for turn in self.turns if turn["role"] != "system").strip()


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes:
        source: where they come from.
        labels: the answers among which one is right, if the task is to choose.
        instruction: what is said in front of all questions, in place of their own system messages; empty for nothing.
    """

    source: str
    questions: list[Question]
    labels: list[str] = field(default_factory=list)
    instruction: str = ""


def read_task(path: str | Path, instruction: str = "", fields: Mapping[str, str] | None = None) -> Task:
    """The questions of a file: conversations, prompts with completions, or texts with labels; raises DataError.

    For texts with labels, the instruction lists the labels unless another one is given.

    Args:
        fields: names of columns, and what they are called in the file.
    """
    source = Source(str(path), fields=fields or {})
    if task_of(source) == "classification":
        return _labelled(str(path), read_labelled(source), instruction)
    rows = [(row, f"{path}, example {number}") for number, row in enumerate(read_rows(source), 1)]
    return task_of_rows(rows, str(path), instruction)


def task_of_rows(rows: Sequence[tuple[Row, str]], source: str, instruction: str = "") -> Task:
    """The questions of rows, each with where it stands; raises DataError."""
    return Task(source, [_question(row, where) for row, where in rows], instruction=instruction)


def open_task(
    source: str,
    instruction: str = "",
    size: int | None = None,
    seed: int = 0,
    fields: Mapping[str, str] | None = None,
) -> Task:
    """The questions of a file, or `size` questions (100 unless told) of `reasoning-gym:NAME`, made by seed."""
    if source.startswith(MADE):
        if fields:
            raise ConfigError(f"--field would change nothing for {source}, whose questions are made; leave it out")
        return make_task(source.removeprefix(MADE), size or 100, seed, instruction)
    return read_task(source, instruction, fields)


def conversation(question: Question, shots: Sequence[Question] = (), instruction: str = "") -> list[Message]:
    """The turns of a question behind answered examples, which keep no system message of their own."""
    own = [turn for turn in question.turns if turn["role"] == "system"]
    # One system message at most: templates that know it expect it first, and several raise for a second one.
    opening = [{"role": "system", "content": instruction}] if instruction else own
    answered = [turn for shot in shots for turn in [*_spoken(shot), {"role": "assistant", "content": shot.expected}]]
    return [*opening, *answered, *_spoken(question)]


def prompt(tokenizer: Any, question: Question, shots: Sequence[Question] = (), instruction: str = "") -> str:
    """What the model is shown: former turns of the chat, or text with blank lines between the examples.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    if has_template(tokenizer):
        return render(tokenizer, _turns(tokenizer, question, shots, instruction), True, question.tools)
    former = "".join(f"{shot.plain}{shot.gap}{shot.expected}{BETWEEN_SHOTS}" for shot in shots)
    # Without `gap` behind it: " label" is one token with its blank, and a prompt that ends in a blank splits it
    # otherwise.
    return (f"{instruction}{BETWEEN_SHOTS}" if instruction else "") + former + question.plain


def answered(
    tokenizer: Any, question: Question, shots: Sequence[Question], instruction: str, answer: str
) -> tuple[str, int]:
    """The prompt with an answer and its end of turn, and where in this text the answer begins; raises DataError."""
    if not has_template(tokenizer):
        shown = prompt(tokenizer, question, shots, instruction)
        return f"{shown}{question.gap}{answer}", len(shown)
    opening = _turns(tokenizer, question, shots, instruction)
    turns = [*opening, {"role": "assistant", "content": answer}]
    is_last = [turn is turns[-1] for turn in turns]
    # The span by the template itself: behind `end` some templates write a line break that no model has to say.
    whole, ((begin, end),) = assistant_spans(tokenizer, turns, is_last, question.tools)
    return whole[:end], begin


def _turns(tokenizer: Any, question: Question, shots: Sequence[Question], instruction: str) -> list[Message]:
    """The conversation, its system message in the first turn where the template takes none."""
    turns = conversation(question, shots, instruction)
    if turns[0]["role"] != "system" or _takes_system(tokenizer):
        return turns
    # Gemma 2's template raises for a system turn; in front of the user's text the model still reads it.
    first = {"role": turns[1]["role"], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return [first, *turns[2:]]


def _takes_system(tokenizer: Any) -> bool:
    """Whether the chat template knows system messages; some refuse them."""
    try:
        # By trying: templates are programs, and whether one mentions "system" says nothing of what it does with it.
        render(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    except DataError:
        return False
    return True


def _spoken(question: Question) -> list[Message]:
    return [turn for turn in question.turns if turn["role"] != "system"]


def _question(row: Row, where: str) -> Question:
    if isinstance(row, Document):
        raise DataError(f"{where} is a text without a question; give messages, or prompt and completion")
    turns = row.turns()
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise DataError(f"{where} has no expected answer; end it with an assistant turn that says something")
    *turns_before, answer = turns
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in turns_before):
        raise DataError(f"{where} asks nothing: no user turn with text stands before the answer; add the question")
    if isinstance(row, Pair):
        return Question(turns_before, answer["content"], plain=row.plain()[0])
    text = "\n".join(turn["content"] for turn in turns_before) + "\n"
    return Question(turns_before, answer["content"], text, tools=row.tools)


def _labelled(source: str, rows: list[Labelled], instruction: str) -> Task:
    labels = sorted({row.label for row in rows})
    questions = []
    for row in rows:
        shown = row.text if row.text_pair is None else f"{row.text}\n\n{row.text_pair}"
        turns = [{"role": "user", "content": shown}]
        questions.append(Question(turns, row.label, f"Text: {shown}\nLabel:", " ", row.texts))
    return with_labels(Task(source, questions, labels, instruction), labels)


def with_labels(task: Task, labels: Sequence[str]) -> Task:
    """The task with these labels to choose from, named in its instruction unless it has another one."""
    own = _label_instruction(task.labels)
    # An instruction of the user's is left alone, even where it lists other labels.
    instruction = _label_instruction(labels) if task.instruction in ("", own) else task.instruction
    return replace(task, labels=list(labels), instruction=instruction)


def _label_instruction(labels: Sequence[str]) -> str:
    return f"Answer with one of these labels and nothing else: {', '.join(labels)}."


def make_task(name: str, size: int, seed: int, instruction: str = "") -> Task:
    """`size` questions of a task by name, the same for the same seed; raises ConfigError for an unknown name."""
    gym = _gym()
    # The registry that `create_dataset` itself looks into.
    known = list(gym.factory.DATASETS)
    if name not in known:
        raise ConfigError(f"reasoning-gym has no task '{name}'{did_you_mean(name, known) or f'; it has {known}'}")
    entries = gym.create_dataset(name, size=size, seed=seed)
    questions = [
        Question(
            [{"role": "user", "content": entry["question"]}],
            str(entry["answer"]),
            f"{entry['question']}\n",
            entry=entry,
        )
        for entry in entries
    ]
    return Task(MADE + name, questions, instruction=instruction)


def score_entry(answer: str, question: Question) -> float:
    """The score that the task itself gives, from 0 to 1; raises ConfigError for a question of another origin."""
    if question.entry is None:
        raise ConfigError(f"the scorer 'reasoning_gym' is for tasks called {MADE}NAME; choose another scorer")
    return float(_gym().get_score_answer_fn(question.entry["metadata"]["source_dataset"])(answer, question.entry))


def _gym() -> Any:
    require("reasoning-gym", extra="reasoning", purpose="a task of reasoning-gym")
    import reasoning_gym

    return reasoning_gym
