"""Ctrl-C and SIGTERM while a run goes on: the step is finished, a checkpoint written, and the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from slimtune.errors import TrainingError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(TrainingError):
    """A run that was stopped from outside and can go on; `exit_code` is what a shell expects, 130 for Ctrl-C."""

    def __init__(self, message: str, received: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + received


class StopOnSignal(TrainerCallback):
    """Ends the training after the step in which a signal came; a second signal ends it at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over for a while; in a thread, which gets none, nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        for each in SIGNALS:
            signal.signal(each, _at_once)
        self.say("stopping: this step is finished and a checkpoint written; once more to stop at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End after this step, with a checkpoint."""
        if self.received is not None:
            control.should_save = control.should_training_stop = True


def _at_once(number: int, frame: Any) -> None:
    raise InterruptedRunError(
        f"stopped at once by {signal.Signals(number).name}; go on from the last checkpoint with --resume", number
    )
