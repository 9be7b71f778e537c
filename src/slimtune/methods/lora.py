"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).

y = base(x) + s * B(A(dropout(x))),  s = alpha / r, or alpha / sqrt(r) with rsLoRA

With PiSSA and OLoRA training starts at factors A0 and B0 of the base weight; the change is then B A - B0 A0, which is
nothing at the start, and the base stays as it is. In one product, and without a difference of large numbers:
B A - B0 A0 = [B, B - B0] [A - A0; A0], which is a LoRA of rank 2r and is stored as one. With LoftQ s B A starts at what
quantization took from the base, which stays as it is too.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.config import LayeredConfig, means, register
from slimtune.delta import Delta, Dense, Frozen, Site, trainable_dtype, wrong_kind
from slimtune.errors import (
    ConfigError,
    MergeError,
    TargetError,
    check_choice,
    check_number,
    check_whole,
    did_you_mean,
)
from slimtune.inits import Factors, orthogonal, pissa, principal
from slimtune.methods.lora_parameters import LoraParameters, holders
from slimtune.methods.lora_starts import EvaConfig, LoftQConfig, settings
from slimtune.methods.trainable_tokens import TokenRows, check_tokens, share_tied_rows, token_modules

if TYPE_CHECKING:
    from slimtune.originals import Originals

INITIALISATIONS = ("gaussian", "pissa", "olora", "eva", "loftq", "orthogonal")
LINEAR_ONLY = ("pissa", "olora", "loftq", "orthogonal")


@register
@dataclass
class LoraConfig(LayeredConfig):
    """What to adapt with LoRA, and how; names, defaults and meanings are those of `peft.LoraConfig`.

    `target_modules=None` means all linear layers in the model's repeated blocks. `rank_pattern` and `alpha_pattern`
    map a module's name or an expression to another `r` or `lora_alpha`. `target_parameters` names parameters that are
    tensors of their module rather than layers, such as `experts.gate_up_proj`; with them, `target_modules=None` means
    no modules besides. `trainable_token_indices` are tokens whose embeddings are trained as well.

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
    use_dora: bool = False
    init_lora_weights: bool | str = True
    eva_config: EvaConfig | dict[str, Any] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    inert: ClassVar[Mapping[str, Any]] = {
        "megatron_config": None, "megatron_core": "megatron.core",
        "corda_config": None, "lora_ga_config": None, "velora_config": None,
        "alora_invocation_tokens": None, "use_qalora": False, "qalora_group_size": 16,
        "monteclora_config": None, "layer_replication": None, "lora_bias": False,
        "use_bdlora": None, "arrow_config": None, "kasa_config": None, "ensure_weight_tying": False,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._check_numbers()
        self._check_initialisation()
        self._check_parts()
        self.parameters_of: dict[str, list[str]] = {}
        self.tokens_of: dict[str, list[int]] = {}
        self.originals: Originals | None = None

    def _check_parts(self) -> None:
        if self.target_parameters and self.target_modules is None:
            self.target_modules = set()
        if self.target_parameters and self.use_dora:
            raise ConfigError("use_dora has no form for target_parameters; give those an adapter of their own")
        if self.target_parameters and (self.lora_dropout or self.fan_in_fan_out):
            raise ConfigError(
                "target_parameters changes weights, not the inputs of layers: it takes neither lora_dropout nor "
                f"fan_in_fan_out, found {self.lora_dropout} and {self.fan_in_fan_out}"
            )
        tokens = self.trainable_token_indices
        if tokens is not None:
            for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
                check_tokens("trainable_token_indices", indices)

    def further_modules(self, model: Any, modules: Mapping[str, nn.Module], chosen: Sequence[str]) -> list[str]:
        """The owners of `target_parameters`, and the embeddings of the tokens with what is tied to them."""
        self.parameters_of = holders(self.target_parameters or [], modules)
        self.tokens_of = token_modules(self.trainable_token_indices or [], model, modules)
        further = [*self.parameters_of, *self.tokens_of]
        for name in further:
            if further.count(name) > 1 or any(modules[name] is modules[other] for other in chosen):
                raise TargetError(
                    f"'{name}' is named in two of target_modules, target_parameters and trainable_token_indices; "
                    "leave it to one of them"
                )
        return further

    def settle(self, model: Any, drafted: Sequence[tuple[Site, Any]]) -> None:
        """Let tied embeddings share their trained rows; note where the weights are that LoftQ starts from."""
        share_tied_rows(drafted)
        if self.initialisation == "loftq":
            # It reads quantized modules, which most models have none of.
            from slimtune.originals import Originals

            assert isinstance(self.loftq_config, LoftQConfig)
            self.loftq_config.check()
            self.originals = Originals.of(model)

    def _check_numbers(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            check_whole(f"the rank {name}", rank)
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            check_number(name, alpha)
        check_number("lora_dropout", self.lora_dropout, 0, 1)
        check_choice("bias", self.bias, ("none", "all", "lora_only"))

    def _check_initialisation(self) -> None:
        init = self.initialisation
        steps = init.removeprefix("pissa_niter_")
        if not isinstance(self.init_lora_weights, bool) and init not in INITIALISATIONS and not steps.isdecimal():
            raise ConfigError(
                "init_lora_weights must be True, False, 'gaussian', 'pissa', 'pissa_niter_[number]', 'olora', 'eva', "
                f"'loftq' or 'orthogonal', found {self.init_lora_weights!r}{did_you_mean(init, INITIALISATIONS)}"
            )
        if isinstance(self.eva_config, dict):
            self.eva_config = settings(EvaConfig, self.eva_config)
        if init == "loftq" and not isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = settings(LoftQConfig, self.loftq_config or {})
        elif init != "loftq" and self.loftq_config:
            raise ConfigError(f"loftq_config needs init_lora_weights='loftq', found {self.init_lora_weights!r}")
        if init == "eva":
            self.eva_config = self.eva_config or EvaConfig()
        elif self.eva_config is not None:
            raise ConfigError(f"eva_config needs init_lora_weights='eva', found {self.init_lora_weights!r}")

    @property
    def initialisation(self) -> str:
        """`init_lora_weights` in small letters."""
        return str(self.init_lora_weights).lower()

    @property
    def moves_start(self) -> bool:
        """Whether training starts at factors of the base weight, which are kept and subtracted."""
        return self.initialisation.startswith(("pissa", "olora"))

    def stored_fields(self) -> dict[str, Any]:
        """The config as it is stored; a change from a moved start is a plain LoRA of twice the rank."""
        if self.initialisation == "loftq":
            # Whoever reads it finds the quantized base as it was, not one that the start has changed.
            return super().stored_fields() | {"init_lora_weights": True, "loftq_config": {}}
        if not self.moves_start:
            return super().stored_fields()
        by = math.sqrt(2) if self.use_rslora else 2
        return super().stored_fields() | {
            "init_lora_weights": True,
            "r": 2 * self.r,
            "rank_pattern": {name: 2 * rank for name, rank in self.rank_pattern.items()},
            "lora_alpha": by * self.lora_alpha,
            "alpha_pattern": {name: by * alpha for name, alpha in self.alpha_pattern.items()},
        }

    def check_readable(self) -> None:
        """See that a stored adapter doesn't need a changed base. Raises: ConfigError."""
        if self.moves_start:
            raise ConfigError(
                f"an adapter stored with init_lora_weights={self.init_lora_weights!r} belongs to a base that was "
                "changed at its start; convert it with peft's path_initial_model_for_weight_conversion"
            )
        if self.initialisation == "loftq":
            raise ConfigError(
                "an adapter stored with init_lora_weights='loftq' belongs to a base that was changed at its start; set "
                "init_lora_weights to true in its adapter_config.json and load it on the base stored with it"
            )

    def rank_for(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha_for(self, name: str) -> float:
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def scale_for(self, name: str) -> float:
        """The factor s of the update."""
        r, alpha = self.rank_for(name), self.alpha_for(name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def combined(self, others: Sequence[LoraConfig], how: str, rank: int | None) -> LoraConfig:
        """The config of a weighted combination. Raises: ConfigError, for targets that can't be joined."""
        configs = [self, *others]
        if any(config.use_dora for config in configs):
            raise ConfigError("DoRA adapters can't be combined, as magnitudes don't add up; activate them together")
        targets = self.joined_targets(others)
        ranks = [max([config.r, *config.rank_pattern.values()]) * (1 + config.moves_start) for config in configs]
        rank = sum(ranks) if how == "cat" else (rank or max(ranks))
        # alpha = r and no rsLoRA: the adapters' scales are inside the factors.
        plain: Any = {"lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
        plain |= {"init_lora_weights": True, "eva_config": None, "loftq_config": {}}
        return replace(self, r=rank, target_modules=targets, **plain)

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> Delta:
        """The low-rank change for one site. Raises: TargetError, ConfigError."""
        if site.name in self.parameters_of:
            ranks = {n: self.rank_for(f"{site.name}.{n}") for n in self.parameters_of[site.name]}
            scales = {n: self.scale_for(f"{site.name}.{n}") for n in ranks}
            return LoraParameters(site, ranks, scales, autocast_adapter_dtype)
        if site.name in self.tokens_of:
            return TokenRows(site, self.tokens_of[site.name], autocast_adapter_dtype, prefix="token_adapter.")
        kinds = self._kinds()
        if site.kind not in kinds:
            raise wrong_kind(site, "LoRA", "linear, convolution and embedding layers")
        if site.kind != "linear" and self.initialisation.startswith(LINEAR_ONLY):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} is for linear layers, and '{site.name}' is a "
                f"{type(site.module).__name__}; leave it out of target_modules"
            )
        r = self._checked_rank(site, *kinds[site.kind].shapes(site, self.rank_for(site.name)))
        delta = kinds[site.kind](site, r, self.scale_for(site.name), self.lora_dropout, autocast_adapter_dtype)
        if self.moves_start:
            delta.keep_start()
        if self.bias == "lora_only" and getattr(site.module, "bias", None) is not None:
            delta.hold(site, "bias")
        return delta

    def _kinds(self) -> dict[str, type[LoraDelta]]:
        if not self.use_dora:
            return {"linear": LoraLinear, "conv": LoraConv, "embedding": LoraEmbedding}
        # Derived from the classes below, so that it can't be imported before them.
        from slimtune.methods.dora import KINDS

        return KINDS

    def _checked_rank(self, site: Site, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> int:
        r, rows, columns = a_shape[0], b_shape[0], math.prod(a_shape[1:])
        greatest = min(rows, columns) // (1 + self.moves_start)
        if r > greatest:
            stored = f", stored as {2 * r}," if self.moves_start else ""
            raise ConfigError(
                f"the rank {r}{stored} is beyond the {rows} x {columns} matrix of '{site.name}'; "
                f"choose r <= {greatest} or give it a rank of its own in rank_pattern"
            )
        if self.initialisation == "orthogonal" and r % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank, '{site.name}' has {r}")
        return r


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
        weight = site.outline
        dtype = trainable_dtype(weight.dtype, autocast)
        for name, shape in zip(self.factors, self.shapes(site, r), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)))

    @staticmethod
    @abstractmethod
    def shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A (r first) and B (out first)."""

    @property
    def trained(self) -> tuple[nn.Parameter, nn.Parameter]:
        """(A, B) as they are trained."""
        a, b = (self.get_parameter(name) for name in self.factors)
        return a, b

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B), whose product is the change."""
        return self.trained

    def keep_start(self) -> None:
        """Keep factors to start from. Raises: ConfigError, for kinds that have none."""
        raise ConfigError(f"a {type(self).__name__} starts from no factors of its base")

    def initialise(self, config: LoraConfig, site: Site) -> None:
        """Set A and B; the update s B A is zero, but for `init_lora_weights=False`, where both are drawn."""
        a, b = self.trained
        if config.initialisation == "gaussian":
            nn.init.normal_(a, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        return (y + self.scaling * self.low_rank(self.dropped(x))).to(y.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """dropout(x), in the adapter's dtype."""
        return F.dropout(x.to(self.trained[0].dtype), self.lora_dropout, self.training)

    def low_rank(self, x: Tensor) -> Tensor:
        """B(A(x)), unscaled."""
        a, b = self.pair
        return self.up(self.down(x, a), b)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def up(self, z: Tensor, b: Tensor) -> Tensor:
        return F.linear(z, b)

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
                (target.trained[0], a, (slice(a.shape[0]),)),
                (target.trained[1], b, (slice(None), slice(b.shape[1]))),
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

    def keep_start(self) -> None:
        """Keep the factors A0 and B0 to start from; the change is B A - B0 A0 then."""
        for name, factor in zip(("start_A", "start_B"), self.trained, strict=True):
            self.register_buffer(name, torch.zeros_like(factor))

    @property
    def moved(self) -> bool:
        """Whether training started at factors of the base weight."""
        return "start_A" in self._buffers

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        if not self.moved:
            return self.trained
        return _difference(*self.trained, self.get_buffer("start_A"), self.get_buffer("start_B"))

    def initialise(self, config: LoraConfig, site: Site) -> None:
        if not config.initialisation.startswith(LINEAR_ONLY):
            super().initialise(config, site)
            return
        with torch.no_grad():
            for parameter, value in zip(self.trained, self._start(config, site), strict=True):
                parameter.copy_(value)
            if self.moved:
                self.get_buffer("start_A").copy_(self.trained[0])
                self.get_buffer("start_B").copy_(self.trained[1])

    def _start(self, config: LoraConfig, site: Site) -> Factors:
        """The factors that follow from the base weight. Raises: ConfigError, where that can't be read."""
        if site.outline.device.type == "meta":
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} reads the weight of '{site.name}', which is offloaded"
            )
        if config.initialisation == "loftq":
            assert config.originals is not None
            return pissa(config.originals.lost(site), self.r, self.scaling)
        weight_OI = site.base.weight(site.module).detach()
        if config.initialisation == "orthogonal":
            return orthogonal(weight_OI, self.r)
        return principal(weight_OI, self.r, self.scaling, config.initialisation)

    def to_disk(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.moved:
            return super().to_disk(own)
        names = ("lora_A", "lora_B", "start_A", "start_B")
        a, b = _difference(*(own[name] for name in names))
        others = {name: tensor for name, tensor in own.items() if name not in names}
        return super().to_disk(others | {"lora_A": a, "lora_B": b})

    def from_disk(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.moved:
            return super().from_disk(stored)
        (a_change, a_start), (b, b_change) = (
            stored[self.disk_name(name)].split(self.r, dim) for name, dim in (("lora_A", 0), ("lora_B", 1))
        )
        own = {"lora_A": a_change + a_start, "lora_B": b, "start_A": a_start, "start_B": b - b_change}
        rest = self.state_dict().keys() - own.keys()
        return own | {name: stored[self.disk_name(name)] for name in rest}


def _difference(a_RI: Tensor, b_OR: Tensor, a0_RI: Tensor, b0_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of B A - B0 A0."""
    return torch.cat([a_RI - a0_RI, a0_RI]), torch.cat([b_OR, b_OR - b0_OR], dim=1)


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

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        if self.pad:
            x = F.pad(x, self.pad[0], mode=self.pad[1])
        return self.convolve(x, a, **self.strides)

    def up(self, z: Tensor, b: Tensor) -> Tensor:
        return self.convolve(z, b, groups=self.groups)

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
        a, b = self.trained
        nn.init.normal_(a) if config.init_lora_weights is False else nn.init.zeros_(a)
        nn.init.normal_(b)

    def dropped(self, x: Tensor) -> Tensor:
        """The ids: there is nothing in them to drop."""
        return x

    def low_rank(self, x: Tensor) -> Tensor:
        return super().low_rank(x) * self.embed_scale

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.t(), self.padding_idx)


def _cat(deltas: list[LoraDelta], scales: list[float], rank: int) -> tuple[Tensor, Tensor]:
    pairs = [delta.pair for delta in deltas]
    a = torch.cat([scale * a.detach() for scale, (a, _) in zip(scales, pairs, strict=True)], dim=0)
    return a, torch.cat([b.detach() for _, b in pairs], dim=1)


def _linear(deltas: list[LoraDelta], scales: list[float], rank: int) -> tuple[Tensor, Tensor]:
    pairs = [tuple(factor.detach() for factor in delta.pair) for delta in deltas]
    ranks = {len(a) for a, _ in pairs}
    if len(ranks) > 1:
        raise ConfigError(f"combination_type 'linear' needs equal ranks, found {sorted(ranks)}; use 'cat' or 'svd'")
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signs = [math.copysign(1.0, scale) for scale in scales]
    a = sum(sign * root * a for sign, root, (a, _) in zip(signs, roots, pairs, strict=True))
    b = sum(root * b for root, (_, b) in zip(roots, pairs, strict=True))
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
