"""One training step run under a ledger: attach, forward, backward, update, and after them evaluation and merge."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from slimtune.adapters.model import get_peft_model
from slimtune.errors import ConfigError, MergeError
from slimtune.plan import step as generation
from slimtune.plan.build import build, kernels_of
from slimtune.plan.extrapolate import Blocks, Facts, Key, Sketch, block_list
from slimtune.plan.fake import FakeMemoryTracker, taken_for_real
from slimtune.plan.memory import Moment, Parts, Phase, Work
from slimtune.plan.memory_tracker import MemoryTracker, Places, Storage
from slimtune.plan.optimizers import is_elsewhere, optimizer_for
from slimtune.plan.setting import Setting
from slimtune.plan.step import Step, supervised_step
from slimtune.plan.trl_step import preferred_step
from slimtune.train.checks import LastGood

PARTS = tuple(Parts().named())


@dataclass
class Run:
    """A model, its ledger, and which storages are what.

    Attributes:
        owners: the part of a storage by the storage's identity.
        began: the number of the step's first operation.
        beyond_weights: the most that is there in loading beside what is kept: a layer before it is quantized.
        kept: what was there when a forward ended and not before it.
        reckoned: moments that were not run.
    """

    setting: Setting
    tracker: MemoryTracker
    model: Any
    step: Step
    last_good: LastGood
    beyond_weights: int
    facts: Facts
    owners: dict[int, str] = field(default_factory=dict)
    paged: set[int] = field(default_factory=set)
    began: int = 0
    kept: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    reckoned: list[Moment] = field(default_factory=list)

    def own(self, part: str, storages: Iterable[Storage]) -> None:
        """Note what storages are, unless they are known to be something else."""
        for storage in storages:
            self.owners.setdefault(id(storage), part)


def trace(
    config: Any,
    setting: Setting,
    task_type: str | None,
    fake: bool = True,
    steps: int = 1,
    evaluation: bool = False,
    merge: bool = False,
    rounded: Callable[[int], int] | None = None,
    blocks: Blocks | None = None,
) -> Sketch:
    """Run the setting on a model of this configuration, and sum up what it took.

    Args:
        fake: on tensors without data; else really, on the CPU.
        steps: one is enough for the steady state, which keeps what the first update leaves behind.
        blocks: where moments are told apart by the position of their block.
    """
    with kernels_of(setting, fake), taken_for_real() if fake else contextlib.nullcontext():
        run = prepare(config, setting, task_type, fake, rounded)
        train(run, steps)
        if setting.task == "grpo":
            _draw(run)
        if evaluation:
            _evaluate(run)
        if merge:
            _merge(run)
    return _sketch(run, blocks)


@contextlib.contextmanager
def _counting(tracker: MemoryTracker, phase: Phase) -> Any:
    tracker.phase = phase
    fake = tracker.fake if isinstance(tracker, FakeMemoryTracker) else contextlib.nullcontext()
    with fake, tracker:
        yield


def prepare(
    config: Any,
    setting: Setting,
    task_type: str | None,
    fake: bool = True,
    rounded: Callable[[int], int] | None = None,
) -> Run:
    """The model as the setting stores it, with the adapter attached. Raises: ConfigError, TargetError."""
    from transformers.initialization import no_init_weights

    builder = FakeMemoryTracker() if fake else MemoryTracker()
    beyond = 0
    with _counting(builder, "load"), no_init_weights() if fake else contextlib.nullcontext():
        model = build(config, setting, task_type)
        if setting.base != "dense":
            from slimtune.plan.quantize import quantize

            beyond = quantize(model, setting, builder)
    tracker = (
        FakeMemoryTracker(rounded, builder.fake) if isinstance(builder, FakeMemoryTracker) else MemoryTracker(rounded)
    )
    with _counting(tracker, "attach"):
        weights = tracker.of(_held(model, setting))
        if setting.method is not None:
            # A copy: attaching notes in a config what it found.
            model = get_peft_model(model, copy.deepcopy(setting.method))
        else:
            model.requires_grad_(True)
        model.train()
        if not _trained(model):
            raise ConfigError("nothing of the model would be trained; choose another method")
        # Training keeps a copy of an adapter, to go back to where the loss is no longer a number.
        last_good = LastGood(model, has_copy=setting.method is not None)
        step = preferred_step(model, setting, last_good) if setting.task else supervised_step(model, setting)
    run = Run(setting, tracker, model, step, last_good, beyond, _facts(model, setting))
    run.own("weights", weights)
    run.own("adapter", tracker.live())
    return run


def _facts(model: Any, setting: Setting) -> Facts:
    """What is counted without running: parameters as they are before quantization, and bytes."""
    found = block_list(model)
    blocks = list(found[1]) if found else []
    return Facts(
        depth=len(blocks),
        parameters=sum(_count(parameter) for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in _trained(model)),
        trainable_bytes=sum(parameter.nbytes for parameter in _trained(model)),
        block_bytes=max((sum(t.nbytes for t in _held(block, setting)) for block in blocks), default=0),
        trainable_block_bytes=max((sum(p.nbytes for p in _trained(block)) for block in blocks), default=0),
    )


def _count(parameter: Any) -> int:
    """How many numbers a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _held(model: nn.Module, setting: Setting) -> list[torch.Tensor]:
    if setting.base == "dense":
        return [*model.parameters(), *model.buffers()]
    from slimtune.plan.quantize import tensors_of

    return tensors_of(model)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(run: Run, steps: int = 1) -> None:
    """Training steps, each storage of them counted. Raises: ConfigError."""
    tracker, setting, model = run.tracker, run.setting, run.model
    trained = _trained(model)
    optimizer = optimizer_for(setting, trained)
    with _counting(tracker, "forward"):
        batch = run.step.batch()
        run.own("activations", tracker.of(value for value in batch.values() if isinstance(value, torch.Tensor)))
    run.began = tracker.time
    tracker.places = Places(model, _head(model))
    autocast = torch.autocast("cpu", torch.bfloat16) if setting.autocast else contextlib.nullcontext()
    with tracker.places.watched():
        for _ in range(steps):
            # A third micro-batch finds what the second one found.
            for _ in range(min(setting.accumulation, 2)):
                with _counting(tracker, "forward"), autocast:
                    before = {id(storage) for storage in tracker.live()}
                    loss = run.step.loss(batch)
                    kept = [storage for storage in tracker.live() if id(storage) not in before]
                run.kept |= {id(storage) for storage in kept}
                with _counting(tracker, "backward"):
                    (loss / setting.accumulation if setting.accumulation > 1 else loss).backward()
                    del loss
                    run.own("gradients", tracker.of(p.grad for p in trained if p.grad is not None))
            with _counting(tracker, "update"):
                optimizer.step()
                for parameter in trained:
                    state = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)]
                    run.own("optimizer", tracker.of(state))
                    elsewhere = [tensor for tensor in state if is_elsewhere(setting, parameter, tensor)]
                    run.paged |= {id(storage) for storage in tracker.of(elsewhere)}
                optimizer.zero_grad()
    # What is still there belongs to the method: it keeps it from step to step.
    run.own("adapter", [s for s in tracker.live() if s.born >= run.began])
    if steps == 1:
        for storage in tracker.live():
            storage.born = min(storage.born, run.began)


def _head(model: Any) -> str:
    """The path of the layer after which the loss comes."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [name for name, module in model.named_modules() if module is output]
    last = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    return names[0] if names else last[-1]


def _evaluate(run: Run) -> None:
    model = run.model.eval()
    with _counting(run.tracker, "evaluation"), run.tracker.places.watched(), torch.no_grad():  # type: ignore[union-attr]
        run.step.loss(run.step.batch())
    model.train()


def _draw(run: Run) -> None:
    """Draw the answers of a step, all of them at once."""
    setting, tracker, model = run.setting, run.tracker, run.model.eval()
    rows, prompt, answer = setting.batch * setting.accumulation, setting.sequence, setting.drawn_tokens
    head = model.get_output_embeddings().weight
    lasting = _parts_of(run, tracker.live())
    with _counting(tracker, "generation"), tracker.places.watched(), torch.no_grad():  # type: ignore[union-attr]
        cache = generation.read_prompts(model, rows, prompt)
        run.own("activations", tracker.of(tensor for layer in generation.layers_of(cache) for tensor in layer))
        run.reckoned.append(generation.last_token(lasting, cache, prompt, answer, head))
        prompts = tracker.work.get("generation", Work())
        tracker.work["generation"] = generation.work_of(prompts, lasting, cache, prompt, answer, head)
    run.notes.append(generation.NOTE)
    model.train()


def _merge(run: Run) -> None:
    if run.setting.method is None:
        return
    with _counting(run.tracker, "merge"):
        try:
            run.model.merge_and_unload()
        except MergeError as error:
            run.notes.append(f"it can't be merged: {error}")


def _sketch(run: Run, blocks: Blocks | None) -> Sketch:
    """The fullest moment of each phase and place, and the totals."""
    live = _timeline(run)
    totals = live.sum(0)
    moments: dict[Key, Moment] = {("load", "", False): _load(run)}
    for operation in run.tracker.operations:
        place = operation.place
        label = blocks.label(place.module, run.facts.depth) if blocks else place.module
        key = operation.phase, label or "", place.in_loss
        total = int(totals[operation.time])
        if label is not None and (key not in moments or total > moments[key].total):
            parts = Parts(**{name: int(live[i, operation.time]) for i, name in enumerate(PARTS)})
            moments[key] = Moment(operation.phase, place.module, operation.name, parts)
    moments |= {(moment.phase, moment.module, False): moment for moment in run.reckoned}
    return Sketch(
        moments=moments,
        activations=_activations(run),
        facts=run.facts,
        paged_bytes=sum(s.nbytes for s in run.tracker.storages if id(s) in run.paged),
        work=dict(run.tracker.work),
        notes=tuple(run.notes),
    )


def _load(run: Run) -> Moment:
    """Weights come one by one, and one that is quantized is there in its dense form until it is done."""
    weights = sum(s.nbytes for s in run.tracker.storages if run.owners.get(id(s)) == "weights")
    return Moment("load", "", "", Parts(weights=weights, workspace=run.beyond_weights))


def _part(run: Run, storage: Storage) -> str:
    known = run.owners.get(id(storage))
    if known is not None:
        return known
    if storage.place.in_loss:
        return "loss"
    return "activations" if id(storage) in run.kept else "workspace"


def _parts_of(run: Run, storages: Iterable[Storage]) -> Parts:
    found = dict.fromkeys(PARTS, 0)
    for storage in storages:
        if id(storage) not in run.paged:
            found[_part(run, storage)] += storage.nbytes
    return Parts(**found)


def _timeline(run: Run) -> np.ndarray:
    """Live bytes of each part (rows) at each operation (columns)."""
    tracker = run.tracker
    changes = np.zeros((len(PARTS), tracker.time + 2), dtype=np.int64)
    for storage in tracker.storages:
        if id(storage) not in run.paged and storage.died >= storage.born:
            row = PARTS.index(_part(run, storage))
            changes[row, storage.born] += storage.nbytes
            changes[row, min(storage.died, tracker.time) + 1] -= storage.nbytes
    return changes.cumsum(1)


def _activations(run: Run) -> dict[str, int]:
    """What is kept for the backward pass, by module, all blocks together."""
    found: dict[str, int] = {}
    for storage in run.tracker.storages:
        if id(storage) in run.kept and _part(run, storage) == "activations":
            name = re.sub(r"\.\d+(?=\.|$)", ".*", storage.place.module)
            found[name] = found.get(name, 0) + storage.nbytes
    return found
