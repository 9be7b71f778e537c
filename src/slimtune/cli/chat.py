"""`slimtune chat`: talk with a model, and change its adapter in between."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from slimtune.cli.options import (
    Adapters,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    Quantize,
    Temperature,
    TrustRemoteCode,
    load_text_model,
)  # fmt: skip
from slimtune.console.screen import say
from slimtune.errors import ConfigError, SlimtuneError, did_you_mean

HELP = """/use NAME   answer with this adapter
/base       answer without any adapter
/adapters   list the adapters
/reset      forget the conversation
/help       this list
/exit       leave (also Ctrl-D)"""


def chat(
    model: Model,
    adapter: Adapters = [],  # noqa: B006 - typer copies it
    system: Annotated[str | None, typer.Option(help="A system message for the whole conversation.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a model; several adapters share its one base and are switched with /use.

    Example: slimtune chat smollm2-135m-instruct --adapter orders=tuned --adapter other=elsewhere
    """
    from slimtune.engine.weights import reordered_weights
    from slimtune.models.load import LoadOptions

    options = LoadOptions(dtype, device, trust_remote_code, quantize, computes="tokens")
    loaded, tokenizer = load_text_model(model, adapter, options)
    opening = [{"role": "system", "content": system}] if system else []
    session = ChatSession(loaded, tokenizer, max_new_tokens, temperature, opening)
    say("/help lists what can be done besides talking.", to_errors=True)
    with reordered_weights(loaded):
        for line in _lines():
            if line.startswith("/"):
                if not _command(session, line):
                    return
            elif line:
                _answer(session, line)


@dataclass
class ChatSession:
    """A conversation and who answers."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    temperature: float
    opening: list[dict[str, str]]
    turns: list[dict[str, str]] = field(default_factory=list)
    is_base: bool = False

    def answer(self, question: str) -> None:
        """Answer, word by word, and remember both; an answer that was broken off is forgotten with its question."""
        import torch
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                say(text, end="\n" if stream_end else "")

        from slimtune.data.batches import pad_id_of
        from slimtune.data.chat_template import prompt_ids, render
        from slimtune.evaluate.generation import sampling

        turns = [*self.turns, {"role": "user", "content": question}]
        text = render(self.tokenizer, self.opening + turns, for_answer=True)
        has_encoder = self.model.config.is_encoder_decoder
        # As in `generate_replies`: an encoder learned from no line break at the end.
        ids = prompt_ids(self.tokenizer, text.removesuffix("\n") if has_encoder else text)
        input_ids = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode(), self.model.disable_adapter() if self.is_base else nullcontext():
            produced = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=pad_id_of(self.tokenizer),
                streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **sampling(self.temperature),
            )
        answer = self.tokenizer.decode(produced[0, 0 if has_encoder else len(ids) :], skip_special_tokens=True)
        self.turns = [*turns, {"role": "assistant", "content": answer.strip()}]

    def adapters(self) -> list[str]:
        """The names of all adapters."""
        return list(getattr(self.model, "peft_config", {}))

    def speaker(self) -> str:
        """Who answers now."""
        return "base" if self.is_base or not self.adapters() else "+".join(self.model.active_adapters)


def _answer(session: ChatSession, question: str) -> None:
    try:
        session.answer(question)
    except KeyboardInterrupt:
        # At a terminal it ends the answer, not the conversation.
        if not sys.stdin.isatty():
            raise
        say("\nstopped; the question is forgotten, too", to_errors=True)


def _command(session: ChatSession, line: str) -> bool:
    """Carry out a slash command; False ends the conversation."""
    word, _, argument = line.partition(" ")
    if word in ("/exit", "/quit"):
        return False
    commands: dict[str, Callable[[], None]] = {
        "/use": lambda: _use(session, argument.strip()),
        "/base": lambda: _base(session),
        "/adapters": lambda: say("\n".join(session.adapters()) or "none"),
        "/reset": session.turns.clear,
        "/help": lambda: say(HELP),
    }
    try:
        if word not in commands:
            raise ConfigError(f"no command {word}; /help lists them{did_you_mean(word, [*commands, '/exit'])}")
        commands[word]()
    except SlimtuneError as error:
        # A slip of the pen ends a command, not the conversation.
        say(error, to_errors=True)
    return True


def _use(session: ChatSession, name: str) -> None:
    if not session.adapters():
        say("no adapter is attached; start with --adapter DIR", to_errors=True)
        return
    if not name:
        raise ConfigError(f"/use takes the name of an adapter; there are {', '.join(session.adapters())}")
    session.model.set_adapter(name)
    session.is_base = False
    say(f"now answering: {session.speaker()}", to_errors=True)


def _base(session: ChatSession) -> None:
    session.is_base = bool(session.adapters())
    say("now answering: base", to_errors=True)


def _lines() -> Iterator[str]:
    """What is typed, with a history on a terminal, or what is piped in."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    ask = _prompter()
    while True:
        try:
            yield ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return


def _prompter() -> Callable[[str], str]:
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return input
    return PromptSession().prompt
