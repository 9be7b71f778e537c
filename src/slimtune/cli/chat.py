"""`slimtune chat`: talk with a model, and change its adapter in between."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from slimtune.cli.options import Adapters, Device, Dtype, MaxNewTokens, Model, Quantize, Temperature, TrustRemoteCode
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
    from slimtune.cli.options import attach, parse
    from slimtune.models.load import LoadOptions, load_model

    named = parse(adapter)
    loaded, tokenizer = load_model(model, "text", LoadOptions(dtype, device, trust_remote_code, quantize))
    opening = [{"role": "system", "content": system}] if system else []
    talk = Talk(attach(loaded, named), tokenizer, max_new_tokens, temperature, opening)
    print("/help lists what can be done besides talking.", file=sys.stderr)
    for line in _lines():
        if line.startswith("/"):
            if not _command(talk, line):
                return
        elif line:
            _answer(talk, line)


@dataclass
class Talk:
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

        from slimtune.data.batches import pad_id_of
        from slimtune.data.chat_template import prompt_ids, render
        from slimtune.evaluate.generation import sampling

        asked = [*self.turns, {"role": "user", "content": question}]
        text = render(self.tokenizer, self.opening + asked, for_answer=True)
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
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **sampling(self.temperature),
            )
        said = self.tokenizer.decode(produced[0, 0 if has_encoder else len(ids) :], skip_special_tokens=True)
        self.turns = [*asked, {"role": "assistant", "content": said.strip()}]

    def adapters(self) -> list[str]:
        """The names of all adapters."""
        return list(getattr(self.model, "peft_config", {}))

    def speaker(self) -> str:
        """Who answers now."""
        return "base" if self.is_base or not self.adapters() else "+".join(self.model.active_adapters)


def _answer(talk: Talk, question: str) -> None:
    try:
        talk.answer(question)
    except KeyboardInterrupt:
        # At a terminal it ends the answer, not the conversation.
        if not sys.stdin.isatty():
            raise
        print("\nstopped; the question is forgotten, too", file=sys.stderr)


def _command(talk: Talk, line: str) -> bool:
    """Carry out a slash command; False ends the conversation."""
    word, _, argument = line.partition(" ")
    if word in ("/exit", "/quit"):
        return False
    commands: dict[str, Callable[[], None]] = {
        "/use": lambda: _use(talk, argument.strip()),
        "/base": lambda: _base(talk),
        "/adapters": lambda: print("\n".join(talk.adapters()) or "none"),
        "/reset": talk.turns.clear,
        "/help": lambda: print(HELP),
    }
    try:
        if word not in commands:
            raise ConfigError(f"no command {word}; /help lists them{did_you_mean(word, [*commands, '/exit'])}")
        commands[word]()
    except SlimtuneError as error:
        # A slip of the pen ends a command, not the conversation.
        print(error, file=sys.stderr)
    return True


def _use(talk: Talk, name: str) -> None:
    if not talk.adapters():
        print("no adapter is attached; start with --adapter DIR", file=sys.stderr)
        return
    talk.model.set_adapter(name)
    talk.is_base = False
    print(f"now answering: {talk.speaker()}", file=sys.stderr)


def _base(talk: Talk) -> None:
    talk.is_base = bool(talk.adapters())
    print("now answering: base", file=sys.stderr)


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
