"""One training step run under a memory tracker: attach, forward, backward, update, and then evaluation and merge."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from slimtune.adapters.model import get_peft_model
from slimtune.errors import ConfigError, MergeError
from slimtune.models.shared_prefixes import shared_prefixes
from slimtune.plan.build import build, kernels_of
from slimtune.plan.extrapolate import Blocks, Key, ModelCounts, TraceSummary, block_list
from slimtune.plan.memory import MemoryBreakdown, Phase, Setting, Snapshot, Work
from slimtune.plan.memory_tracker import FakeMemoryTracker, MemoryTracker, ModuleLocator, Storage, taken_for_real
from slimtune.plan.quantize import quantize, tensors_of
from slimtune.plan.step import (
    GENERATION_NOTE,
    Step,
    generation_work,
    is_elsewhere,
    last_token,
    layers_of,
    optimizer_for,
    prefill,
    supervised_step,
)
from slimtune.train.checks import LastGood

CATEGORIES = tuple(MemoryBreakdown().named())


@dataclass
class TracedRun:
    """A model under a memory tracker, and the categories of its storages.

    Attributes:
        categories: the category of a storage by the storage's identity, as `MemoryBreakdown` has them.
        began: the number of the step's first operation.
        loading_overhead: the most that is there in loading beside what is kept: a layer before it is quantized.
        saved_for_backward: storages that were there when a forward pass ended and not before it.
        estimated: snapshots of what was not run.
    """

    setting: Setting
    tracker: MemoryTracker
    model: Any
    step: Step
    last_good: LastGood
    loading_overhead: int
    counts: ModelCounts
    categories: dict[int, str] = field(default_factory=dict)
    paged: set[int] = field(default_factory=set)
    began: int = 0
    saved_for_backward: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    estimated: list[Snapshot] = field(default_factory=list)

    def assign(self, category: str, storages: Iterable[Storage]) -> None:
        """Put storages into a category, unless they are in one."""
        for storage in storages:
            self.categories.setdefault(id(storage), category)


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
) -> TraceSummary:
    """Run the setting on a model of this configuration, and sum up what it took.

    Args:
        fake: on tensors without data; else really, on the CPU.
        steps: one is enough for the steady state, which keeps what the first update leaves behind.
        blocks: if given, snapshots are kept by the position of their block, for `extrapolate`.
    """
    with _older_objects_left_alone(), kernels_of(setting, fake), taken_for_real() if fake else contextlib.nullcontext():
        run = prepare(config, setting, task_type, fake, rounded)
        with shared_prefixes(run.model) if setting.shared else contextlib.nullcontext():
            train(run, steps)
            if setting.task == "grpo":
                _generate(run)
            if evaluation:
                _evaluate(run)
        if merge:
            _merge(run)
    return _summary(run, blocks)


@contextlib.contextmanager
def _older_objects_left_alone() -> Iterator[None]:
    """Collect no garbage among what was there before: a trace makes many objects, and libraries a million of them."""
    # Somebody who froze objects will unfreeze them.
    is_ours = not gc.get_freeze_count()
    if is_ours:
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()


@contextlib.contextmanager
def _tracking(tracker: MemoryTracker, phase: Phase) -> Any:
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
) -> TracedRun:
    """The model as the setting stores it, with the adapter attached. Raises: ConfigError, TargetError."""
    from transformers.initialization import no_init_weights

    # Two trackers: what building allocates beside the weights is gone before training, and must not count there.
    builder = FakeMemoryTracker() if fake else MemoryTracker()
    overhead = 0
    with _tracking(builder, "load"), no_init_weights() if fake else contextlib.nullcontext():
        model = build(config, setting, task_type)
        if setting.is_quantized:
            overhead = quantize(model, setting, builder)
    tracker = (
        FakeMemoryTracker(rounded, builder.fake) if isinstance(builder, FakeMemoryTracker) else MemoryTracker(rounded)
    )
    with _tracking(tracker, "attach"):
        # Claimed before the adapter is attached, so that `adapter` is what appears between here and the end of
        # attaching.
        weights = tracker.storages_of(_stored_tensors(model, setting))
        if setting.method is not None:
            # A copy: attaching writes the resolved targets into a config.
            model = get_peft_model(model, copy.deepcopy(setting.method))
        else:
            model.requires_grad_(True)
        model.train()
        if not _trained(model):
            raise ConfigError("nothing of the model would be trained; choose another method")
        # Training keeps a copy of an adapter, to go back to where the loss is no longer a number.
        last_good = LastGood(model, has_copy=setting.method is not None)
        step = _preference_step(model, setting, last_good) if setting.task else supervised_step(model, setting)
    run = TracedRun(setting, tracker, model, step, last_good, overhead, _counts(model, setting))
    # The first category that a storage gets is its own: tied weights and views count once.
    run.assign("weights", weights)
    run.assign("adapter", tracker.live())
    return run


def _preference_step(model: Any, setting: Setting, last_good: LastGood) -> Step:
    # Imported where it is needed: transformers' Trainer takes longer than most plans.
    from slimtune.plan.preference_step import preference_step

    return Step(*preference_step(model, setting, last_good))


def _counts(model: Any, setting: Setting) -> ModelCounts:
    """What is counted without running: parameters as they are before quantization, and bytes."""
    # FSDP2 shards by block, so that the largest block says what is gathered at once.
    named = block_list(model)
    blocks = list(named[1]) if named else []
    return ModelCounts(
        depth=len(blocks),
        parameters=sum(_count(parameter) for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in _trained(model)),
        trainable_bytes=sum(parameter.nbytes for parameter in _trained(model)),
        block_bytes=max((sum(t.nbytes for t in _stored_tensors(block, setting)) for block in blocks), default=0),
        trainable_block_bytes=max((sum(p.nbytes for p in _trained(block)) for block in blocks), default=0),
    )


def _count(parameter: Any) -> int:
    """How many numbers a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _stored_tensors(model: nn.Module, setting: Setting) -> list[torch.Tensor]:
    if not setting.is_quantized:
        return [*model.parameters(), *model.buffers()]
    return tensors_of(model)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(run: TracedRun, steps: int = 1) -> None:
    """Run training steps and put each of their storages into a category. Raises: ConfigError."""
    tracker, setting, model = run.tracker, run.setting, run.model
    trained = _trained(model)
    optimizer = optimizer_for(setting, trained)
    with _tracking(tracker, "forward"):
        batch = run.step.batch()
        inputs = (value for value in batch.values() if isinstance(value, torch.Tensor))
        run.assign("activations", tracker.storages_of(inputs))
    run.began = tracker.time
    tracker.locator = ModuleLocator(model, _head(model))
    autocast = torch.autocast("cpu", torch.bfloat16) if setting.autocast else contextlib.nullcontext()
    with tracker.locator.following():
        for _ in range(steps):
            # One micro-batch; of an accumulation a later one, which finds gradients to add to.
            with gradients(run, trained) if setting.accumulation > 1 else contextlib.nullcontext():
                with _tracking(tracker, "forward"), autocast:
                    # What is there after the forward pass and was not before it is kept for the backward pass:
                    # activations and masks.
                    before = {id(storage) for storage in tracker.live()}
                    loss = run.step.loss(batch)
                    saved_for_backward = [storage for storage in tracker.live() if id(storage) not in before]
                run.saved_for_backward |= {id(storage) for storage in saved_for_backward}
                with _tracking(tracker, "backward"):
                    (loss / setting.accumulation if setting.accumulation > 1 else loss).backward()
                    del loss
            with _tracking(tracker, "backward"):
                # After backward() only leaves have a gradient; those of activations came and went within it
                # (workspace).
                run.assign("gradients", tracker.storages_of(p.grad for p in trained if p.grad is not None))
            with _tracking(tracker, "update"):
                # The state appears with the first step (Adam: two moments and a counter for each parameter).
                optimizer.step()
                for parameter in trained:
                    state = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)]
                    run.assign("optimizer", tracker.storages_of(state))
                    elsewhere = [tensor for tensor in state if is_elsewhere(setting, parameter, tensor)]
                    run.paged |= {id(storage) for storage in tracker.storages_of(elsewhere)}
                optimizer.zero_grad()
    # What is still there after the step belongs to the method, which keeps it from step to step.
    run.assign("adapter", [s for s in tracker.live() if s.born >= run.began])
    if steps == 1:
        # The steady state: what the first update leaves behind is there from the beginning of the next step.
        for storage in tracker.live():
            storage.born = min(storage.born, run.began)


@contextlib.contextmanager
def gradients(run: TracedRun, trained: list[nn.Parameter]) -> Iterator[None]:
    """Gradients as earlier micro-batches leave them; what gets none within the block never had one."""
    tracker = run.tracker
    with tracker.fake if isinstance(tracker, FakeMemoryTracker) else contextlib.nullcontext():
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    tracked = {id(parameter): tracker.storages_of([parameter.grad]) for parameter in trained}  # type: ignore[list-item]
    learned: set[int] = set()
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: learned.add(id(parameter)))
        for parameter in trained
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for parameter in trained:
        if id(parameter) not in learned:
            parameter.grad = None
            for storage in tracked[id(parameter)]:
                storage.died = storage.born - 1


def _head(model: Any) -> str:
    """The path of the layer after which the loss comes."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [name for name, module in model.named_modules() if module is output]
    last = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    return names[0] if names else last[-1]


def _evaluate(run: TracedRun) -> None:
    model = run.model.eval()
    with _tracking(run.tracker, "evaluation"), run.tracker.locator.following(), torch.no_grad():  # type: ignore[union-attr]
        run.step.loss(run.step.batch())
    model.train()


def _generate(run: TracedRun) -> None:
    """Generate the answers of a step, all of them at once."""
    setting, tracker, model = run.setting, run.tracker, run.model.eval()
    rows, prompt, answer = setting.batch * setting.accumulation, setting.sequence, setting.drawn_tokens
    head = model.get_output_embeddings().weight
    # What lasts between steps: weights, adapter, optimizer state; generation has no gradients.
    persistent = _breakdown_of(run, tracker.live())
    with _tracking(tracker, "generation"), tracker.locator.following(), torch.no_grad():  # type: ignore[union-attr]
        cache = prefill(model, rows, prompt)
        run.assign("activations", tracker.storages_of(tensor for layer in layers_of(cache) for tensor in layer))
        run.estimated.append(last_token(persistent, cache, prompt, answer, head))
        prompts = tracker.work.get("generation", Work())
        tracker.work["generation"] = generation_work(prompts, persistent, cache, prompt, answer, head)
    run.notes.append(GENERATION_NOTE)
    model.train()


def _merge(run: TracedRun) -> None:
    if run.setting.method is None:
        return
    with _tracking(run.tracker, "merge"):
        try:
            run.model.merge_and_unload()
        except MergeError as error:
            run.notes.append(f"it can't be merged: {error}")


def _summary(run: TracedRun, blocks: Blocks | None) -> TraceSummary:
    """The peak of each phase and module, and the totals."""
    # (categories, operations + 2) int64: for 7 categories and the 100,000 operations of a large step 6 MB.
    live = _timeline(run)
    # Bytes that are live at each operation; the peak of a phase is the largest of its operations.
    totals = live.sum(0)
    snapshots: dict[Key, Snapshot] = {("load", "", False): _loading_peak(run)}
    for operation in run.tracker.operations:
        location = operation.location
        label = blocks.label(location.module, run.counts.depth) if blocks else location.module
        # Peaks are kept by phase and module, for `extrapolate` continues each of them on its own.
        key = operation.phase, label or "", location.in_loss
        total = int(totals[operation.time])
        if label is not None and (key not in snapshots or total > snapshots[key].total):
            parts = MemoryBreakdown(**{name: int(live[i, operation.time]) for i, name in enumerate(CATEGORIES)})
            snapshots[key] = Snapshot(operation.phase, location.module, operation.name, parts)
    snapshots |= {(snapshot.phase, snapshot.module, False): snapshot for snapshot in run.estimated}
    return TraceSummary(
        snapshots=snapshots,
        activations=_activations(run),
        counts=run.counts,
        paged_bytes=sum(s.nbytes for s in run.tracker.storages if id(s) in run.paged),
        work=dict(run.tracker.work),
        notes=tuple(run.notes),
    )


def _loading_peak(run: TracedRun) -> Snapshot:
    """Weights come one by one, and one that is quantized is there in its dense form until it is done."""
    # In loading nothing else is there: no adapter, no gradients, no optimizer.
    weights = sum(s.nbytes for s in run.tracker.storages if run.categories.get(id(s)) == "weights")
    return Snapshot("load", "", "", MemoryBreakdown(weights=weights, workspace=run.loading_overhead))


def _category_of(run: TracedRun, storage: Storage) -> str:
    known = run.categories.get(id(storage))
    if known is not None:
        return known
    if storage.location.in_loss:
        return "loss"
    return "activations" if id(storage) in run.saved_for_backward else "workspace"


def _breakdown_of(run: TracedRun, storages: Iterable[Storage]) -> MemoryBreakdown:
    # Paged state is in main memory until the step reads it, and takes no room on the device.
    nbytes = dict.fromkeys(CATEGORIES, 0)
    for storage in storages:
        if id(storage) not in run.paged:
            nbytes[_category_of(run, storage)] += storage.nbytes
    return MemoryBreakdown(**nbytes)


def _timeline(run: TracedRun) -> np.ndarray:
    """Live bytes of each category (rows) at each operation (columns), int64."""
    tracker = run.tracker
    changes = np.zeros((len(CATEGORIES), tracker.time + 2), dtype=np.int64)
    for storage in tracker.storages:
        if id(storage) not in run.paged and storage.died >= storage.born:
            row = CATEGORIES.index(_category_of(run, storage))
            # A difference array: + at birth, - behind death, and the running sum is what is live.
            changes[row, storage.born] += storage.nbytes
            changes[row, min(storage.died, tracker.time) + 1] -= storage.nbytes
    # What appears and goes at each operation, summed up from the first one on.
    return changes.cumsum(1)


def _activations(run: TracedRun) -> dict[str, int]:
    """Bytes saved for the backward pass by module, all blocks together: `layers.3.mlp` counts as `layers.*.mlp`."""
    activations: dict[str, int] = {}
    for storage in run.tracker.storages:
        if id(storage) in run.saved_for_backward and _category_of(run, storage) == "activations":
            name = re.sub(r"\.\d+(?=\.|$)", ".*", storage.location.module)
            activations[name] = activations.get(name, 0) + storage.nbytes
    return activations
