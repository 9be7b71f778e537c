"""The tokenizer's own chat template: what the model is shown, and which part of it is the assistant's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimtune.errors import DataError

Message = dict[str, str]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Sequence[Message], for_answer: bool = False) -> str:
    """The conversation as text, up to where the assistant begins if `for_answer`; raises DataError if it can't."""
    if not has_template(tokenizer):
        # A base model never saw turns: it continues text.
        return "\n".join(message["content"] for message in messages) + ("\n" if for_answer else "")
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=for_answer)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the tokenizer's chat template refuses a conversation of the roles {roles}: {error}; "
            f"reorder the turns as the template wants them"
        ) from error


def assistant_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and where the assistant's turns lie in it, end of turn included.

    Raises DataError for a template that rewrites earlier turns, because then it can't be told what was said.
    """
    whole = render(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise DataError("the conversation begins with the assistant; put the user's turn in front of it")
        # Templates carry no marks around what is generated, so each turn is found by rendering up to it.
        before = render(tokenizer, messages[:index], for_answer=True)
        through = render(tokenizer, messages[: index + 1])
        if not through.startswith(before) or not whole.startswith(through.rstrip()):
            raise DataError(
                f"the tokenizer's chat template renders turn {index + 1} of {len(messages)} differently once later "
                f"turns follow, so what is learned can't be told; split the conversation so that each example "
                f"ends with its only assistant turn"
            )
        # White space behind the end of turn belongs to the template: generation has stopped before it.
        spans.append((len(before), len(through.rstrip())))
    return whole, spans
