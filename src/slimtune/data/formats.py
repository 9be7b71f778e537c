"""The formats in which people write training data: which columns each has, and how one of its rows is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from slimtune.data.rows import (
    Conversation,
    Document,
    Instruction,
    Judged,
    Labelled,
    Pair,
    Preference,
    Prompt,
    Tagged,
    checked,
)
from slimtune.errors import ConfigError, DataError, did_you_mean, listing
from slimtune.storage.text_files import parse_json

Value = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One way to write a row.

    Attributes:
        columns: what a row must have; each set of them is a way to write it.
        read: makes a row of its columns, or raises DataError with where it stands.
        task: what a model learns from such rows if nothing else was asked for.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Value, str], Any]
    task: str

    def fits(self, value: Mapping[str, Any]) -> bool:
        """Whether a row has the columns."""
        return any(set(columns) <= value.keys() for columns in self.columns)

    @property
    def needs(self) -> str:
        """The columns, for people."""
        return ", or ".join(" and ".join(columns) for columns in self.columns)


def format_of(value: Value, where: str, task: str = "auto") -> Format:
    """The format of a row, among those of a task; raises DataError if there is none."""
    for known in formats_of(task):
        _refuse_a_slip(known, value, where)
        if known.fits(value):
            return known
    fields = f"has the fields {listing(value)}" if value else "has no fields"
    names = {column for known in formats_of(task) for columns in known.columns for column in columns}
    near = next(filter(None, (did_you_mean(key, names) for key in value if key not in names)), "")
    known = "; ".join(f"{known.name} needs {known.needs}" for known in formats_of(task))
    raise DataError(f"{where} {fields}, which is no format of task {task} ({known}){near or '; rename the columns'}")


def _refuse_a_slip(known: Format, value: Value, where: str) -> None:
    """Raises: DataError, if all but a misspelt column is there: a simpler format must not take the row."""
    for columns in known.columns:
        missing = set(columns) - value.keys()
        if len(missing) == 1 < len(columns):
            for key in value.keys() - set(columns):
                if near := did_you_mean(key, missing):
                    fields = listing(value)
                    raise DataError(f"{where} has the fields {fields}; format {known.name} needs {known.needs}{near}")


def formats_of(task: str) -> list[Format]:
    """The formats that a task takes, the more demanding first; raises ConfigError for an unknown task."""
    if task == "auto":
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
    try:
        return known.read(value, where)
    except DataError as error:
        raise error if where in str(error) else DataError(f"{where}: {error}") from error


def _conversation(value: Value, where: str) -> Conversation:
    return ordered(checked(Conversation, value, where), where)


def ordered(row: Conversation, where: str) -> Conversation:
    """The conversation, if its roles follow one another as they can; raises DataError."""
    roles = [turn.role for turn in row.messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if "system" in spoken:
        number = len(roles) - len(spoken) + spoken.index("system") + 1
        raise DataError(f"{where}: turn {number} is a system message; put it first, there is one for a conversation")
    if spoken and spoken[0] == "assistant":
        raise DataError(f"{where}: the conversation begins with the assistant; put the user's turn in front of it")
    for number, (before, role) in enumerate(zip(["none", *roles], roles, strict=False), 1):
        if role == "tool" and before not in ("assistant", "tool"):
            raise DataError(f"{where}: turn {number} is a tool's, but no assistant turn that calls it stands before it")
    if "assistant" not in roles:
        raise DataError(f"{where} has no assistant turn, so nothing would be learned from it; add the answer")
    if not any(row.learned()):
        raise DataError(f"{where}: all assistant turns have weight 0, so nothing would be learned; drop the row")
    return row


ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


def _share_gpt(value: Value, where: str) -> Conversation:
    turns = value["conversations"]
    if not isinstance(turns, list):
        raise DataError(f"{where}: conversations is a {type(turns).__name__}, not a list of turns; correct the row")
    messages = [_share_gpt_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(turns, 1)]
    opening = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    return _conversation({"messages": opening + messages, "tools": value.get("tools")}, where)


def _share_gpt_turn(turn: Any, where: str) -> Value:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        found = f"has the fields {listing(turn)}" if isinstance(turn, dict) else f"is a {type(turn).__name__}"
        raise DataError(f"{where} {found}, but a turn of format sharegpt has from and value")
    said = turn["from"]
    if said not in ROLES:
        near = did_you_mean(str(said), ROLES)
        raise DataError(f"{where} is from '{said}', but a turn is from one of {listing(ROLES, 12)}{near}")
    extras = {"weight": turn["weight"]} if "weight" in turn else {}
    if said != "function_call":
        return {"role": ROLES[said], "content": turn["value"], **extras}
    try:
        calls = parse_json(turn["value"])
    except ValueError as error:
        raise DataError(f"{where} is a function_call that is not JSON ({error}); correct the row") from error
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls], **extras}


# Worded as in Taori et al. 2023 (Stanford Alpaca), where models without a chat template learn from such rows.
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)


def _alpaca(value: Value, where: str) -> Instruction:
    pair = checked(Pair, {"prompt": value["instruction"], "completion": value["output"]}, where)
    context = value.get("input") or ""
    about = f"\n\n### Input:\n{context}" if context else ""
    opening = ALPACA.format(", paired with an input that provides further context" if context else "")
    return checked(
        Instruction,
        {
            "prompt": f"{pair.prompt}\n\n{context}" if context else pair.prompt,
            "completion": pair.completion,
            "plain_prompt": f"{opening}### Instruction:\n{pair.prompt}{about}\n\n### Response:\n",
            "system": value.get("system") or "",
        },
        where,
    )


def _pair(value: Value, where: str) -> Pair | Conversation:
    if not (isinstance(value["prompt"], list) and isinstance(value["completion"], list)):
        return checked(Pair, value, where)
    # Of a conversation in two parts the second is learned.
    shown = [turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in value["prompt"]]
    return _conversation({"messages": [*shown, *value["completion"]], "tools": value.get("tools")}, where)


def _preference(value: Value, where: str) -> Preference:
    prompt, chosen, rejected = value.get("prompt"), value["chosen"], value["rejected"]
    if type(chosen) is not type(rejected):
        raise DataError(f"{where}: chosen and rejected must both be texts, or both lists of messages; correct the row")
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(prompt, str) and isinstance(chosen, list):
        prompt = None if shared else [{"role": "user", "content": prompt}]
    if prompt is None:
        # Both answers then carry what stands before them.
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt or not chosen or not rejected:
        raise DataError(f"{where}: prompt, chosen or rejected is empty; give a prompt and two answers that differ")
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are the same, so nothing tells which is better; drop the row")
    return checked(Preference, {"prompt": prompt, "chosen": chosen, "rejected": rejected}, where)


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
        return checked(Prompt, value, where)
    turns = checked(Conversation, value, where).messages
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"{where} holds answers only; add the question")
    return checked(Prompt, {**{k: v for k, v in value.items() if k != "messages"}, "prompt": turns}, where)


FORMATS = {
    known.name: known
    for known in (
        Format("messages", (("messages",),), _conversation, "text"),
        Format("sharegpt", (("conversations",),), _share_gpt, "text"),
        Format("alpaca", (("instruction", "output"),), _alpaca, "text"),
        Format("preference", (("chosen", "rejected"),), _preference, "dpo"),
        Format("unpaired-preference", (("prompt", "completion", "label"),), lambda v, w: checked(Judged, v, w), "kto"),
        Format("prompt-completion", (("prompt", "completion"),), _pair, "text"),
        Format("text-label", (("text", "label"),), lambda v, w: checked(Labelled, v, w), "classification"),
        Format("tokens-tags", (("tokens", "tags"),), _tagged, "token-classification"),
        Format("text", (("text",),), lambda v, w: checked(Document, v, w), "text"),
        Format("prompt-only", (("prompt",), ("messages",)), _prompt, "grpo"),
    )
}
"""The more demanding come first, where a row could be read as either."""

TASKS = {
    "text": ("messages", "sharegpt", "alpaca", "prompt-completion", "text"),
    "classification": ("text-label",),
    "token-classification": ("tokens-tags",),
    "seq2seq": ("alpaca", "prompt-completion"),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("unpaired-preference", "preference"),
    "grpo": ("prompt-only",),
}
