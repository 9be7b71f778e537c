"""A folder for `ollama create`: the GGUF file, and a Modelfile with the chat template, stop words and parameters.

Ollama's templates are Go's, transformers' are Jinja's. A Jinja template is a program that can't be translated in
general, but most put fixed words around each message. Those words are found by rendering, and what is made of them is
compared with what the Jinja template renders; a template that does more is left to Ollama and said so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from slimtune.export.gguf.model import MODEL_FILE

_MARK = "\u2402"
"""Stands for a message while a template is taken apart; no template has it."""

Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """The words around messages: before and after those of each role, at the start and before the answer."""

    around: Mapping[str, tuple[str, str]]
    start: str
    start_without_system: str
    answer: str

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the model reads it, up to where it answers."""
        has_system = bool(messages) and messages[0]["role"] == "system"
        text = self.start if has_system else self.start_without_system
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer

    def to_go(self) -> str:
        """The same as a template of Go."""
        start = self.start
        if self.start != self.start_without_system:
            system = '{{ if eq (index .Messages 0).Role "system" }}'
            start = f"{system}{self.start}{{{{ else }}}}{self.start_without_system}{{{{ end }}}}"
        roles = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in self.around.items()
        )
        return f"{start}{{{{ range .Messages }}}}{{{{ {roles}{{{{ end }}}}{{{{ end }}}}{self.answer}"


def chat_format(tokenizer: Any) -> ChatFormat | None:
    """The words that a tokenizer's chat template puts around messages; None where it does more than that."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        chat = _taken_apart(tokenizer)
        same = all(chat.render(messages) == _rendered(tokenizer, messages) for messages in _CONVERSATIONS)
    except Exception:
        # A template refuses what it doesn't take by an error of any kind; a system message, for example.
        return None
    # Go would run what stands in double braces, and three quotation marks end a Modelfile's string.
    return chat if same and "{{" not in repr(chat) and '"""' not in chat.to_go() else None


_CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two\nlines"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
    ],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
    ],
)


def _taken_apart(tokenizer: Any) -> ChatFormat:
    def texts(*roles: str, answers: bool = False) -> list[str]:
        messages = [{"role": role, "content": _MARK} for role in roles]
        return _rendered(tokenizer, messages, answers).split(_MARK)

    # Twice, for what comes before a later question isn't what begins the text.
    once, twice = texts("user", "assistant"), texts("user", "assistant", "user", "assistant")
    with_system = texts("system", "user", "assistant")
    to_answer = texts("user", answers=True)
    # [start + before user, after user + before answer, after answer], then the same without the start.
    after_answer = once[-1]
    before_user = twice[2].removeprefix(after_answer)
    start_without = once[0].removesuffix(before_user)
    answer = to_answer[1]
    # Between a question and its answer: what ends a message, as far as an answer ends so too, and what begins the next.
    pairs = zip(once[1], after_answer, strict=False)
    after_user = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    before_answer = once[1].removeprefix(after_user)
    after_system = with_system[1].removesuffix(before_user)
    around = {
        "system": (with_system[0], after_system),
        "user": (before_user, after_user),
        "assistant": (before_answer, after_answer),
    }
    return ChatFormat(around, "", start_without, answer.removeprefix(after_user))


def _rendered(tokenizer: Any, messages: Sequence[Message], answers: bool = True) -> str:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answers)
    # Ollama puts the start of a text in front by itself.
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if bos and ids[0] == tokenizer.bos_token_id else text


def write_modelfile(folder: Path, tokenizer: Any, generation: Any) -> list[str]:
    """Write the Modelfile beside `model.gguf`. Returns: what a reader should know."""
    lines, notes = [f"FROM ./{MODEL_FILE}"], []
    chat = chat_format(tokenizer)
    if chat is not None:
        lines.append(f'TEMPLATE """{chat.to_go()}"""')
    elif getattr(tokenizer, "chat_template", None):
        notes.append("the chat template can't be written as Ollama's; it takes the one that it recognizes in the file")
    eos = getattr(generation, "eos_token_id", None)
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    stops = tokenizer.convert_ids_to_tokens([*dict.fromkeys(number for number in ids if number is not None)])
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    if getattr(generation, "do_sample", False):
        for name, own in {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}.items():
            value = getattr(generation, own, None)
            lines += [f"PARAMETER {name} {value}"] if value is not None else []
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes
