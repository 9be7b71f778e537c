"""`ensure_weight_tying`: ends of one weight that stay one, whichever of them is trained.

LoRA on an embedding has A (r, rows) and B (dim, r); the output layer that is tied to it has A' = B^T and B' = A^T, so
that both are E + s A^T B^T. Of a copy that is trained whole, the other end reads the same copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from slimtune.core.delta import Delta
from slimtune.core.frozen import Site
from slimtune.errors import ConfigError, warn
from slimtune.methods.lora.layers import LoraEmbedding, LoraLinear
from slimtune.methods.trainable_tokens import tied_to


class TiedLinear(LoraLinear):
    """y_TV = base(x_TD) + s * (x_TD B_DR) A_RV, with the factors of the embedding that the layer is tied to.

    Attributes:
        leader: the embedding's delta, in a tuple so that it isn't a part of this one.
    """

    leader: tuple[LoraEmbedding, ...] = ()

    def share(self, leader: LoraEmbedding) -> None:
        """Train the embedding's factors instead of one's own."""
        del self.lora_A, self.lora_B
        self.leader = (leader,)

    @property
    def trained(self) -> tuple[Any, Any]:
        if not self.leader:
            return super().trained
        a_RV, b_DR = self.leader[0].trained
        # Views: the gradients of both ends reach the embedding's two parameters through them, and are added there.
        return b_DR.t(), a_RV.t()

    def initialise(self, config: Any, site: Site) -> None:
        """Nothing: the embedding's factors are set where it is initialised."""

    def to_disk(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Both factors: `peft` stores them under the name of each end."""
        a, b = (factor.detach() for factor in self.trained)
        return super().to_disk({**own, "lora_A": a, "lora_B": b})


class TiedCopy(Delta):
    """The other end of an embedding or output layer that is trained whole; what else it owns is trained here."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.hold_all(site)

    def share(self, owner: Delta) -> None:
        """Read the copy of the weight that another delta trains."""
        # One parameter for both ends; a bias of the output layer, if there is one, stays its own.
        del self.whole["weight"]
        self.tied = {"weight": (owner, "weight")}

    def to_disk(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight as well: `peft` stores it under the name of each end."""
        return super().to_disk({**own, "whole.weight": self.stand_ins()["weight"].detach()})


def ends(
    modules: Mapping[str, nn.Module], chosen: Iterable[str], saved: Sequence[str], config: Any
) -> tuple[dict[str, str], dict[str, str]]:
    """What is tied to a module with LoRA, or to one that is trained whole.

    Returns:
        By the name of each end, of LoRA the embedding whose factors it has, of copies the module whose copy it reads.

    Raises:
        ConfigError: a kind of LoRA that has no tied form.
    """
    lora: dict[str, str] = {}
    copies: dict[str, str] = {}
    kept = [name for name, module in modules.items() if "weight" in module._parameters and is_named(name, saved)]
    for name in chosen:
        # Whichever end was named: in `peft`, too, the other one follows.
        group = [name, *tied_to([name], modules)]
        embedding = next((n for n in group if isinstance(modules[n], nn.Embedding)), None)
        if len(group) > 1 and embedding is not None:
            lora |= {n: embedding for n in group if n != embedding} | {embedding: embedding}
    for name in kept:
        copies |= {n: name for n in tied_to([name], modules) if n not in copies.values()}
    scales = {name: config.scale_for(name) for name in lora}
    if len(set(scales.values())) > 1 and not config.inference_mode:
        # peft gives each end the scale of its own name, and so its files mean that.
        raise ConfigError(
            f"ensure_weight_tying needs one scale for both ends of a weight, found {scales}; name both of them in "
            "rank_pattern and alpha_pattern"
        )
    if lora and config.use_dora:
        raise ConfigError(f"DoRA has no tied form, and {', '.join(sorted(lora))} are one weight; leave them out of it")
    if not (lora or copies or config.trainable_token_indices or config.inference_mode):
        warn("ensure_weight_tying=True changes nothing: no tied weight is among those trained")
    return lora, copies


def is_named(path: str, names: Sequence[str]) -> bool:
    """Whether one of these names, endings of paths, means the module of this path."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def share_ends(drafted: list[tuple[Site, Any]], lora: Mapping[str, str], copies: Mapping[str, str]) -> None:
    """Link the deltas of tied ends; those that are trained whole may both have been asked for."""
    deltas = {site.name: delta for site, delta in drafted}
    for i, (site, delta) in enumerate(drafted):
        if isinstance(delta, TiedLinear):
            delta.share(deltas[lora[site.name]])
        elif site.name in copies:
            other = TiedCopy(site)
            other.share(deltas[copies[site.name]])
            drafted[i] = (site, other)
