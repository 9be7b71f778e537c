"""Training as a person follows it: a bar with loss, speed and time left, and every loss in a file."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from slimtune.console.progress import Counting

KEPT = ("loss", "grad_norm", "learning_rate", "epoch", "reward", "kl")
"""What is written of each logged step, beside everything in a group of KEPT_GROUPS, `eval_` in front or not."""
KEPT_GROUPS = ("rewards/", "completions/")
SCORES = ("rewards/accuracies", "rewards/margins", "reward")
"""Of held-out pairs the share in the right order, and how far apart they are; of held-out prompts the reward."""


class ShownProgress(TrainerCallback):
    """The steps, each with its loss and the tokens a second."""

    def __init__(self, console: Console) -> None:
        self.console, self.counting = console, Counting(console)
        self.began, self.first_tokens = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar; what was done before this session counts as done, but not for the speed."""
        self.began, self.first_tokens = time.monotonic(), state.num_input_tokens_seen
        self.counting.start("training, step", state.max_steps, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Move on by what was logged."""
        logs, step, seconds = logs or {}, state.global_step, time.monotonic() - self.began
        if "eval_loss" in logs:
            self.console.print(f"  step {step}: loss on the held-out examples {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        speed = f"{(state.num_input_tokens_seen - self.first_tokens) / max(seconds, 1e-9):,.0f} tokens/s"
        self.counting.reach(step, told=f"loss {logs['loss']:.4f}  {speed}")

    def close(self) -> None:
        """Give the terminal back, however the training ended."""
        self.counting.close()


class LossFile(TrainerCallback):
    """Each logged step as a line of JSON, flushed, so that nothing is lost if the run breaks off."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the last step be logged, whatever `logging_steps` says: a short run would have no loss at all."""
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a line."""
        # Not the seconds: the file of a resumed run is to be that of one which was never broken off.
        kept = {
            name: value
            for name, value in (logs or {}).items()
            if (own := name.removeprefix("eval_")) in KEPT or own.startswith(KEPT_GROUPS) or _is_score(name)
        }
        if "loss" in kept or "eval_loss" in kept:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"step": state.global_step, "tokens": state.num_input_tokens_seen, **kept}) + "\n"
                )


def _is_score(name: str) -> bool:
    return name.startswith("eval_") and "/" not in name and not name.endswith(("_second", "_runtime"))


class SameAsBefore(TrainerCallback):
    """Holds the first steps of a resumed run against what it wrote for them before it was broken off.

    Args:
        before: the losses by step.
        tolerance: relative; 0 where the device computes the same each time.
    """

    def __init__(self, before: dict[int, float], tolerance: float, say: Callable[[str], None]) -> None:
        self.before, self.tolerance, self.say = before, tolerance, say

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Compare; what differs is said once."""
        then, now = self.before.pop(state.global_step, None), (logs or {}).get("loss")
        if then is None or now is None or math.isclose(then, now, rel_tol=self.tolerance):
            return
        self.before.clear()
        self.say(
            f"warning: step {state.global_step} had a loss of {then!r} before the run was broken off and has {now!r} "
            "now: it does not repeat exactly on this machine"
        )
