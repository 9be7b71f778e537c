"""What the rows of a user's batches begin with alike: training computes it once, and so does the simulated step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from slimtune.data.prefixes import PrefixGroups, sample_batches, tokens_of
from slimtune.errors import ConfigError
from slimtune.models.shared_prefixes import check_kind
from slimtune.ops.prefix_tree import prefix_tree
from slimtune.plan.build import build
from slimtune.plan.memory import Setting, SharedRows, padded
from slimtune.plan.text_part import whole_of


@dataclass(frozen=True)
class Beginnings:
    """The examples of a data set by their token ids, of which batches are drawn.

    Attributes:
        examples: as they are encoded, cut to the longest that is read.
        are_grouped: whether batches are drawn of examples that begin alike.
    """

    examples: Sequence[Sequence[int]]
    are_grouped: bool = False

    def shared_in(self, setting: Setting) -> Setting:
        """The setting with the rows of its micro-batch, where sharing what they begin with pays."""
        shared = self.shared_rows(setting.batch)
        if shared is None:
            return setting
        return replace(setting, batch=len(shared.rows), sequence=max(map(len, shared.rows)), shared=shared)

    def shared_rows(self, batch: int) -> SharedRows | None:
        """The fullest of some micro-batches of this size; None where sharing doesn't pay.

        Looked at are as many batches as training looks at, and the longest examples together.
        """
        examples, size = self.examples, min(batch, len(self.examples))
        sampled = sample_batches(self._collate, len(examples), size, 0, self._groups if self.are_grouped else None)
        whole = tokens_of(sampled)
        if not whole.pays:
            return None
        longest = sorted(range(len(examples)), key=lambda number: len(examples[number]))[-size:]
        counted = [(batch.tokens.computed, batch.examples) for batch in sampled]
        counted += [(len(prefix_tree(**self._collate(longest), position_ids=None).tokens), longest)]
        tokens, rows = max(counted, key=lambda pair: pair[0])
        return SharedRows(tuple(tuple(examples[row]) for row in rows), tokens, whole.computed / whole.given)

    @cached_property
    def _groups(self) -> PrefixGroups:
        return PrefixGroups(self.examples)

    def _collate(self, numbers: Sequence[int]) -> Mapping[str, Tensor]:
        ids, mask = padded([self.examples[number] for number in numbers])
        return {"input_ids": ids, "attention_mask": mask}


def can_share(config: Any, task_type: str | None, trust_remote_code: bool = False) -> bool:
    """Whether models of this configuration are of a kind that shares; that this one does is tried before training."""
    if whole_of(config) is not None:
        # What is planned is the part for texts alone, to which the whole model gives embeddings.
        return False
    with torch.device("meta"):
        model = build(copy.deepcopy(config), Setting(trust_remote_code=trust_remote_code), task_type)
    try:
        check_kind(model)
    except ConfigError:
        return False
    return True
