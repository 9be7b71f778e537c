"""What the rows of a user's batches begin with alike: training computes it once, and so does the simulated step."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from slimtune.errors import ConfigError
from slimtune.models.shared_prefixes import SAMPLED, WORTHWHILE, check_kind
from slimtune.ops.prefix_tree import prefix_tree
from slimtune.plan.build import build
from slimtune.plan.memory import Setting, SharedRows, padded


@dataclass(frozen=True)
class Beginnings:
    """The examples of a data set by their token ids, of which batches are drawn.

    Attributes:
        examples: as they are encoded, cut to the longest that is read.
    """

    examples: Sequence[Sequence[int]]

    def shared_in(self, setting: Setting) -> Setting:
        """The setting with the rows of its micro-batch, where sharing what they begin with pays."""
        if getattr(setting.method, "is_prompt_learning", False):
            return setting
        shared = self.shared_rows(setting.batch)
        if shared is None:
            return setting
        return replace(setting, batch=len(shared.rows), sequence=max(map(len, shared.rows)), shared=shared)

    def shared_rows(self, batch: int) -> SharedRows | None:
        """The fullest of some micro-batches of this size; None where sharing doesn't pay.

        Looked at are as many batches as training looks at, and the longest examples together.
        """
        size = min(batch, len(self.examples))
        drawn = random.Random(0)
        batches = [drawn.sample(self.examples, size) for _ in range(SAMPLED)]
        given = sum(size * max(map(len, rows)) for rows in batches)
        computed = [_computed(rows) for rows in batches]
        if sum(computed) > WORTHWHILE * given:
            return None
        longest = sorted(self.examples, key=len)[-size:]
        tokens, rows = max(
            ((count, rows) for count, rows in zip([*computed, _computed(longest)], [*batches, longest], strict=True)),
            key=lambda pair: pair[0],
        )
        return SharedRows(tuple(tuple(row) for row in rows), tokens, sum(computed) / given)


def _computed(rows: Sequence[Sequence[int]]) -> int:
    return len(prefix_tree(*padded(rows), None).tokens)


def can_share(config: Any, task_type: str | None, trust_remote_code: bool = False) -> bool:
    """Whether models of this configuration are of a kind that shares; that this one does is tried before training."""
    with torch.device("meta"):
        model = build(copy.deepcopy(config), Setting(trust_remote_code=trust_remote_code), task_type)
    try:
        check_kind(model)
    except ConfigError:
        return False
    return True
