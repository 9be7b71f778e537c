"""Channels of a convolutional network left out, with all that depends on them, by torch-pruning.

Which tensors a channel is a row or a column of follows from how the network is put together; torch-pruning traces it
(Fang et al. 2023, arXiv:2301.12900). The channels of the least norm go, of each group of layers the same share.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from slimtune.console.progress import Watch
from slimtune.core.frozen import walk
from slimtune.errors import ConfigError, DataError, require
from slimtune.slim.structure import Batch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def drop_channels(model: Any, batches: Sequence[Batch], share: float, watch: Watch) -> tuple[Any, dict[str, Any]]:
    """A network with this share of the channels of its convolutions, and how many are left.

    What its last layer gives stays whole, and so does its input.

    Raises:
        ConfigError: a share that isn't between 0 and 1, or a network without convolutions.
        DataError: no batch to trace the network with.
        MissingDependencyError: torch-pruning isn't installed.
    """
    if isinstance(share, bool) or not 0 < share < 1:
        raise ConfigError(f"channels says which share of the channels is left, between 0 and 1, found {share!r}")
    convolutions = [name for name, module in walk(model) if isinstance(module, CONVOLUTIONS)]
    if len(convolutions) < 2:
        raise ConfigError(
            f"a {type(model).__name__} has {len(convolutions)} convolutions, and channels are those between several; "
            "prune a transformer's layers, ffn or kv_heads"
        )
    if not batches:
        raise DataError("the network is traced with a batch; pass one, as it is called with")
    require("torch-pruning", extra="pruning", purpose="pruning channels")
    import torch_pruning

    smaller = copy.deepcopy(model).eval()
    before = _channels(smaller)
    last = [module for _, module in walk(smaller) if isinstance(module, (nn.Linear, *CONVOLUTIONS))][-1]
    watch.start("pruning channels", 1)
    # It is called with a dictionary as keywords, which its annotation doesn't say.
    example: Any = dict(batches[0])
    pruner: Any = torch_pruning.pruner.BasePruner(
        smaller,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - share,
        ignored_layers=[last],
    )
    pruner.step()
    watch.step(1)
    return smaller, {"channels": _channels(smaller), "of": before}


def _channels(model: nn.Module) -> int:
    """The outputs of all convolutions."""
    return sum(module.out_channels for _, module in walk(model) if isinstance(module, CONVOLUTIONS))
