"""EVA's start of an adapter from the examples that are to be learned."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from slimtune.adapters.adapter import attached
from slimtune.adapters.eva import initialize_lora_eva_weights
from slimtune.data.batches import PadRight, pad_id_of
from slimtune.data.tasks.base import EncodedDataset
from slimtune.methods.lora.layers import LoraLinear
from slimtune.recipe.training import TrainSettings
from slimtune.storage.tensor_tree import read_tree
from slimtune.train.checkpointing import WEIGHTS, Checkpoint, last_whole

ADAPTER = "default"
STREAMED_BATCHES = 64
"""As many of a stream are looked at."""


def start_by_eva(
    model: Any, tokenizer: Any, dataset: EncodedDataset, settings: TrainSettings, run: Path, log: Callable[[str], None]
) -> None:
    """Set ranks and directions as EVA finds them in the data; an adapter with another initialisation stays as it is.

    Args:
        run: the folder of the run; one that was broken off goes on with the ranks that its checkpoint has.

    Raises:
        ConfigError: too little data.
    """
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if getattr(config, "initialisation", None) != "eva":
        return
    checkpoint = last_whole(run)
    if checkpoint is not None:
        initialize_lora_eva_weights(model, eva_state_dict=_directions_in(checkpoint, model))
        return
    collate: Any = dataset.objective.collate if dataset.objective else PadRight(pad_id_of(tokenizer))
    is_stream = isinstance(dataset.examples, IterableDataset)
    draw = torch.Generator().manual_seed(settings.seed)
    batches = DataLoader(
        dataset.examples, settings.batch_size, shuffle=not is_stream, generator=draw, collate_fn=collate
    )
    # A stream never ends, and EVA reads its data again until its directions have converged.
    initialize_lora_eva_weights(model, list(islice(batches, STREAMED_BATCHES)) if is_stream else batches)
    ranks = [delta.trained[0].shape[0] for _, delta in attached(model, ADAPTER) if isinstance(delta, LoraLinear)]
    log(f"started by EVA from the data: ranks from {min(ranks)} to {max(ranks)} in {len(ranks)} layers")


def _directions_in(checkpoint: Checkpoint, model: Any) -> dict[str, Tensor]:
    """The A of each layer as training has left it; of a layer that has lost its rank, none of its rows."""
    stored = read_tree(checkpoint.path, WEIGHTS)["tensors"]
    directions = {}
    for site, delta in attached(model, ADAPTER):
        if isinstance(delta, LoraLinear):
            name = f"{site.name}.deltas.{ADAPTER}.lora_A"
            directions[site.name] = stored[name] if name in stored else delta.trained[0].detach()[:0]
    return directions
