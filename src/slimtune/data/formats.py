"""The formats in which people write training data: which columns each has, and how one of its rows is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from slimtune.data.rows import (
    ONLY_TEXT,
    Conversation,
    Document,
    Instruction,
    Judged,
    Labelled,
    Pair,
    Preference,
    Prompt,
    Tagged,
    Turn,
    checked,
)
from slimtune.errors import ConfigError, DataError, did_you_mean, listing

Value = dict[str, Any]

MEDIA: dict[str, str] = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), ONLY_TEXT)
WEIGHTS: dict[str, str] = dict.fromkeys(
    ("weight", "sample_weight", "train"), "every row counts the same; drop the rows instead"
)
"""Columns that would weight a row or leave it out."""
MASKS: dict[str, str] = dict.fromkeys(
    ("train_on_input", "train_on_inputs", "train_on_prompt", "train_on_eos", "roles_to_train", "mask_history"),
    "the answers are learned, whole; mark turns with weight 0 to leave them out",
)
ANSWERS: dict[str, str] = {
    **dict.fromkeys(("label", "kto_tag"), "good and bad answers would both be learned; choose task=kto"),
    **dict.fromkeys(("functions", "chat_template_kwargs", "documents"), "the chat template would need it"),
    **MASKS,
}
"""Columns beside an answer that would change what is learned of it."""
PROMPTS: dict[str, str] = dict.fromkeys(
    ("instruction", "input", "context", "question", "query", "history", "system", "tools"),
    "it would be part of the prompt; write it into the prompt",
)
"""Columns beside a prompt that is a text of its own."""


@dataclass(frozen=True)
class Format:
    """One way to write a row.

    Attributes:
        columns: what a row must have; each tuple of them is one way to write it.
        read: makes a row of its columns, or raises DataError with where it stands.
        task: what a model learns from such rows where no task is given.
        optional: other columns that are read.
        refused: columns that would change what is learned and aren't read, each with what to do.
        has_free_columns: whether all other columns are read, too, as a reward reads them.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Value, str], Any]
    task: str
    optional: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=lambda: MEDIA | WEIGHTS)
    has_free_columns: bool = False

    def fits(self, value: Mapping[str, Any]) -> bool:
        """Whether a row has the columns."""
        return any(set(columns) <= value.keys() for columns in self.columns)

    def uses(self, column: str) -> bool:
        """Whether a column is read."""
        return self.has_free_columns or self.owns(column)

    def owns(self, column: str) -> bool:
        """Whether a column is one of the format's own."""
        return column in self.optional or any(column in columns for columns in self.columns)

    @property
    def needs(self) -> str:
        """The columns, for error messages."""
        return ", or ".join(" and ".join(columns) for columns in self.columns)


def formats_of(task: str) -> list[Format]:
    """The formats that a task takes, the more demanding first; raises ConfigError for an unknown task."""
    if task == "auto":
        # Every row with a prompt or with messages fits it, whatever else it has; it is meant only where the task says
        # so.
        return [known for known in FORMATS.values() if known.name != "prompt-only"]
    if task not in TASKS:
        raise ConfigError(f"no task '{task}'; there are auto, {', '.join(TASKS)}{did_you_mean(task, TASKS)}")
    return [FORMATS[name] for name in TASKS[task]]


def find_format(name: str, task: str = "auto") -> Format:
    """The format of that name; raises ConfigError if there is none, or if the task can't take it."""
    if name not in FORMATS:
        raise ConfigError(f"no format '{name}'; there are auto, {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}")
    if task != "auto" and name not in TASKS[task]:
        raise ConfigError(f"task {task} can't learn from format {name}; it takes {', '.join(TASKS[task])}")
    return FORMATS[name]


def read_as(known: Format, value: Value, where: str) -> Any:
    """A row of this format; raises DataError with where it stands and the field at fault."""
    if not known.fits(value):
        fields = f"has the fields {listing(value)}" if value else "has no fields"
        raise DataError(f"{where} {fields}, but format {known.name} needs {known.needs}; correct the row")
    # Refused and not ignored: a column such as `weight` would change what is learned, and nobody would notice that it
    # didn't.
    for column, advice in known.refused.items():
        if column in value and not known.owns(column) and not _is_neutral(column, value[column]):
            raise DataError(
                f"{where} has a column {column}, which format {known.name} doesn't read and which would change what "
                f"is learned: {advice}, or remove the column"
            )
    try:
        return known.read(value, where)
    except DataError as error:
        # Some readers know the place more closely, such as the turn; it is named once.
        raise error if where in str(error) else DataError(f"{where}: {error}") from error


def _is_neutral(column: str, content: Any) -> bool:
    """Whether a column's content asks for nothing beyond what is done anyway."""
    if column in WEIGHTS:
        return content in (None, 1, "train")
    # Even False: in a row of one judged answer it means that the answer is a bad one.
    if column in ("label", "kto_tag"):
        return content is None
    return content in (None, False, "", [], {}, ["assistant"], ["gpt", "assistant"])


def _conversation(value: Value, where: str, column: str = "messages") -> Conversation:
    row = _all_turns(value, where, column)
    roles = [turn.role for turn in row.messages]
    for number, (before, role) in enumerate(zip(["none", *roles], roles, strict=False), 1):
        # Several results may follow one turn with several calls.
        if role == "tool" and before not in ("assistant", "tool"):
            raise DataError(f"{where}: turn {number} is a tool's, but no assistant turn that calls it stands before it")
    if "assistant" not in roles:
        raise DataError(f"{where} has no assistant turn, so nothing would be learned from it; add the answer")
    if "user" not in roles and roles[0] == "assistant":
        raise DataError(
            f"{where}: the conversation begins with the assistant, and nobody else speaks; add the question"
        )
    for number, (turn, is_learned) in enumerate(zip(row.messages, row.learned(), strict=True), 1):
        if is_learned and turn.is_empty:
            raise DataError(
                f"{where}: turn {number} is empty where an answer is expected, so only its end would be learned; write "
                "the answer, or give the turn weight 0"
            )
    if not any(row.learned()):
        marks = "weight 0, or are marked as not trained"
        raise DataError(f"{where}: all assistant turns have {marks}, so nothing would be learned; drop the row")
    return row


def _all_turns(value: Value, where: str, column: str) -> Conversation:
    """The turns of a column behind the row's own system message, with its tools."""
    row = checked(Conversation, {"messages": value[column], "tools": value.get("tools")}, where)
    return row.model_copy(update={"messages": _with_system(row.messages, value, where)})


def _with_system(turns: list[Turn], value: Value, where: str) -> list[Turn]:
    """Turns behind the system message that a row has as a column, if it has one."""
    if not value.get("system"):
        return turns
    opening = checked(Turn, {"role": "system", "content": value["system"]}, f"{where}, column system")
    if turns[0].role != "system":
        return [opening, *turns]
    # Some data sets have the message twice, in a column and as the first turn; templates would write it twice as well.
    if turns[0].content != opening.content:
        raise DataError(f"{where} has two system messages that differ, one as a column and one as a turn; keep one")
    return turns


def _share_gpt(value: Value, where: str) -> Conversation:
    turns = value["conversations"]
    if not isinstance(turns, list) and not (isinstance(turns, str) and turns.lstrip().startswith("[")):
        raise DataError(f"{where}: conversations is a {type(turns).__name__}, not a list of turns; correct the row")
    return _conversation(value, where, "conversations")


# The wording of Taori et al. 2023 (Stanford Alpaca), for models without a chat template.
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)


def _alpaca(value: Value, where: str) -> Instruction | Conversation:
    pair = checked(Pair, {"prompt": value["instruction"], "completion": value["output"]}, where)
    context, system = value.get("input") or "", value.get("system") or ""
    prompt = f"{pair.prompt}\n\n{context}" if context else pair.prompt
    if value.get("history"):
        return _with_history(value["history"], system, pair.model_copy(update={"prompt": prompt}), where)
    about = f"\n\n### Input:\n{context}" if context else ""
    opening = ALPACA.format(", paired with an input that provides further context" if context else "")
    opening += f"{system}\n\n" if system else ""
    plain = f"{opening}### Instruction:\n{pair.prompt}{about}\n\n### Response:\n"
    fields = {"prompt": prompt, "completion": pair.completion, "plain_prompt": plain, "system": system}
    return checked(Instruction, fields, where)


def _with_history(history: Any, system: str, pair: Pair, where: str) -> Conversation:
    """Earlier questions and answers in front of a pair; as in LLaMA-Factory these answers are learned, too."""
    if not isinstance(history, list) or not all(isinstance(said, list) and len(said) == 2 for said in history):
        raise DataError(f"{where}: history must be a list of pairs of question and answer; correct the row")
    turns = [
        {"role": role, "content": text}
        for said in history
        for role, text in zip(("user", "assistant"), said, strict=True)
    ]
    return _conversation({"messages": [*turns, *pair.turns()], "system": system}, where)


def _pair(value: Value, where: str) -> Pair | Conversation:
    if not (isinstance(value["prompt"], list) and isinstance(value["completion"], list)):
        pair, system = checked(Pair, value, where), value.get("system") or ""
        if not system:
            return pair
        plain = f"{system}\n\n{pair.prompt}"
        return checked(Instruction, pair.model_dump() | {"plain_prompt": plain, "system": system}, where)
    # Of a conversation in two parts the second is learned.
    shown = checked(Conversation, {"messages": value["prompt"]}, where).messages
    unlearned = [turn.model_copy(update={"weight": 0}) for turn in shown]
    return _conversation(value | {"messages": [*unlearned, *value["completion"]]}, where)


def _preference(value: Value, where: str) -> Preference:
    chosen, rejected = ([said] if isinstance(said, dict) else said for said in (value["chosen"], value["rejected"]))
    # One as text and one as messages would be written by different rules, and the template's marks alone would tell
    # them apart.
    if type(chosen) is not type(rejected):
        raise DataError(f"{where}: chosen and rejected must both be texts, or both lists of messages; correct the row")
    prompt = _prompt_of_answers(value, where)
    # A row may have the prompt at the beginning of both answers: what they share is taken for it.
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(prompt, str) and isinstance(chosen, list):
        prompt = None if shared else [{"role": "user", "content": prompt}]
    if prompt is None:
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt or not chosen or not rejected:
        raise DataError(f"{where}: prompt, chosen or rejected is empty; give a prompt and two answers that differ")
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are the same, so nothing tells which is better; drop the row")
    row = checked(Preference, {"prompt": prompt, "chosen": chosen, "rejected": rejected}, where)
    return row.model_copy(update={"prompt": _prompt_with_system(row.prompt, value, where)})


def _prompt_with_system(prompt: str | list[Turn], value: Value, where: str) -> str | list[Turn]:
    """A prompt behind the row's own system message, then as turns; as it is without one."""
    if not value.get("system"):
        return prompt
    turns = [Turn(role="user", content=prompt, weight=1)] if isinstance(prompt, str) else prompt
    return _with_system(turns, value, where)


def _prompt_of_answers(value: Value, where: str) -> str | list[Turn] | None:
    """The prompt in front of two answers: a column of its own, the turns of a conversation, alpaca's; or None."""
    if "prompt" in value:
        if beside := [name for name in ("instruction", "input") if value.get(name)]:
            raise DataError(f"{where} has a prompt and {beside[0]} besides; write both into prompt")
        return value["prompt"]
    column = next((name for name in ("conversations", "messages") if value.get(name)), None)
    if column is None and "instruction" not in value:
        return None
    if column is None:
        return "\n\n".join(str(value[name]) for name in ("instruction", "input") if value.get(name))
    turns = _all_turns(value, where, column).messages
    # Rows in the layout of UltraFeedback repeat the prompt with the chosen answer as `messages`.
    return None if turns[-1].role == "assistant" else turns


def _judged(value: Value, where: str) -> Judged:
    label = value.get("label", value.get("kto_tag"))
    column = next((name for name in ("messages", "conversations") if name in value), None)
    if column is None or "prompt" in value:
        row = checked(Judged, value | {"label": label}, where)
        return row.model_copy(update={"prompt": _prompt_with_system(row.prompt, value, where)})
    # The label is of the last turn; what the assistant said before is context.
    *before, answer = _all_turns(value, where, column).messages
    if answer.role != "assistant" or not before:
        raise DataError(f"{where} has a label, and its conversation ends in no answer that it judges; correct the row")
    return checked(Judged, {"prompt": before, "completion": [answer], "label": label}, where)


def _tagged(value: Value, where: str) -> Tagged:
    row = checked(Tagged, value, where)
    if len(row.tokens) != len(row.tags):
        raise DataError(
            f"{where} has {len(row.tokens)} tokens and {len(row.tags)} tags; give each token one tag, O if it has none"
        )
    if empty := [number for number, tag in enumerate(row.tags, 1) if not tag.strip()]:
        raise DataError(f"{where}: tag {empty[0]} of {len(row.tags)} is empty; write O for a token that has none")
    return row


def _prompt(value: Value, where: str) -> Prompt:
    if "prompt" in value:
        row = checked(Prompt, value, where)
        return row.model_copy(update={"prompt": _prompt_with_system(row.prompt, value, where)})
    turns = list(_all_turns(value, where, "messages").messages)
    # Rows for supervised tuning can be used for rewards: their answers are what is to be drawn.
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"{where} holds answers only; add the question")
    return checked(Prompt, {**{k: v for k, v in value.items() if k != "messages"}, "prompt": turns}, where)


def _rows_of(model: Any) -> Callable[[Value, str], Any]:
    return lambda value, where: checked(model, value, where)


TURNS = ("messages", "conversations")
JUDGED = (("prompt", "completion"), ("messages",), ("conversations",))
_REFUSED = MEDIA | WEIGHTS
_BESIDE_PROMPT = _REFUSED | ANSWERS | PROMPTS

FORMATS = {
    known.name: known
    for known in (
        Format("preference", (("chosen", "rejected"),), _preference, "dpo",
               ("prompt", *TURNS, "system", "instruction", "input"), _REFUSED | PROMPTS | MASKS),
        Format("unpaired-preference", tuple((*said, label) for label in ("label", "kto_tag") for said in JUDGED),
               _judged, "kto", ("system",), _BESIDE_PROMPT),
        Format("messages", (("messages",),), _conversation, "text", ("system", "tools"), _REFUSED | ANSWERS),
        Format("sharegpt", (("conversations",),), _share_gpt, "text", ("system", "tools"), _REFUSED | ANSWERS),
        Format("alpaca", (("instruction", "output"),), _alpaca, "text", ("input", "system", "history"), _BESIDE_PROMPT),
        Format("prompt-completion", (("prompt", "completion"),), _pair, "text", ("system",), _BESIDE_PROMPT),
        Format("text-label", (("text", "label"),), _rows_of(Labelled), "classification", ("text_pair",)),
        Format("tokens-tags", (("tokens", "tags"),), _tagged, "token-classification"),
        Format("text", (("text",),), _rows_of(Document), "text"),
        Format("prompt-only", (("prompt",), ("messages",)), _prompt, "grpo", refused=MEDIA,
               has_free_columns=True),
    )
}  # fmt: skip
"""The more demanding come first, where a row could be read as either."""

TASKS: Mapping[str, Sequence[str]] = {
    "text": ("messages", "sharegpt", "alpaca", "prompt-completion", "text"),
    "classification": ("text-label",),
    "token-classification": ("tokens-tags",),
    "seq2seq": ("alpaca", "prompt-completion"),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("unpaired-preference", "preference"),
    "grpo": ("prompt-only",),
}
