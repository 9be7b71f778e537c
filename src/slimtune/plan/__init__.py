"""What a training will take, before it begins: memory, time and cost, and which method to choose.

`slimtune.plan(...)` is `slimtune.plan.plan.plan`: a package by this name can't be a function too, but it can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimtune.plan.plan import PlanReport


class _Plan(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> PlanReport:
        """`slimtune.plan.plan.plan`."""
        from slimtune.plan.plan import plan

        return plan(*args, **options)


sys.modules[__name__].__class__ = _Plan
