"""The tokenizer's own chat template: what the model is shown, and which part of it is the assistant's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from slimtune.errors import DataError

Message = dict[str, Any]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Any, messages: Sequence[Message], for_answer: bool = False, tools: Sequence[Any] | None = None
) -> str:
    """The conversation as text, up to where the assistant begins if `for_answer`; raises DataError if it can't."""
    if not has_template(tokenizer):
        # A base model never saw turns: it continues text.
        return "\n".join(message["content"] for message in messages) + ("\n" if for_answer else "")
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=for_answer
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the tokenizer's chat template refuses a conversation of the roles {roles}: {error}; "
            f"reorder the turns as the template wants them"
        ) from error


class RewritesError(DataError):
    """A template that renders an earlier turn otherwise once later turns follow."""


def assistant_spans(
    tokenizer: Any,
    messages: Sequence[Message],
    learned: Sequence[bool] | None = None,
    tools: Sequence[Any] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and where the assistant's turns lie in it, end of turn included.

    Args:
        learned: which of the turns are wanted, if not all of the assistant's.
        tools: what the assistant may call, shown to it by the template.

    Raises:
        RewritesError: the template rewrites earlier turns, so that it can't be told what was said.
        DataError: it refuses the conversation, or the conversation begins with the assistant.
    """
    whole = render(tokenizer, messages, tools=tools)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not (learned is None or learned[index]):
            continue
        if index == 0:
            raise DataError("the conversation begins with the assistant; put the user's turn in front of it")
        # Templates carry no marks around what is generated, so each turn is found by rendering up to it.
        through = render(tokenizer, messages[: index + 1], tools=tools)
        start = _start(tokenizer, messages[:index], through, tools)
        if start is None or not whole.startswith(through.rstrip()):
            raise RewritesError(
                f"the tokenizer's chat template renders turn {index + 1} of {len(messages)} differently once later "
                f"turns follow, so what is learned can't be told; split the conversation so that each example "
                f"ends with its only assistant turn"
            )
        # White space behind the end of turn belongs to the template: generation has stopped before it.
        spans.append((start, len(through.rstrip())))
    return whole, spans


def _start(tokenizer: Any, before: Sequence[Message], through: str, tools: Sequence[Any] | None) -> int | None:
    """Where the turn behind `before` begins in the text through it."""
    asked = render(tokenizer, before, for_answer=True, tools=tools)
    if through.startswith(asked):
        return len(asked)
    # Some open the answer with what only a reasoning model writes: the turn begins where both part.
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, through, strict=False)))
    return shared if shared > len(render(tokenizer, before, tools=tools).rstrip()) else None
