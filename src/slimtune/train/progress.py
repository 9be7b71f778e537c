"""Progress of a training: a bar on the screen, losses in a file, answers to some held-out questions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback

from slimtune.console.progress import Counting
from slimtune.data.batches import IGNORED, pad_id_of
from slimtune.errors import ConfigError
from slimtune.evaluate.generation import sampling
from slimtune.storage.atomic import write_file

KEPT = ("loss", "grad_norm", "learning_rate", "epoch", "reward", "kl")
"""What is written of each logged step, beside everything in a group of KEPT_GROUPS, `eval_` in front or not."""
KEPT_GROUPS = ("rewards/", "completions/")
SCORES = ("rewards/accuracies", "rewards/margins", "reward")
"""Of held-out pairs the share in the right order, and how far apart they are; of held-out prompts the reward."""
_PROGRESS_SECONDS = 1.0
_EXTRA_TOKENS = 32
"""Tokens that a sampled answer may have beyond twice the expected one."""
_SHOWN = 200
"""Characters of a text that are shown."""


class ProgressBar(TrainerCallback):
    """A progress bar of the steps with loss and tokens per second."""

    def __init__(self, console: Console) -> None:
        self.console, self.counting = console, Counting(console)
        self.began, self.first_tokens = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar; steps of earlier sessions count as done, but not for the speed."""
        self.began, self.first_tokens = time.monotonic(), state.num_input_tokens_seen
        self.counting.start("training, step", state.max_steps, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Advance the bar by what was logged."""
        logs, step, seconds = logs or {}, state.global_step, time.monotonic() - self.began
        if "eval_loss" in logs:
            self.console.print(f"  step {step}: loss on the held-out examples {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        speed = f"{(state.num_input_tokens_seen - self.first_tokens) / max(seconds, 1e-9):,.0f} tokens/s"
        self.counting.reach(step, beside=f"loss {logs['loss']:.4f}  {speed}")

    def close(self) -> None:
        """Restore the terminal, however the training ended."""
        self.counting.close()


class LossLog(TrainerCallback):
    """Each logged step as a line of JSON, flushed, so that nothing is lost if the run breaks off.

    Args:
        writes: off in all but one of several processes, which come to the mean loss together.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the last step whatever `logging_steps` is: a short run would have no loss at all."""
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a line."""
        # Not the seconds: the file of a resumed run is to be that of one which was never broken off.
        kept = {
            name: value
            for name, value in (logs or {}).items()
            if (own := name.removeprefix("eval_")) in KEPT or own.startswith(KEPT_GROUPS) or _is_score(name)
        }
        if self.writes and ("loss" in kept or "eval_loss" in kept):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"step": state.global_step, "tokens": state.num_input_tokens_seen, **kept}) + "\n"
                )


def _is_score(name: str) -> bool:
    return name.startswith("eval_") and "/" not in name and not name.endswith(("_second", "_runtime"))


class ProgressFile(TrainerCallback):
    """How far the run is, in a file for whoever looks on from another process.

    Args:
        writes: off in all but one of several processes.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.began = self.written_at = 0.0
        self.first_step = self.first_tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steps of earlier sessions count as done, but not for the speed."""
        self.began, self.first_step, self.first_tokens = (
            time.monotonic(),
            state.global_step,
            state.num_input_tokens_seen,
        )
        self._write(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write, if the file is older than a second."""
        if time.monotonic() - self.written_at >= _PROGRESS_SECONDS or state.global_step >= state.max_steps:
            self._write(state)

    def _write(self, state: Any) -> None:
        if not self.writes:
            return
        self.written_at = time.monotonic()
        seconds = max(self.written_at - self.began, 1e-9)
        done = state.global_step - self.first_step
        on_gpu = torch.cuda.is_available()
        progress = {
            "step": state.global_step,
            "steps": state.max_steps,
            "tokens": state.num_input_tokens_seen,
            "tokens_per_second": (state.num_input_tokens_seen - self.first_tokens) / seconds if done else None,
            "seconds_left": (state.max_steps - state.global_step) * seconds / done if done else None,
            # What the plan is about: the peak of the GPU's tensors, or the main memory of the process.
            "memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss,
        }
        write_file(self.path, json.dumps(progress))


class ReproducibilityCheck(TrainerCallback):
    """Compares the first losses of a resumed run with those of the same steps before it was broken off.

    Args:
        before: the losses by step.
        tolerance: relative; 0 where the device computes the same each time.
    """

    def __init__(self, before: dict[int, float], tolerance: float, log: Callable[[str], None]) -> None:
        self.before, self.tolerance, self.log = before, tolerance, log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Compare; the first difference is logged, and no other."""
        then, now = self.before.pop(state.global_step, None), (logs or {}).get("loss")
        if then is None or now is None or math.isclose(then, now, rel_tol=self.tolerance):
            return
        self.before.clear()
        self.log(
            f"warning: step {state.global_step} had a loss of {then!r} before the run was broken off and has {now!r} "
            "now: it does not repeat exactly on this machine"
        )


class Samples(TrainerCallback):
    """Greedy answers to the first held-out questions, shown and appended to a file.

    Args:
        writes: off in all but one of several processes, which answer together where the model is sharded.

    Raises: ConfigError, where the examples are no texts with answers.
    """

    def __init__(
        self, examples: Sequence[Any], count: int, tokenizer: Any, path: Path, console: Console, writes: bool = True
    ) -> None:
        self.tokenizer, self.path, self.console, self.writes = tokenizer, path, console, writes
        self.questions = [_question(examples[index]) for index in range(min(count, len(examples)))]

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Answer them all."""
        was_training = model.training
        model.eval()
        lines = []
        for prompt, expected in self.questions:
            answer = self._answer(model, prompt, 2 * len(expected) + _EXTRA_TOKENS)
            shown = Text.assemble(("  asked    ", "dim"), self._shown(prompt, last=True), "\n")
            shown.append("  answered ", "dim").append(f"{answer[:_SHOWN]}\n")
            shown.append("  expected ", "dim").append(self._shown(expected))
            self.console.print(shown)
            texts = {"prompt": self._text(prompt), "expected": self._text(expected), "answer": answer}
            lines.append(json.dumps({"step": state.global_step, **texts}, ensure_ascii=False) + "\n")
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        model.train(was_training)

    @torch.inference_mode()
    def _answer(self, model: Any, prompt: list[int], longest: int) -> str:
        ids = torch.tensor([prompt], device=model.device)
        pad = pad_id_of(self.tokenizer)
        generated = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, pad_token_id=pad, **sampling(0)
        )
        return self._text(generated[0, len(prompt) :].tolist())

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _shown(self, ids: list[int], last: bool = False) -> str:
        text = " ".join(self._text(ids).split())
        return text[-_SHOWN:] if last else text[:_SHOWN]


def _question(example: Any) -> tuple[list[int], list[int]]:
    """The ids up to the first answer, and the ids of that answer."""
    ids, labels = getattr(example, "input_ids", None), getattr(example, "labels", None)
    if not isinstance(labels, list) or ids is None:
        raise ConfigError("samples are answers to questions, which this task has none of; leave samples out")
    start = next(index for index, label in enumerate(labels) if label != IGNORED)
    end = next((index for index in range(start, len(labels)) if labels[index] == IGNORED), len(labels))
    # A text is learned from its second token on.
    if start <= 1:
        raise ConfigError("samples are answers to questions, and the held-out texts have none; leave samples out")
    return list(ids[:start]), list(ids[start:end])
