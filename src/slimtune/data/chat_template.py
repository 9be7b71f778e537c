"""The tokenizer's chat template: rendering conversations, and finding the assistant's turns in the result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from slimtune.data import template_process
from slimtune.data.template_process import TemplateError
from slimtune.errors import ConfigError, DataError, did_you_mean, first_line, listing
from slimtune.storage.text_files import read_text

Message = dict[str, Any]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Any, messages: Sequence[Message], for_answer: bool = False, tools: Sequence[Any] | None = None
) -> str:
    """Render a conversation as text, up to where the assistant begins if `for_answer`; raises DataError if it can't."""
    if not has_template(tokenizer):
        # A base model never saw turns: it continues text.
        return "\n".join(message["content"] for message in messages) + ("\n" if for_answer else "")
    try:
        return template_process.render(tokenizer, messages, tools, for_answer)
    except TemplateError as error:
        if error.is_excess:
            raise DataError(
                f"the tokenizer's chat template can't be used: {error}; name another one with chat_template"
            ) from error
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the tokenizer's chat template refuses a conversation of the roles {roles}: {error}; "
            f"reorder the turns as the template wants them"
        ) from error


class RewritesError(DataError):
    """The template renders earlier turns differently once later turns follow."""


def assistant_spans(
    tokenizer: Any,
    messages: Sequence[Message],
    learned: Sequence[bool] | None = None,
    tools: Sequence[Any] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation, and give the character spans of the assistant's turns in it, end of turn included.

    Args:
        learned: which of the turns are wanted, if not all of the assistant's.
        tools: what the assistant may call, shown to it by the template.

    Raises:
        RewritesError: the template rewrites earlier turns, so that the answers can't be found in it.
        DataError: it refuses the conversation, such as one that begins with the assistant.
    """
    whole = render(tokenizer, messages, tools=tools)
    _require_tools(tools or (), whole)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            _require_said(message, index, whole)
        if message["role"] != "assistant" or not (learned is None or learned[index]):
            continue
        # Templates carry no marks around what is generated, so each turn is found by rendering up to it.
        is_last = index == len(messages) - 1
        through = whole if is_last else render(tokenizer, messages[: index + 1], tools=tools)
        if index == 0:
            start = _start_of_first(tokenizer, message, through, tools)
        else:
            start = _start(tokenizer, messages[:index], through, tools)
        end = _end(tokenizer, through, whole)
        if start is None or end is None:
            raise RewritesError(
                f"the tokenizer's chat template renders turn {index + 1} of {len(messages)} differently once later "
                f"turns follow, so what is learned can't be told; split the conversation so that each example "
                f"ends with its only assistant turn"
            )
        _require_said(message, index, whole[start:end])
        spans.append((start, end))
    return whole, spans


def _end(tokenizer: Any, through: str, whole: str) -> int | None:
    """The end in `whole` of the turn that `through` ends with, its end of turn included."""
    # White space behind the end of turn belongs to the template: generation has stopped before it.
    ended = through.rstrip()
    if not whole.startswith(ended) and tokenizer.eos_token:
        # Some put an end of text behind the last turn alone.
        ended = ended.removesuffix(tokenizer.eos_token).rstrip()
    return len(ended) if whole.startswith(ended) else None


def _require_said(message: Message, index: int, rendered: str) -> None:
    """Raises: DataError, if the template leaves out a turn's content, or a tool that was called."""
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    for said in (message.get("content") or "", *calls):
        # White space aside: templates trim contents.
        if said not in rendered and "".join(said.split()) not in "".join(rendered.split()):
            raise DataError(
                f"the tokenizer's chat template leaves out what turn {index + 1} says ({message['role']}: "
                f"{said[:40]!r}); {TOOLS_ADVICE if said in calls else 'name a template that renders it'}"
            )


TOOLS_ADVICE = "set data.chat_template to hermes, which ships with slimtune and renders tools and their calls"


def _require_tools(tools: Sequence[Any], rendered: str) -> None:
    """Raises: DataError, if the template leaves out a tool that the assistant may call."""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    if lost := [name for name in names if isinstance(name, str) and name not in rendered]:
        raise DataError(f"the tokenizer's chat template leaves out the row's tools ({listing(lost)}); {TOOLS_ADVICE}")


def _start(tokenizer: Any, before: Sequence[Message], through: str, tools: Sequence[Any] | None) -> int | None:
    """The start in `through` of the turn that follows `before`."""
    opened = render(tokenizer, before, for_answer=True, tools=tools)
    if through.startswith(opened):
        return len(opened)
    # Some open the answer with what only a reasoning model writes: the turn begins where both part.
    shared = _shared(opened, through)
    # Shared beyond the turns before: else the answer itself would have parted from them.
    return shared if shared > len(render(tokenizer, before, tools=tools).rstrip()) else None


def _start_of_first(tokenizer: Any, message: Message, through: str, tools: Sequence[Any] | None) -> int:
    """The start of a first turn's content: where its rendering parts from that of another content."""
    # Nothing stands before it that could be rendered with an open answer, as `_start` does it.
    # Any other first letter does: both renderings are the same up to where the content begins.
    other = "b" if str(message.get("content")).startswith("a") else "a"
    return _shared(through, render(tokenizer, [{"role": message["role"], "content": other}], tools=tools))


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@cache
def named_templates() -> dict[str, Path]:
    """The templates that ship with the library, for tokenizers without one."""
    return {path.stem: path for path in sorted(Path(__file__).with_name("chat_templates").glob("*.jinja"))}


def use_template(tokenizer: Any, name: str) -> None:
    """Set the tokenizer's chat template by name or from a file; it is saved with the tokenizer.

    Raises:
        ConfigError: there is no such template.
        DataError: it writes tokens that the tokenizer hasn't, or it is none.
    """
    path = named_templates().get(name, Path(name))
    if not path.exists():
        near = did_you_mean(name, named_templates())
        raise ConfigError(f"no chat template '{name}': neither a file nor one of {', '.join(named_templates())}{near}")
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = read_text(path)
    except (OSError, ValueError) as error:
        raise DataError(f"the chat template '{name}' can't be read: {first_line(error)}; pass a text file") from error
    try:
        text = render(tokenizer, [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
        # One id, or the model reads `<|im_start|>` as six ordinary tokens that it never saw in this role.
        for token in dict.fromkeys(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>", text)):
            if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
                raise DataError(
                    f"the chat template '{name}' writes {token}, which is no token of this tokenizer, so the model "
                    f"never saw it; name another one, as plain, which needs none of its own"
                )
    except DataError:
        tokenizer.chat_template = before
        raise


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a rendered prompt; a chat template has written the special tokens itself."""
    return tokenizer(prompt, add_special_tokens=not has_template(tokenizer))["input_ids"]
