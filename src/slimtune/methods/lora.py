"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).

y = base(x) + s * B(A(dropout(x))),  s = alpha / r, or alpha / sqrt(r) with rsLoRA
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.delta import Delta, Dense, Frozen, Site, TargetedConfig, means, register, trainable_dtype, wrong_kind
from slimtune.errors import ConfigError, MergeError, did_you_mean

INITIALISATIONS = ("gaussian",)
# These set only where training starts: on a trained adapter that is loaded they have no say any more.
START_ONLY = ("eva", "orthogonal")


@register
@dataclass
class LoraConfig(TargetedConfig):
    """What to adapt with LoRA, and how; names, defaults and meanings are those of `peft.LoraConfig`.

    `target_modules=None` means all linear layers in the model's repeated blocks. `rank_pattern` and `alpha_pattern`
    map a module's name or an expression to another `r` or `lora_alpha`.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    peft_type: str | None = "LORA"
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    inert: ClassVar[Mapping[str, Any]] = {
        "megatron_config": None, "megatron_core": "megatron.core", "trainable_token_indices": None,
        "loftq_config": {}, "eva_config": None, "corda_config": None, "lora_ga_config": None, "use_dora": False,
        "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False, "qalora_group_size": 16,
        "monteclora_config": None, "layer_replication": None, "lora_bias": False, "target_parameters": None,
        "use_bdlora": None, "arrow_config": None, "kasa_config": None, "ensure_weight_tying": False,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._check_numbers()
        self._check_words()

    def _check_numbers(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
                raise ConfigError(f"the rank {name} must be a positive whole number, found {rank!r}")
        numbers = {"lora_alpha": self.lora_alpha, **self.alpha_pattern, "lora_dropout": self.lora_dropout}
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ConfigError(f"{name} must be a number, found {number!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must lie in [0, 1), found {self.lora_dropout!r}")

    def _check_words(self) -> None:
        choices = ("none", "all", "lora_only")
        if self.bias not in choices:
            raise ConfigError(
                f"bias must be one of {', '.join(choices)}, found {self.bias!r}{did_you_mean(str(self.bias), choices)}"
            )
        init = self.init_lora_weights
        if not isinstance(init, bool) and str(init).lower() not in INITIALISATIONS + START_ONLY:
            raise ConfigError(
                f"init_lora_weights must be True, False or 'gaussian', found {init!r}"
                f"{did_you_mean(str(init), INITIALISATIONS)}"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                "layers_to_transform needs target_modules as a list of names, found "
                f"{self.target_modules!r}; list the names, or write the layers into an expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern says where the layer number stands; give layers_to_transform as well")

    def rank_for(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha_for(self, name: str) -> float:
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def combined(self, others: Sequence[LoraConfig], how: str, rank: int | None) -> LoraConfig:
        """The config of a weighted combination. Raises: ConfigError, for targets that can't be joined."""
        configs = [self, *others]
        if len({type(config.target_modules) for config in configs}) > 1:
            raise ConfigError("adapters whose target_modules are names don't combine with one that has an expression")
        ranks = [max([config.r, *config.rank_pattern.values()]) for config in configs]
        if isinstance(self.target_modules, str):
            targets: Any = "|".join(f"({config.target_modules})" for config in configs)
        else:
            targets = set().union(*(config.target_modules or () for config in configs))
        rank = sum(ranks) if how == "cat" else (rank or max(ranks))
        # alpha = r and no rsLoRA: the adapters' scales are inside the factors.
        plain: Any = {"lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
        return replace(self, r=rank, target_modules=targets, **plain)

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> LoraDelta:
        """The low-rank change for one site. Raises: TargetError, ConfigError."""
        kinds = {"linear": LoraLinear, "conv": LoraConv, "embedding": LoraEmbedding}
        if site.kind not in kinds:
            raise wrong_kind(site, "LoRA", "linear, convolution and embedding layers")
        r = self.rank_for(site.name)
        (_, *columns), (rows, *_) = kinds[site.kind].shapes(site, r)
        if r > min(rows, math.prod(columns)):
            raise ConfigError(
                f"the rank {r} is beyond the {rows} x {math.prod(columns)} matrix of '{site.name}'; "
                f"choose r <= {min(rows, math.prod(columns))} or give it a rank of its own in rank_pattern"
            )
        alpha = self.alpha_for(site.name)
        scaling = alpha / math.sqrt(r) if self.use_rslora else alpha / r
        delta = kinds[site.kind](site, r, scaling, self.lora_dropout, autocast_adapter_dtype)
        if self.bias == "lora_only" and getattr(site.module, "bias", None) is not None:
            delta.hold(site.module, "bias")
        return delta


def _by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for key, value in patterns.items() if means(key, name)), otherwise)


class LoraDelta(Delta):
    """What the kinds share: y = base(x) + s * up(down(dropout(x))).

    Attributes:
        scaling: the factor s.
        r: the rank.
        lora_dropout: the probability with which an input of A is dropped while training.
    """

    factors: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    on_disk = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "whole.bias": "base_layer.bias"}

    def __init__(self, site: Site, r: int, scaling: float, dropout: float, autocast: bool) -> None:
        super().__init__()
        self.r, self.scaling, self.lora_dropout = r, scaling, dropout
        weight = site.base.weight(site.module)
        dtype = trainable_dtype(weight.dtype, autocast)
        for name, shape in zip(self.factors, self.shapes(site, r), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)))

    @staticmethod
    @abstractmethod
    def shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A (r first) and B (out first)."""

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B)."""
        a, b = (self.get_parameter(name) for name in self.factors)
        return a, b

    def initialise(self, config: LoraConfig, site: Site) -> None:
        """Set A and B; the update s B A is zero, but for `init_lora_weights=False`, where both are drawn."""
        a, b = self.pair
        if str(config.init_lora_weights).lower() == "gaussian":
            nn.init.normal_(a, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        return (y + self.scaling * self.low_rank(x)).to(y.dtype)

    def low_rank(self, x: Tensor) -> Tensor:
        """B(A(dropout(x))), unscaled."""
        x = F.dropout(x.to(self.pair[0].dtype), self.lora_dropout, self.training)
        return self.up(self.down(x))

    def down(self, x: Tensor) -> Tensor:
        return F.linear(x, self.pair[0])

    def up(self, z: Tensor) -> Tensor:
        return F.linear(z, self.pair[1])

    def product(self) -> Tensor:
        """B A as (out, in, ...) in float32: the update without its scale."""
        a, b = (factor.detach().float() for factor in self.pair)
        return torch.tensordot(b, a, dims=1)

    def fold(self, dense: Dense) -> Dense:
        weight = dense["weight"]
        # Added in float32 and rounded once: a 16-bit sum would round the small update before it is there.
        folded = weight.float().add(self.product(), alpha=self.scaling).to(weight.dtype)
        return dense | {"weight": folded}

    @classmethod
    def combine(cls, deltas: list[Any], weights: list[float], how: str, target: Any, **options: Any) -> None:
        """Set `target` to sum_i w_i s_i B_i A_i, exactly by "cat", in a lower rank by "svd", factor-wise by "linear".

        Args:
            options: for "svd" also `svd_clamp`, the quantile at which the factors' entries are clamped.
        """
        if how not in _COMBINATIONS:
            raise ConfigError(
                f"combination_type must be one of {', '.join(_COMBINATIONS)}, found {how!r}"
                f"{did_you_mean(how, _COMBINATIONS)}"
            )
        scales = [weight * delta.scaling for weight, delta in zip(weights, deltas, strict=True)]
        a, b = _COMBINATIONS[how](deltas, scales, target.r, **options)
        with torch.no_grad():
            for factor, value, ranks in (
                (target.pair[0], a, (slice(a.shape[0]),)),
                (target.pair[1], b, (slice(None), slice(b.shape[1]))),
            ):
                factor.zero_()
                factor[ranks].copy_(value.view_as(factor[ranks]))
        target.scaling = 1.0

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.lora_dropout:g}"


class LoraLinear(LoraDelta):
    """y_TO = base(x_TI) + s * (x_TI A_RI^T) B_OR^T."""

    @staticmethod
    def shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        features_in, features_out = site.base.features(site.module)
        return (r, features_in), (features_out, r)


class LoraConv(LoraDelta):
    """A is a convolution like the base's into r channels, B a 1x1 convolution out of them.

    With grouped convolutions A still sees all input channels, as in `peft`, so that the update can't be merged.
    """

    def __init__(self, site: Site, r: int, scaling: float, dropout: float, autocast: bool) -> None:
        conv: Any = site.module
        if r % conv.groups:
            raise ConfigError(f"'{site.name}' has {conv.groups} groups, which must divide the rank, found r={r}")
        super().__init__(site, r, scaling, dropout, autocast)
        self.groups: int = conv.groups
        self.strides: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]
        self.pad: tuple[list[int], str] | None = None
        if conv.padding_mode != "zeros":
            self.pad = (conv._reversed_padding_repeated_twice, conv.padding_mode)
            self.strides["padding"] = 0

    @staticmethod
    def shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        conv: Any = site.module
        ones = (1,) * len(conv.kernel_size)
        return (r, conv.in_channels, *conv.kernel_size), (conv.out_channels, r // conv.groups, *ones)

    def down(self, x: Tensor) -> Tensor:
        if self.pad:
            x = F.pad(x, self.pad[0], mode=self.pad[1])
        return self.convolve(x, self.pair[0], **self.strides)

    def up(self, z: Tensor) -> Tensor:
        return self.convolve(z, self.pair[1], groups=self.groups)

    def product(self) -> Tensor:
        if self.groups > 1:
            raise MergeError(
                "an update of a grouped convolution is not grouped itself and can't be merged; "
                "exclude that module, or keep the adapter apart"
            )
        a, b = (factor.detach().float() for factor in self.pair)
        return torch.tensordot(b.flatten(1), a, dims=1)


class LoraEmbedding(LoraDelta):
    """y_TD = base(ids_T) + s * A^T[ids_T] B^T, with A (r, rows) zero and B (dim, r) drawn at the start."""

    factors = ("lora_embedding_A", "lora_embedding_B")
    on_disk = {"lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B"}

    def __init__(self, site: Site, r: int, scaling: float, dropout: float, autocast: bool) -> None:
        super().__init__(site, r, scaling, dropout, autocast)
        embedding: Any = site.module
        self.padding_idx: int | None = embedding.padding_idx
        # Gemma's embedding multiplies what it looks up; the update is part of what it looks up.
        self.embed_scale = float(getattr(embedding, "embed_scale", 1.0))

    @staticmethod
    def shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows, dim = site.base.features(site.module)
        return (r, rows), (dim, r)

    def initialise(self, config: LoraConfig, site: Site) -> None:
        a, b = self.pair
        nn.init.normal_(a) if config.init_lora_weights is False else nn.init.zeros_(a)
        nn.init.normal_(b)

    def low_rank(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * self.embed_scale

    def down(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.pair[0].t(), self.padding_idx)


def _cat(deltas: list[LoraDelta], scales: list[float], rank: int) -> tuple[Tensor, Tensor]:
    pairs = [delta.pair for delta in deltas]
    a = torch.cat([scale * a.detach() for scale, (a, _) in zip(scales, pairs, strict=True)], dim=0)
    return a, torch.cat([b.detach() for _, b in pairs], dim=1)


def _linear(deltas: list[LoraDelta], scales: list[float], rank: int) -> tuple[Tensor, Tensor]:
    if len({delta.r for delta in deltas}) > 1:
        raise ConfigError(
            f"combination_type 'linear' needs equal ranks, found {sorted({d.r for d in deltas})}; use 'cat' or 'svd'"
        )
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signs = [math.copysign(1.0, scale) for scale in scales]
    a = sum(sign * root * delta.pair[0].detach() for sign, root, delta in zip(signs, roots, deltas, strict=True))
    b = sum(root * delta.pair[1].detach() for root, delta in zip(roots, deltas, strict=True))
    return torch.as_tensor(a), torch.as_tensor(b)


def _svd(deltas: list[LoraDelta], scales: list[float], rank: int, svd_clamp: float | None = None,
         ) -> tuple[Tensor, Tensor]:  # fmt: skip
    update = sum(scale * delta.product().flatten(1) for scale, delta in zip(scales, deltas, strict=True))
    u, sigma, v = torch.linalg.svd(torch.as_tensor(update), full_matrices=False)
    b, a = u[:, :rank] * sigma[:rank], v[:rank]
    if svd_clamp is not None:
        bound = float(torch.quantile(torch.cat([b.flatten(), a.flatten()]), svd_clamp))
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    return a, b


_COMBINATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"linear": _linear, "svd": _svd, "cat": _cat}
