"""Trainable tokens: rows of an embedding are trained, all others stay frozen.

E'[t] = R[i] if t is the i-th chosen token, else E[t]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.config import TargetedConfig, Whereabouts, register
from slimtune.core.delta import Delta, trainable_dtype, wrong_kind
from slimtune.core.frozen import Dense, Frozen, Site
from slimtune.core.roles import Role, input_embeddings
from slimtune.errors import ConfigError, TargetError, did_you_mean


def check_tokens(name: str, tokens: Any) -> None:
    """Raises: ConfigError, for what is no list of different token ids."""
    if not isinstance(tokens, list | tuple):
        raise ConfigError(f"{name} must be a list of token ids, found {tokens!r}")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ConfigError(f"{name} must hold token ids, whole numbers from 0, found {token!r}")
    twice = [token for token in tokens if tokens.count(token) > 1] if len(set(tokens)) < len(tokens) else []
    if twice:
        raise ConfigError(f"{name} holds the token {twice[0]} twice")


@register
@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Which tokens' embeddings to train; names and defaults are those of `peft.TrainableTokensConfig`.

    `target_modules=None` means the model's input embeddings. Whatever is tied to them, an output layer for one, is
    trained along, in the same rows.

    Raises:
        ConfigError: no tokens, the same token twice, or what can't be a token.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "TRAINABLE_TOKENS"
    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    learning_rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("token_indices", self.token_indices)

    @property
    def default_targets(self) -> tuple[Role | Whereabouts, ...]:
        return ("input",)

    def further_modules(self, model: Any, modules: Mapping[str, nn.Module], chosen: Sequence[str]) -> list[str]:
        """The modules whose weights are tied to a chosen one's."""
        return tied_to(chosen, modules)

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> TokenRows:
        """The trained rows of one embedding. Raises: TargetError, ConfigError."""
        check_module(site)
        if not self.token_indices:
            raise ConfigError("token_indices is empty; give the ids of the tokens whose embeddings are to be trained")
        return TokenRows(site, self.token_indices, autocast_adapter_dtype)

    def link_deltas(self, model: Any, drafted: Sequence[tuple[Site, Any]]) -> None:
        """Let tied weights share their trained rows."""
        share_tied_rows(drafted)


class TokenRows(Delta):
    """y_TD = R_ND[i] where ids_T is the i-th trained token, else base(ids); for an output layer y_TV, column by column.

    Attributes:
        token_indices: the ids of the N trained tokens.
        prefix: what the name on disk begins with.
    """

    trainable_tokens_delta: nn.Parameter
    token_indices: Tensor
    sorted_indices: Tensor
    order: Tensor

    def __init__(self, site: Site, tokens: Sequence[int], autocast: bool, prefix: str = "") -> None:
        super().__init__()
        check_module(site)
        weight_VD = stored_rows(site)
        if max(tokens) >= len(weight_VD):
            raise ConfigError(
                f"token {max(tokens)} is beyond the {len(weight_VD)} rows of '{site.name}'; resize the base's "
                f"embeddings first, with model.resize_token_embeddings({max(tokens) + 1}) or more"
            )
        self.prefix, self.kind = prefix, site.kind
        self.tied_to: tuple[TokenRows, ...] = ()
        self.register_buffer("token_indices", torch.tensor(tokens, device=weight_VD.device), persistent=False)
        # Sorted once, so that a forward looks each id up by bisection.
        ordered, order = self.token_indices.sort()
        self.register_buffer("sorted_indices", ordered, persistent=False)
        self.register_buffer("order", order, persistent=False)
        padding = getattr(site.module, "padding_idx", None)
        self.padding_row: int | None = tokens.index(padding) if padding in tokens else None
        rows_ND = weight_VD.new_empty(len(tokens), weight_VD.shape[1], dtype=trainable_dtype(weight_VD.dtype, autocast))
        self.trainable_tokens_delta = nn.Parameter(rows_ND)

    @property
    def rows(self) -> Tensor:
        """R_ND, which tied modules have in common."""
        return self.tied_to[0].rows if self.tied_to else self.trainable_tokens_delta

    def share(self, leader: TokenRows) -> None:
        """Train the rows of another delta instead of one's own."""
        del self.trainable_tokens_delta
        # In a tuple: the parameters stay those of the leader alone.
        self.tied_to = (leader,)

    def initialise(self, config: Any, site: Site) -> None:
        """Set the rows to the base's own, or draw them, for `init_weights=False`."""
        if self.tied_to:
            return
        if getattr(config, "init_weights", True):
            with torch.no_grad():
                self.rows.copy_(stored_rows(site)[self.token_indices])
        else:
            nn.init.normal_(self.rows)

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        return self._looked_up(base, x, y) if self.kind == "embedding" else self._projected(base, x, y)

    def _looked_up(self, base: Frozen, ids: Tensor, y: Tensor) -> Tensor:
        # For any id the place where it would stand among the N trained ones; it is one of them if it stands there.
        place = torch.searchsorted(self.sorted_indices, ids).clamp_(max=len(self.sorted_indices) - 1)
        trained = (self.sorted_indices[place] == ids).unsqueeze(-1)
        # For an untrained id some trained row is looked up too, and thrown away by the `where`, whose gradient for it
        # is zero: no masked gather, whose length would have to be read from the device.
        looked_up = F.embedding(self.order[place], self.rows, self.padding_row).to(y.dtype)
        # Gemma's embedding multiplies what it looks up.
        scale = getattr(base.module, "embed_scale", 1.0)
        scale = scale.to(y.dtype) if isinstance(scale, Tensor) else scale
        # (rows, tokens, dim): N trained rows instead of a copy of the (vocabulary, dim) table with its gradient.
        return torch.where(trained, looked_up * scale, y)

    def _projected(self, base: Frozen, x: Tensor, y: Tensor) -> Tensor:
        # Only the difference is added, in place: neither the logits nor their gradients are copied.
        # (N, dim) in the rows' float32, then cast: a small step of a row is not rounded away before it is a difference.
        difference = (self.rows - base.weight[self.token_indices]).to(x.dtype)
        return y.index_add_(-1, self.token_indices, F.linear(x, difference).to(y.dtype))

    def read_as(self, module: Any) -> dict[str, Tensor]:
        weight_VD = module.weight
        # Who reads the whole weight gets a copy of it: (vocabulary, dim), for as long as that product lives.
        return {"weight": weight_VD.index_copy(0, self.token_indices, self.rows.to(weight_VD.dtype))}

    def fold(self, dense: Dense) -> Dense:
        # An embedding's table (rows, dim) is "transposed" here, its dense form being (out, in) = (dim, rows).
        dim = 1 if self.kind == "embedding" else 0
        rows = self.rows.detach().to(dense["weight"].dtype)
        return dense | {"weight": dense["weight"].index_copy(dim, self.token_indices, rows.t() if dim else rows)}

    def to_disk(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows; of tied modules `peft` stores the same rows under each name, but not those beside LoRA."""
        if self.tied_to and not self.prefix:
            return {"trainable_tokens_delta": self.rows.detach()}
        return {self.prefix + name: tensor for name, tensor in own.items()}

    def from_disk(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: stored[self.prefix + name] for name in self.state_dict()}

    def excludes(self, other: Any) -> bool:
        same_token = isinstance(other, TokenRows) and bool(torch.isin(self.token_indices, other.token_indices).any())
        return same_token or super().excludes(other)

    def extra_repr(self) -> str:
        return f"tokens={len(self.token_indices)}, kind={self.kind}"


def stored_rows(site: Site) -> Tensor:
    """The frozen weight with one row a token."""
    weight = site.base.weight(site.module).detach()
    return weight.t() if site.kind == "embedding" else weight


def tied_to(names: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of other modules that have the very weight of one of these."""
    weights = {id(modules[name]._parameters.get("weight")) for name in names} - {id(None)}
    return [name for name, m in modules.items() if id(m._parameters.get("weight")) in weights and name not in names]


def share_tied_rows(drafted: Sequence[tuple[Site, Any]]) -> None:
    """Let the deltas of one weight and the same tokens share their rows; the first of them keeps its own."""
    leaders: dict[Any, TokenRows] = {}
    for site, delta in drafted:
        if isinstance(delta, TokenRows):
            leader = leaders.setdefault((id(site.module.weight), tuple(delta.token_indices.tolist())), delta)
            if leader is not delta:
                delta.share(leader)


def token_modules(
    tokens: Sequence[int] | Mapping[str, list[int]], model: Any, modules: Mapping[str, nn.Module]
) -> dict[str, list[int]]:
    """The tokens of each embedding that they are given for (the model's input, if none is named), and of what is tied.

    Raises:
        TargetError: there is no such embedding.
    """
    if not tokens:
        return {}
    if not isinstance(tokens, Mapping):
        embedding = input_embeddings(model)
        tokens = {next((name for name, module in modules.items() if module is embedding), "embed_tokens"): list(tokens)}
    first = {id(module): name for name, module in reversed(list(modules.items()))}
    tokens_of: dict[str, list[int]] = {}
    for wanted, indices in tokens.items():
        names = {first[id(m)] for name, m in modules.items() if name == wanted or name.endswith(f".{wanted}")}
        if not names:
            near = did_you_mean(wanted, {name.rpartition(".")[2] for name in modules})
            raise TargetError(f"trainable_token_indices names '{wanted}', which no module is called{near}")
        tokens_of |= dict.fromkeys(sorted(names), indices)
    for name, indices in list(tokens_of.items()):
        for tied in tied_to([name], modules):
            tokens_of.setdefault(first[id(modules[tied])], indices)
    return tokens_of


def check_module(site: Site) -> None:
    """Raises: TargetError, ConfigError, for a module whose rows can't be trained apart."""
    if site.kind not in ("embedding", "linear"):
        raise wrong_kind(site, "trainable tokens", "embeddings and output layers")
    if not site.base.is_textbook(site.module) and not hasattr(site.module, "embed_scale"):
        raise TargetError(
            f"trainable tokens can't attach to '{site.name}': a {type(site.module).__name__} has a forward of its own, "
            "in which its rows may not be those of tokens"
        )
    if getattr(site.module, "max_norm", None) is not None or getattr(site.module, "scale_grad_by_freq", False):
        raise ConfigError(
            f"'{site.name}' has max_norm or scale_grad_by_freq set, which change its rows or their gradients as it "
            "looks them up; trainable tokens need a plain embedding"
        )
