"""Answers to some held-out questions at each evaluation, so that one sees what the loss doesn't tell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback

from slimtune.data.batches import pad_id_of
from slimtune.data.encode import IGNORED
from slimtune.errors import ConfigError
from slimtune.evaluate.generation import sampling

_ROOM = 32
"""Tokens that an answer may have beyond twice the expected one."""
_SHOWN = 200


class Samples(TrainerCallback):
    """Greedy answers to the first held-out questions, shown and appended to a file.

    Raises: ConfigError, where the examples are no texts with answers.
    """

    def __init__(self, examples: Sequence[Any], count: int, tokenizer: Any, path: Path, console: Console) -> None:
        self.tokenizer, self.path, self.console = tokenizer, path, console
        self.questions = [_question(examples[index]) for index in range(min(count, len(examples)))]

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Answer them all."""
        was_training = model.training
        model.eval()
        lines = []
        for prompt, expected in self.questions:
            answer = self._answer(model, prompt, 2 * len(expected) + _ROOM)
            shown = Text.assemble(("  asked    ", "dim"), self._shown(prompt, last=True), "\n")
            shown.append("  answered ", "dim").append(f"{answer[:_SHOWN]}\n")
            shown.append("  expected ", "dim").append(self._shown(expected))
            self.console.print(shown)
            texts = {"prompt": self._text(prompt), "expected": self._text(expected), "answer": answer}
            lines.append(json.dumps({"step": state.global_step, **texts}, ensure_ascii=False) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
        model.train(was_training)

    @torch.inference_mode()
    def _answer(self, model: Any, prompt: list[int], longest: int) -> str:
        ids = torch.tensor([prompt], device=model.device)
        pad = pad_id_of(self.tokenizer)
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, pad_token_id=pad, **sampling(0)
        )
        return self._text(found[0, len(prompt) :].tolist())

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _shown(self, ids: list[int], last: bool = False) -> str:
        text = " ".join(self._text(ids).split())
        return text[-_SHOWN:] if last else text[:_SHOWN]


def _question(example: Any) -> tuple[list[int], list[int]]:
    """The ids up to the first answer, and that answer."""
    ids, labels = getattr(example, "input_ids", None), getattr(example, "labels", None)
    if not isinstance(labels, list) or ids is None:
        raise ConfigError("samples are answers to questions, which this task has none of; leave samples out")
    start = next(index for index, label in enumerate(labels) if label != IGNORED)
    end = next((index for index in range(start, len(labels)) if labels[index] == IGNORED), len(labels))
    # A text is learned from its second token on.
    if start <= 1:
        raise ConfigError("samples are answers to questions, and the held-out texts have none; leave samples out")
    return list(ids[:start]), list(ids[start:end])
