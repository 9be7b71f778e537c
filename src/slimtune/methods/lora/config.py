"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).

y = base(x) + s * B(A(dropout(x))),  s = alpha / r, or alpha / sqrt(r) with rsLoRA

With PiSSA and OLoRA training starts at factors A0 and B0 of the base weight; the change is then B A - B0 A0, which is
nothing at the start, and the base stays as it is. In one product, and without a difference of large numbers:
B A - B0 A0 = [B, B - B0] [A - A0; A0], which is a LoRA of rank 2r and is stored as one. With LoftQ s B A starts at what
quantization took from the base, which stays as it is too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from slimtune.core.config import LayeredConfig, register
from slimtune.core.delta import Delta, wrong_kind
from slimtune.core.frozen import Site
from slimtune.core.patterns import by_pattern
from slimtune.errors import ConfigError, TargetError, check_choice, check_number, check_whole, did_you_mean
from slimtune.methods.lora import dora
from slimtune.methods.lora.attention import LoraAttention, LoraOutput, check_attention, link_outputs
from slimtune.methods.lora.eva import EvaConfig
from slimtune.methods.lora.experts import LoraParameters, holders
from slimtune.methods.lora.layers import KINDS, LINEAR_ONLY, LoraLinear
from slimtune.methods.lora.loftq import LoftQConfig, Originals
from slimtune.methods.lora.tying import TiedCopy, TiedLinear, ends, is_named, share_ends
from slimtune.methods.trainable_tokens import TokenRows, check_tokens, share_tied_rows, token_modules
from slimtune.storage.peft_format import key

INITIALISATIONS = ("gaussian", "pissa", "olora", "eva", "loftq", "orthogonal", "mica")


@register
@dataclass
class LoraConfig(LayeredConfig):
    """What to adapt with LoRA, and how; names, defaults and meanings are those of `peft.LoraConfig`.

    `target_modules=None` means all linear layers in the model's repeated blocks. `rank_pattern` and `alpha_pattern`
    map a module's name or an expression to another `r` or `lora_alpha`. `target_parameters` names parameters that are
    tensors of their module rather than layers, such as `experts.gate_up_proj`; with them, `target_modules=None` means
    no modules besides. `trainable_token_indices` are tokens whose embeddings are trained as well. `lora_bias` trains a
    bias b of B, s (B A x + b). `ensure_weight_tying` trains with an embedding what is tied to it, as one.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "LORA"
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    eva_config: EvaConfig | dict[str, Any] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    layer_replication: list[list[int]] | None = None
    alora_invocation_tokens: list[int] | None = None

    inert: ClassVar[Mapping[str, Any]] = {
        "megatron_config": None, "megatron_core": "megatron.core",
        "corda_config": None, "lora_ga_config": None, "velora_config": None,
        "use_qalora": False, "qalora_group_size": 16, "monteclora_config": None,
        "use_bdlora": None, "arrow_config": None, "kasa_config": None,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._check_numbers()
        self._check_initialisation()
        self._check_parts()
        self.parameters_of: dict[str, list[str]] = {}
        self.tokens_of: dict[str, list[int]] = {}
        self.outputs_of: dict[str, str] = {}
        self.tied_lora: dict[str, str] = {}
        self.tied_copies: dict[str, str] = {}
        self.originals: Originals | None = None
        self.quantizes_base = False  # set where the adapter's file was trained by `peft` on a base that LoftQ replaced

    def _check_parts(self) -> None:
        if self.target_parameters and self.target_modules is None:
            # None would mean all linear layers, beside the parameters that are asked for.
            self.target_modules = set()
        if self.use_dora and self.initialisation == "mica":
            raise ConfigError("init_lora_weights='mica' freezes B, and DoRA trains it; leave out one of them")
        if self.target_parameters and self.use_dora:
            raise ConfigError("use_dora has no form for target_parameters; give those an adapter of their own")
        if self.target_parameters and (self.lora_dropout or self.fan_in_fan_out):
            raise ConfigError(
                "target_parameters changes weights, not the inputs of layers: it takes neither lora_dropout nor "
                f"fan_in_fan_out, found {self.lora_dropout} and {self.fan_in_fan_out}"
            )
        if self.lora_bias and (self.use_dora or not isinstance(self.init_lora_weights, bool)):
            raise ConfigError(
                "lora_bias goes with plain LoRA that starts at zero or at random, found "
                f"use_dora={self.use_dora} and init_lora_weights={self.init_lora_weights!r}"
            )
        if self.lora_bias and self.target_parameters:
            raise ConfigError("lora_bias has no form for target_parameters, which change weights; leave it out")
        if self.layer_replication is not None and not _are_ranges(self.layer_replication):
            raise ConfigError(
                f"layer_replication must be a list of pairs [start, end] of layers, found {self.layer_replication!r}"
            )
        if self.alora_invocation_tokens is not None:
            raise ConfigError(
                "alora_invocation_tokens has an adapter act on the tokens behind an invocation alone, which differ by "
                "row and step; here an adapter acts on all tokens of a call; train it without, or run it with peft"
            )
        tokens = self.trainable_token_indices
        if tokens is not None:
            for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
                check_tokens("trainable_token_indices", indices)

    def further_modules(self, model: Any, modules: Mapping[str, nn.Module], chosen: Sequence[str]) -> list[str]:
        """The owners of `target_parameters`, the embeddings of the tokens, and the output layers of attentions."""
        self.parameters_of = holders(self.target_parameters or [], modules)
        self.tokens_of = token_modules(self.trainable_token_indices or [], model, modules)
        self._check_layers(model)
        self.tied_lora, self.tied_copies = {}, {}
        if self.ensure_weight_tying:
            self.tied_lora, self.tied_copies = ends(modules, chosen, self.modules_to_save or [], self)
        attentions = [name for name in chosen if isinstance(modules[name], nn.MultiheadAttention)]
        self.outputs_of = {f"{name}.out_proj": name for name in attentions}
        further = [*self.parameters_of, *self.tokens_of, *self.outputs_of]
        further += [name for name in self.tied_lora if name not in chosen]
        # An end that `modules_to_save` names itself is there already.
        further += [name for name in self.tied_copies if not is_named(name, self.modules_to_save or [])]
        for name in further:
            if further.count(name) > 1 or any(modules[name] is modules[other] for other in chosen):
                raise TargetError(
                    f"'{name}' is named in two of target_modules, target_parameters and trainable_token_indices; "
                    "leave it to one of them"
                )
        return further

    def link_deltas(self, model: Any, drafted: list[tuple[Site, Any]]) -> None:
        """Let tied embeddings share their trained rows; note where the weights are that LoftQ starts from."""
        share_tied_rows(drafted)
        link_outputs(drafted)
        share_ends(drafted, self.tied_lora, self.tied_copies)
        if self.initialisation == "loftq":
            # Noted and not read: each layer reads its own weight when it is initialised.
            self.originals = Originals.of(model)

    def _check_layers(self, model: Any) -> None:
        """Raises: ConfigError, where `layer_replication` means other layers than the model has."""
        if self.layer_replication is None:
            return
        config = getattr(model, "config", None)
        own: int = getattr(config.get_text_config(), "num_hidden_layers", 0) if config else 0
        ranges = [range(start, end) for start, end in self.layer_replication]
        # Counted first: a file may claim more layers than memory has room for.
        if (
            own is None
            or sum(map(len, ranges)) != own
            or [number for each in ranges for number in each] != list(range(own))
        ):
            raise ConfigError(
                f"layer_replication={self.layer_replication} has the model run its layers in another order or twice, "
                "and an adapter here leaves the model as it is; build that model first, and attach the adapter to it"
            )

    def _check_numbers(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            check_whole(f"the rank {name}", rank)
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            check_number(name, alpha)
        check_number("lora_dropout", self.lora_dropout, 0, 1)
        check_choice("bias", self.bias, ("none", "all", "lora_only"))
        check_choice("lora_bias", self.lora_bias, (True, False))
        check_choice("ensure_weight_tying", self.ensure_weight_tying, (True, False))

    def _check_initialisation(self) -> None:
        init = self.initialisation
        steps = init.removeprefix("pissa_niter_")
        if not isinstance(self.init_lora_weights, bool) and init not in INITIALISATIONS and not steps.isdecimal():
            raise ConfigError(
                "init_lora_weights must be True, False, 'gaussian', 'pissa', 'pissa_niter_[number]', 'olora', 'eva', "
                "'loftq', 'orthogonal' or 'mica', found "
                f"{self.init_lora_weights!r}{did_you_mean(init, INITIALISATIONS)}"
            )
        if isinstance(self.eva_config, dict):
            self.eva_config = _settings(EvaConfig, self.eva_config)
        if init == "loftq" and not isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = _settings(LoftQConfig, self.loftq_config or {})
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
        if self.initialisation == "loftq" and not self.quantizes_base:
            # Whoever reads it finds the quantized base as it was, not one that the start has changed. A file that
            # LoftQ's own quantization belongs to is written as it was read: its change is of full rank besides.
            return super().stored_fields() | {"init_lora_weights": True, "loftq_config": {}}
        if not self.moves_start:
            return super().stored_fields()
        # s = alpha / r stays what it is at rank 2r with 2 alpha, and alpha / sqrt(r) with sqrt(2) alpha.
        by = math.sqrt(2) if self.use_rslora else 2
        return super().stored_fields() | {
            "init_lora_weights": True,
            "r": 2 * self.r,
            "rank_pattern": {name: 2 * rank for name, rank in self.rank_pattern.items()},
            "lora_alpha": by * self.lora_alpha,
            "alpha_pattern": {name: by * alpha for name, alpha in self.alpha_pattern.items()},
        }

    def read(self, tensors: Mapping[str, Tensor], placed: list[tuple[Site, Any]], source: object) -> dict[str, Tensor]:
        """The tensors as changes of the base at hand, where `peft` has changed the base at the start of training.

        Such a file holds A and B alone. What the base was changed by is computed again, as `peft` does when it loads.

        Raises:
            ConfigError: the deltas don't start where the stored ones did.
        """
        tensors = dict(tensors)
        for site, delta in placed if self.moves_start or self.initialisation == "loftq" else ():
            # By their keys in the file, (r, in) and (out, r), before any of it is in a delta.
            names = key(site.name, "lora_A.weight"), key(site.name, "lora_B.weight")
            if not isinstance(delta, LoraLinear) or not tensors.keys() >= set(names):
                continue
            if self.initialisation == "loftq":
                assert isinstance(self.loftq_config, LoftQConfig)
                self.quantizes_base |= delta.stand_on_quantized(site, self.loftq_config)
            elif not delta.moved:
                raise ConfigError(
                    f"'{source}' was trained from init_lora_weights={self.init_lora_weights!r} and the adapter that it "
                    "is to be put into was not; load it under another name"
                )
            elif len(tensors[names[0]]) != delta.r:
                continue  # 2 r: this library's own, as a Trainer's checkpoint is
            elif "niter" in self.initialisation:
                raise ConfigError(
                    f"'{source}' was trained on a base less a start that {self.init_lora_weights!r} drew at random and "
                    "that nothing finds again; convert it where it was trained, with peft's "
                    "path_initial_model_for_weight_conversion"
                )
            else:
                a, b = delta.since_start(self, site, *(tensors[name] for name in names))
                tensors |= {names[0]: a, names[1]: b}
        return tensors

    def rank_for(self, name: str) -> int:
        """The rank of the module of this path, by `rank_pattern`."""
        return by_pattern(self.rank_pattern, name, self.r)

    def alpha_for(self, name: str) -> float:
        """The alpha of the module of this path, by `alpha_pattern`."""
        return by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def scale_for(self, name: str) -> float:
        """The factor s of the update."""
        r, alpha = self.rank_for(name), self.alpha_for(name)
        # rsLoRA: divided by r, a larger rank learns less and less; by sqrt(r), steps stay as large at any rank.
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def combined(self, others: Sequence[LoraConfig], how: str, rank: int | None) -> LoraConfig:
        """The config of a weighted combination. Raises: ConfigError, for targets that can't be joined."""
        configs = [self, *others]
        if len({config.lora_bias for config in configs}) > 1:
            raise ConfigError("adapters with and without lora_bias can't be combined into one; activate them together")
        # DoRA's product has a factor m / n behind it, so that its factors mean something else than those of LoRA.
        if len({config.use_dora for config in configs}) > 1:
            raise ConfigError("adapters with and without DoRA can't be combined into one; activate them together")
        targets = self.joined_targets(others)
        # A moved start is B A - B0 A0, of rank 2r.
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
        if site.name in self.tied_copies:
            return TiedCopy(site)
        if isinstance(site.module, nn.MultiheadAttention) or site.name in self.outputs_of:
            return self._in_attention(site, autocast_adapter_dtype)
        kinds = dora.KINDS if self.use_dora else KINDS
        if site.kind not in kinds:
            raise wrong_kind(site, "LoRA", "linear, convolution and embedding layers")
        if site.kind != "linear" and self.initialisation.startswith(LINEAR_ONLY):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} is for linear layers, and '{site.name}' is a "
                f"{type(site.module).__name__}; leave it out of target_modules"
            )
        # The factors are the embedding's and have its rank; the scale is that of this end's own name, as in `peft`.
        leader = self.tied_lora.get(site.name, site.name)
        kind, r = TiedLinear if leader != site.name else kinds[site.kind], self.rank_for(leader)
        self._check_start(site, r, *kind.shapes(site, r))
        delta = kind(site, r, self.scale_for(site.name), self.lora_dropout, autocast_adapter_dtype)
        if self.moves_start:
            delta.keep_start()
        if self.initialisation == "mica":
            delta.freeze_b()
        if self.lora_bias:
            delta.add_bias(site)
        if self.bias == "lora_only" and getattr(site.module, "bias", None) is not None:
            delta.hold(site, "bias")
        return delta

    def _in_attention(self, site: Site, autocast: bool) -> Delta:
        """The change of an attention, or of its output layer, which has the same rank."""
        attention = self.outputs_of.get(site.name)
        if attention is None:
            check_attention(site, self)
        kind, name = (LoraAttention, site.name) if attention is None else (LoraOutput, attention)
        return kind(site, self.rank_for(name), self.scale_for(name), self.lora_dropout, autocast)

    def _check_start(self, site: Site, r: int, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
        """Raises: ConfigError, where the start has no factors of this rank."""
        rows, columns = b_shape[0], math.prod(a_shape[1:])
        if self.initialisation.startswith(("pissa", "olora", "eva", "loftq", "mica")) and r > min(rows, columns):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} has no {r} directions to start from in the "
                f"{rows} x {columns} matrix of '{site.name}'; choose r <= {min(rows, columns)} or give it a rank of "
                "its own in rank_pattern"
            )
        if self.initialisation == "orthogonal" and r % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank, '{site.name}' has {r}")


def _are_ranges(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and [type(number) for number in pair] == [int, int] for pair in value
    )


def _settings(kind: type[EvaConfig] | type[LoftQConfig], given: Mapping[str, Any]) -> Any:
    """A start's own settings from a mapping. Raises: ConfigError, for a field that doesn't exist."""
    known = [f.name for f in fields(kind)]
    for name in given:
        if name not in known:
            near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"{kind.__name__} has no field '{name}'{near}")
    return kind(**given)
