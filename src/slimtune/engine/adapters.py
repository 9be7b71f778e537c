"""The adapters that an engine answers with: what of each one the loop must know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slimtune.adapters.adapter import attached, detach
from slimtune.core.frozen import deltas_of
from slimtune.engine.request import LoadedAdapter
from slimtune.methods.prompt.prefix_tuning import Prefix
from slimtune.methods.prompt.prompt_tuning import SoftPrompt


@dataclass(eq=False)
class ServedAdapter:
    """An adapter on the model.

    Attributes:
        name: by which requests ask for it.
        attached_as: its name on the model. Never used twice, so that nothing that was kept of an adapter, such as keys
            and values, can be taken for another one's of the same name.
        loaded: what users are told of it.
        alone: it changes parameters that all rows of a batch share, so that its rows get steps of their own.
        virtual: how many virtual tokens stand in front of its prompts.
        embeddings: of these, (virtual, dim), where they are read as tokens.
        pairs: of these, the keys and values of each layer, (heads, virtual, head_dim), where they are a prefix.
        requests: how many are waiting or running.
        leaving: it is being unloaded.
    """

    name: str
    attached_as: str
    loaded: LoadedAdapter
    alone: bool
    virtual: int = 0
    embeddings: Tensor | None = None
    pairs: list[tuple[Tensor, Tensor]] | None = None
    requests: int = 0
    leaving: bool = False


def detach_served(model: Any, adapter: ServedAdapter) -> None:
    """Take an adapter off the model; its memory is free then."""
    name = adapter.attached_as
    if name in model.active_adapters:
        model.delete_adapter(name)
        return
    # Without making any other adapter active, which would go through all parameters of all adapters.
    detach(model, name)
    del model.peft_config[name]


def served(model: Any, name: str, attached_as: str) -> ServedAdapter:
    """What an engine must know of an adapter that is on the model."""
    deltas = [delta for _, delta in attached(model, attached_as)]
    # By identity: VeRA's projection is one pair of tensors in all layers, and counts once.
    own = {id(tensor): tensor for delta in deltas for tensor in (*delta.parameters(), *delta.buffers())}
    ranks: list[int] = [rank for rank in (getattr(delta, "r", None) for delta in deltas) if isinstance(rank, int)]
    loaded = LoadedAdapter(
        name=name,
        method=str(model.peft_config[attached_as].peft_type),
        rank=max(ranks, default=None),
        bytes=sum(tensor.nbytes for tensor in own.values()),
    )
    at_root = dict(deltas_of(model).items()).get(attached_as)
    # The root apart: a soft prompt wraps the whole model and yet changes no parameter.
    result = ServedAdapter(name, attached_as, loaded, any(d.reweighs for d in deltas if d is not at_root))
    if isinstance(at_root, SoftPrompt):
        result.virtual = at_root.count
        # Computed once: at rest P is constant, and an encoder in front of it has done its work.
        result.embeddings = at_root.prompt()[: at_root.count].detach()
    elif isinstance(at_root, Prefix):
        result.virtual = at_root.count
        result.pairs = [(keys.detach(), values.detach()) for keys, values in at_root.pairs(model.dtype)]
    return result
