"""Where one training step spends its time and its memory: the operators and the tensors that weigh most."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as run_profiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from benchmarks.worker import Trainer

TORCH = str(Path(torch.__file__).parent)
HERE = str(Path(__file__).parent)
NEW_SNAPSHOT = 1.01
"""A peak is looked at anew when it has grown by this factor: a look at every new peak would cost too much."""


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operators allocate, and keeps what was alive near the peak.

    What an operator allocates and frees inside of itself isn't seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, str]] = {}
        self.bytes = 0
        self.peak_bytes = 0
        self.at_peak: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.watch(leaf, f"{func.overloadpacket} {tuple(leaf.shape)} {leaf.dtype} | {origin()}")
        return result

    def watch(self, tensor: torch.Tensor, label: str) -> None:
        """Count the storage of a tensor until it is freed; that of a view is counted already."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.live:
            return
        self.live[key] = (storage.nbytes(), label)
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self.forget, key)
        if self.bytes > self.peak_bytes * NEW_SNAPSHOT:
            self.peak_bytes, self.at_peak = self.bytes, dict(self.live)

    def forget(self, key: int) -> None:
        self.bytes -= self.live.pop(key)[0]


def origin() -> str:
    """The innermost line of Python outside of torch and of this folder; the C++ backward has none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((TORCH, HERE, "<")):
            return f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"


def operators(trainer: Trainer, rows: int) -> dict[str, Any]:
    """The operators of one step with the most time of their own, all together and by the shapes they got."""
    on_gpu = trainer.work.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with run_profiler(activities=activities, record_shapes=True) as profiler:
        trainer.step()

    def own_us(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    def heaviest(by_shape: bool) -> list[dict[str, Any]]:
        events = sorted(profiler.key_averages(group_by_input_shape=by_shape), key=own_us, reverse=True)
        total = sum(map(own_us, events))
        return [
            {
                "operator": f"{event.key} {[s for s in event.input_shapes if s]}" if by_shape else event.key,
                "calls": event.count,
                "seconds": own_us(event) / 1e6,
                "share": own_us(event) / total,
            }
            for event in events[:rows]
        ]

    return {"operators": heaviest(by_shape=False), "shapes": heaviest(by_shape=True)}


def tensors(trainer: Trainer, rows: int) -> dict[str, Any]:
    """The tensors of one step that were alive at its peak, added up by what made them and where."""
    watcher = LiveTensors()
    for tensor in chain(trainer.model.parameters(), trainer.model.buffers()):
        watcher.watch(tensor, f"parameters and buffers {tensor.dtype}")
    with watcher:
        trainer.step()
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for size, label in watcher.at_peak.values():
        sizes[label] += size
        counts[label] += 1
    return {
        "peak_bytes": watcher.peak_bytes,
        "tensors": [{"made": k, "count": counts[k], "bytes": b} for k, b in sizes.most_common(rows)],
    }


def profile_step(trainer: Trainer, rows: int = 20) -> dict[str, Any]:
    """Time and memory of a step that is not the first."""
    trainer.step()
    plain = trainer.step()
    return {"metrics": plain, **operators(trainer, rows), **tensors(trainer, rows)}
