"""Checks while a model trains, as callbacks of a Trainer.

- `EachDeltaLearns`: every parameter gets a gradient and moves within the first steps.
- `LastGood`: loss and gradient stay numbers; otherwise the last good weights are put back.
- `StopOnSignal`: Ctrl-C and SIGTERM end the run after the present step, with a checkpoint.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from slimtune.console.process import this_process
from slimtune.errors import TrainingError, listing
from slimtune.train.processes import largest, local, of_all, shards

# A LoRA's A has no gradient while B is zero, and a warm-up begins with a rate of zero: two steps may pass in rest.
WATCHED_STEPS = 4
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOPPING = "stopping: this step is finished and a checkpoint written"


class DivergedError(TrainingError):
    """Loss or gradient are no longer numbers; the model is as it was after `kept_steps` steps."""

    def __init__(self, message: str, kept_steps: int) -> None:
        super().__init__(message)
        self.kept_steps = kept_steps


class InterruptedRunError(TrainingError):
    """A run that was stopped from outside and can go on; `exit_code` is what a shell expects, 130 for Ctrl-C."""

    def __init__(self, message: str, received: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + received


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes; raises TrainingError if there are none."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise TrainingError(
            f"nothing to train: none of the {sum(1 for _ in model.parameters())} parameters requires a gradient; "
            f"attach an adapter with get_peft_model, or load it with is_trainable=True"
        )
    return parameters


class EachDeltaLearns(TrainerCallback):
    """After the first steps, says which parameters got no gradient or did not move."""

    def __init__(self, model: nn.Module, warn: Any) -> None:
        self.warn = warn
        self._watch(trainable(model))

    def _watch(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.before = {name: _fingerprint(parameter) for name, parameter in parameters.items()}
        self.without_gradient = set(parameters)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Watch the parameters that are trained, where sharding has put others in the place of the model's."""
        parameters = trainable(model)
        if any(parameter is not self.parameters.get(name) for name, parameter in parameters.items()):
            self._watch(parameters)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Strike off the parameters that have a gradient by now."""
        if state.global_step < WATCHED_STEPS:
            got = {n for n in self.without_gradient if _has_gradient(self.parameters[n])}
            self.without_gradient -= got

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare once with the beginning; raises TrainingError if nothing at all has moved."""
        if state.global_step != WATCHED_STEPS:
            return
        resting = {n for n, p in self.parameters.items() if _fingerprint(p) == self.before[n]}
        # Of a sharded parameter any part counts that a process holds.
        resting = set.intersection(*of_all(resting))
        self.without_gradient = set.intersection(*of_all(self.without_gradient))
        if len(resting) == len(self.parameters):
            raise TrainingError(
                f"after {WATCHED_STEPS} steps none of the {len(resting)} trainable tensors has moved "
                f"({len(self.without_gradient)} of them got no gradient); check the learning rate and the targets"
            )
        if self.without_gradient:
            self.warn(f"no gradient reached {listing(self.without_gradient, 4)}: these stay as they are")
        elif resting:
            self.warn(f"{listing(resting, 4)} did not move: the learning rate is below what their type resolves")


class LastGood(TrainerCallback):
    """Keeps the weights with which loss and gradient were last numbers, and puts them back when they no longer are."""

    def __init__(self, model: nn.Module, has_copy: bool) -> None:
        self.step = 0
        self._keep(model, has_copy)

    def _keep(self, model: nn.Module, has_copy: bool) -> None:
        self.parameters = [local(parameter.detach()) for parameter in trainable(model).values()]
        self.copies = [parameter.clone() for parameter in self.parameters] if has_copy else []

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep the weights with which training begins, those of a checkpoint where it goes on from one."""
        self.step = state.global_step
        if model is not None and shards():
            # Those of the model are shards by now.
            self._keep(model, bool(self.copies))
        elif self.copies:
            _copy(self.parameters, self.copies)

    def check(self, loss: torch.Tensor, norm: torch.Tensor | float, args: Any, state: Any) -> None:
        """See that the loss since it was last logged, and the norm of the gradient, are numbers.

        Raises: DivergedError.
        """
        # One number for both: on a GPU each `float` waits until all kernels launched so far are done.
        if math.isfinite(float(loss + norm)):
            return
        if not math.isfinite(float(loss)):
            self.stop(f"the loss became {float(loss)}", args, state)
        self.stop(f"the norm of the gradient became {float(norm)}", args, state)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the present weights."""
        if self.copies:
            _copy(self.parameters, self.copies)
        self.step = state.global_step

    @torch.no_grad()
    def stop(self, what: str, args: Any, state: Any) -> None:
        """Restore the kept weights and raise DivergedError."""
        if self.copies:
            _copy(self.copies, self.parameters)
        raise DivergedError(
            f"{what} in step {state.global_step + 1}; lower the learning rate (now {args.learning_rate:g}), or look "
            f"at the examples of that step",
            kept_steps=self.step if self.copies else 0,
        )


class StopOnSignal(TrainerCallback):
    """Ends the training after the step in which a signal came; a second signal ends it at once."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the block; a thread, which gets none, changes nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        for each in SIGNALS:
            signal.signal(each, _at_once)
        # One of several processes gets it, too, when another one is gone: it is said once all of them stop.
        if this_process().count == 1:
            self.log(_STOPPING + "; once more to stop at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End after this step, with a checkpoint, all processes at the same step."""
        # A signal reaches them at different moments, or one of them alone.
        self.received = largest(self.received or 0) or None
        if self.received is not None:
            if this_process().count > 1:
                self.log(_STOPPING)
            control.should_save = control.should_training_stop = True


def _at_once(number: int, frame: Any) -> None:
    raise InterruptedRunError(
        f"stopped at once by {signal.Signals(number).name}; go on from the last checkpoint with --resume", number
    )


def _copy(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> None:
    torch._foreach_copy_(list(target), list(source))  # type: ignore[attr-defined]


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(local(parameter.grad).any())


def _fingerprint(parameter: nn.Parameter) -> tuple[float, float]:
    values = local(parameter.detach())
    return values.sum(dtype=torch.float64).item(), torch.linalg.vector_norm(values, dtype=torch.float64).item()
