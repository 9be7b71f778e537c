"""A setting simulated and really run, both under the same counter of live storages."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimtune.plan.memory import MemoryPlan, Setting
from slimtune.plan.memory_tracker import MemoryTracker
from slimtune.plan.simulate import plan_of, quiet
from slimtune.plan.trace import trace


def both(config: Any, setting: Setting, **phases: bool) -> tuple[MemoryPlan, MemoryPlan]:
    """The plan by simulation, and by two steps that are really taken; `config` makes a new configuration."""
    with quiet():
        simulated = trace(config(), setting, setting.task_type, **phases)
        really = trace(config(), setting, setting.task_type, fake=False, steps=2, **phases)
    return plan_of(simulated, setting), plan_of(really, setting)


def peak_of(tracker: MemoryTracker) -> int:
    """The most bytes that were live at once."""
    changes = np.zeros(tracker.time + 2, dtype=np.int64)
    for storage in tracker.storages:
        if storage.died >= storage.born:
            changes[storage.born] += storage.nbytes
            changes[min(storage.died, tracker.time) + 1] -= storage.nbytes
    return int(changes.cumsum().max())
