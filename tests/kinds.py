"""Every kind of module that a delta attaches to, and every method, as hypothesis strategies."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import slimtune
from quantizers import QUANTIZERS, Quantizer, expanded
from slimtune.bases import base_of
from slimtune.core.config import PeftConfig, TargetedConfig, methods
from slimtune.core.frozen import Site
from slimtune.errors import ConfigError, TargetError


class ScaledLinear(nn.Linear):
    """A subclass with a forward of its own: what counts is what it computes, not its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x).tanh()


class NamedLinear(nn.Linear):
    """A subclass with another constructor."""

    def __init__(self, label: str, features_in: int, features_out: int) -> None:
        super().__init__(features_in, features_out)
        self.label = label


class Host(nn.Module):
    """A model of one site, between two places where gradients pass."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


@dataclass(frozen=True)
class Kind:
    """One kind of module: how to build it, an input for it, its ranks, and whether a delta folds in."""

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    greatest_rank: int
    rank_step: int = 1
    folds: bool = True

    def host(self, seed: int = 0) -> Host:
        torch.manual_seed(seed)
        return Host(self.build()).eval()

    def exact(self, dtype: torch.dtype) -> nn.Module:
        """The site of a host, computing in this dtype; what is quantized is expanded."""
        return expanded(self.host().site).to(dtype).requires_grad_(False)

    def input(self, seed: int = 1) -> Tensor:
        torch.manual_seed(seed)
        return self.example()

    def __repr__(self) -> str:
        return self.name


def linear(cls: Callable[..., nn.Module], name: str, **options: Any) -> Kind:
    return Kind(name, lambda: cls(12, 7, **options), lambda: torch.randn(2, 3, 12), 7)


def convolution(name: str, cls: type[nn.Module], shape: tuple[int, ...], **options: Any) -> Kind:
    groups = options.get("groups", 1)
    return Kind(
        name,
        lambda: cls(4, 8, **options),
        lambda: torch.randn(2, 4, *shape),
        greatest_rank=4 if options["kernel_size"] == 1 else 8,
        rank_step=groups,
        folds=groups == 1,
    )


def embedding(name: str, **options: Any) -> Kind:
    return Kind(name, lambda: nn.Embedding(11, 6, **options), lambda: torch.randint(0, 11, (2, 5)), 6)


def quantized(quantizer: Quantizer, **options: Any) -> Kind:
    return linear(quantizer.linear, f"linear-in-{quantizer}", **options)


FLOATING = (
    linear(nn.Linear, "linear"),
    linear(nn.Linear, "linear-without-bias", bias=False),
    linear(lambda i, o: NamedLinear("mine", i, o), "subclass-of-linear"),
    linear(ScaledLinear, "linear-with-own-forward"),
    linear(lambda i, o: Conv1D(o, i), "gpt2-conv1d"),
    convolution("conv1d", nn.Conv1d, (9,), kernel_size=3, padding=1),
    convolution("conv1d-strided", nn.Conv1d, (9,), kernel_size=4, stride=2, dilation=2, bias=False),
    convolution("conv2d", nn.Conv2d, (6, 5), kernel_size=3),
    convolution("conv2d-odd", nn.Conv2d, (6, 7), kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
    convolution("conv2d-same", nn.Conv2d, (6, 5), kernel_size=3, padding="same"),
    convolution("conv2d-circular", nn.Conv2d, (6, 5), kernel_size=3, padding=1, padding_mode="circular"),
    convolution("conv2d-reflect", nn.Conv2d, (6, 5), kernel_size=3, padding=2, padding_mode="reflect"),
    convolution("conv2d-1x1", nn.Conv2d, (3, 3), kernel_size=1),
    convolution("conv2d-grouped", nn.Conv2d, (6, 5), kernel_size=3, groups=2),
    convolution("conv3d", nn.Conv3d, (4, 3, 3), kernel_size=2),
    Kind("layer-norm", lambda: nn.LayerNorm(12), lambda: torch.randn(2, 3, 12), 1),
    Kind("layer-norm-without-bias", lambda: nn.LayerNorm(12, bias=False), lambda: torch.randn(2, 3, 12), 1),
    embedding("embedding"),
    embedding("embedding-padded", padding_idx=3),
)
QUANTIZED = tuple(quantized(quantizer, bias=i % 2 == 0) for i, quantizer in enumerate(QUANTIZERS))
KINDS = FLOATING + QUANTIZED
FOLDING = tuple(kind for kind in KINDS if kind.folds)


def scales() -> st.SearchStrategy[float]:
    return st.sampled_from([1, 4, 16, 0.5, 7])


@st.composite
def lora_configs(draw: st.DrawFn, kind: Kind, **fixed: Any) -> slimtune.LoraConfig:
    ranks = range(kind.rank_step, kind.greatest_rank + 1, kind.rank_step)
    drawn = {
        "r": draw(st.sampled_from(list(ranks))),
        "lora_alpha": draw(scales()),
        "use_rslora": draw(st.booleans()),
        "use_dora": kind.folds and draw(st.booleans()),  # DoRA has no norm for a grouped convolution
        "init_lora_weights": draw(st.sampled_from([True, "gaussian"])),
        "lora_dropout": draw(st.sampled_from([0.0, 0.3])),
        "bias": draw(st.sampled_from(["none", "none", "all", "lora_only"])),
        "target_modules": draw(st.sampled_from([["site"], "site", ".*ite"])),
    }
    return slimtune.LoraConfig(**{**drawn, **fixed})


@st.composite
def vera_configs(draw: st.DrawFn, kind: Kind, **fixed: Any) -> slimtune.VeraConfig:
    drawn = {
        "r": draw(st.sampled_from([1, 5, 32])),
        "projection_prng_key": draw(st.integers(0, 3)),
        "save_projection": draw(st.booleans()),
        "vera_dropout": draw(st.sampled_from([0.0, 0.3])),
        "bias": draw(st.sampled_from(["none", "none", "all", "vera_only"])),
        "target_modules": ["site"],
    }
    return slimtune.VeraConfig(**{**drawn, **fixed})


@st.composite
def token_configs(draw: st.DrawFn, kind: Kind, **fixed: Any) -> slimtune.TrainableTokensConfig:
    rows = 11 if kind.name.startswith("embedding") else 7
    tokens = draw(st.permutations(range(rows)))[: draw(st.integers(rows - 2, rows))]
    return slimtune.TrainableTokensConfig(**{"token_indices": tokens, "target_modules": ["site"], **fixed})


@st.composite
def bottleneck_configs(draw: st.DrawFn, kind: Kind, **fixed: Any) -> slimtune.BottleneckConfig:
    drawn = {
        **draw(st.sampled_from([{"bottleneck_size": 4}, {"bottleneck_size": 20}, {"reduction_factor": 1.5}])),
        "placement": draw(st.sampled_from(["houlsby", "pfeiffer"])),
        "non_linearity": draw(st.sampled_from(["relu", "gelu", "swish", "tanh"])),
        "scaling": draw(st.sampled_from([1.0, 4, "learned"])),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "target_modules": ["site"],
    }
    return slimtune.BottleneckConfig(**{**drawn, **fixed})


NEEDED: dict[str, dict[str, Any]] = {"TRAINABLE_TOKENS": {"token_indices": list(range(4, 60))}}
"""What a method can't do without being told."""


def ia3_configs(kind: Kind, **fixed: Any) -> st.SearchStrategy[PeftConfig]:
    in_front = st.sampled_from([None, ["site"], ".*ite", "none.*"])
    return st.builds(
        lambda f: slimtune.IA3Config(**{"target_modules": ["site"], "feedforward_modules": f, **fixed}), in_front
    )


def bitfit_configs(kind: Kind, **fixed: Any) -> st.SearchStrategy[PeftConfig]:
    return st.builds(
        lambda b: slimtune.BitFitConfig(**{"target_modules": ["site"], "add_bias": b, **fixed}), st.booleans()
    )


def full_configs(kind: Kind, **fixed: Any) -> st.SearchStrategy[PeftConfig]:
    stores, targets = st.sampled_from(["difference", "whole"]), st.sampled_from([["site"], None])
    return st.builds(lambda s, t: slimtune.FullConfig(**{"target_modules": t, "store": s, **fixed}), stores, targets)


@st.composite
def loha_configs(draw: st.DrawFn, kind: Kind, **fixed: Any) -> slimtune.LoHaConfig:
    drawn = {
        "r": draw(st.sampled_from([1, 3, 8])),
        "alpha": draw(scales()),
        "rank_dropout": draw(st.sampled_from([0.0, 0.3])),
        "use_effective_conv2d": draw(st.booleans()),
        "target_modules": ["site"],
    }
    return slimtune.LoHaConfig(**{**drawn, **fixed})


@st.composite
def lokr_configs(draw: st.DrawFn, kind: Kind, **fixed: Any) -> slimtune.LoKrConfig:
    drawn = {
        "r": draw(st.sampled_from([1, 3, 8])),
        "alpha": draw(scales()),
        "rank_dropout": draw(st.sampled_from([0.0, 0.3])),
        "rank_dropout_scale": draw(st.booleans()),
        "decompose_both": draw(st.booleans()),
        "decompose_factor": draw(st.sampled_from([-1, 2, 3])),
        "use_effective_conv2d": draw(st.booleans()),
        "target_modules": ["site"],
    }
    return slimtune.LoKrConfig(**{**drawn, **fixed})


STRATEGIES: dict[str, Callable[..., st.SearchStrategy[PeftConfig]]] = {
    "BITFIT": bitfit_configs,
    "FULL": full_configs,
    "IA3": ia3_configs,
    "BOTTLENECK": bottleneck_configs,
    "LORA": lora_configs,
    "LOHA": loha_configs,
    "LOKR": lokr_configs,
    "TRAINABLE_TOKENS": token_configs,
    "VERA": vera_configs,
}
"""More than the defaults of a method, where there is more to try; a method without a strategy is tested with these."""


def configs(method: str, kind: Kind, **fixed: Any) -> st.SearchStrategy[PeftConfig]:
    """Configs of a method for the site of a host of that kind."""
    known = {field.name for field in dataclasses.fields(methods()[method])}
    options = {name: value for name, value in fixed.items() if name in known}
    if method in STRATEGIES:
        return STRATEGIES[method](kind, **options)
    return st.builds(lambda: methods()[method](**{"target_modules": ["site"], **options}))


@functools.cache
def methods_for(kind: Kind) -> tuple[str, ...]:
    """The methods that attach to a module of that kind, found by trying."""
    return tuple(method for method in sorted(methods()) if _attaches(method, kind))


def _attaches(method: str, kind: Kind) -> bool:
    if not issubclass(methods()[method], TargetedConfig):
        return False
    module = kind.build()
    config: Any = methods()[method](target_modules=["site"])
    try:
        config.delta_for(Site("site", module, base_of(module)))
    except TargetError:
        return False
    except ConfigError:  # a default that is too large for so small a module
        pass
    return True


@functools.cache
def folds(method: str) -> bool:
    """Whether what a method changes can be written into weights."""
    config: Any = methods()[method](**{"target_modules": ["site"], **NEEDED.get(method, {})})
    for module in (nn.Linear(64, 64), nn.Embedding(64, 64), nn.LayerNorm(64)):
        try:
            return not config.delta_for(Site("site", module, base_of(module))).unmergeable
        except TargetError:
            continue
    raise AssertionError(f"{method} attaches to none of the usual modules")


@st.composite
def cases(
    draw: st.DrawFn, kinds: tuple[Kind, ...] = KINDS, among: tuple[str, ...] = (), **fixed: Any
) -> tuple[Kind, PeftConfig]:
    """A kind of module and a config of some method (of `among`, if given) that attaches to it."""
    fitting = [kind for kind in kinds if set(methods_for(kind)) & set(among or methods_for(kind))]
    kind = draw(st.sampled_from(fitting))
    method = draw(st.sampled_from([name for name in methods_for(kind) if name in (among or methods_for(kind))]))
    return kind, draw(configs(method, kind, **fixed))


def attach(kind: Kind, config: PeftConfig, adapter: str = "default") -> Any:
    """A fresh host of that kind with a fresh adapter."""
    return slimtune.get_peft_model(kind.host(), config, adapter_name=adapter)
