"""What LoRA puts on a layer: the factors A and B by kind of module, where they start, and how they are combined.

The kinds differ in what A and B do; the formula around them is the same.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.delta import Delta, RowParts, trainable_dtype
from slimtune.core.frozen import Dense, Frozen, Site, TensorSpec
from slimtune.errors import ConfigError, MergeError
from slimtune.methods.lora.combine import combined
from slimtune.methods.lora.init import Factors, mica, orthogonal, pissa, principal, warn_of_rank
from slimtune.methods.lora.loftq import LoftQConfig, Originals, is_4bit, quantized_by_loftq

LINEAR_ONLY = ("pissa", "olora", "loftq", "orthogonal", "mica")
"""The starts that read the weight of a linear layer."""


class Start(Protocol):
    """What a layer reads of the `LoraConfig` that it is initialised by."""

    init_lora_weights: bool | str
    loftq_config: LoftQConfig | dict[str, Any]
    originals: Originals | None

    @property
    def initialisation(self) -> str: ...


class LoraDelta(Delta):
    """What the kinds share: y = base(x) + s * up(down(dropout(x))).

    Attributes:
        scaling: the factor s.
        r: the rank.
        lora_dropout: the probability with which an input of A is dropped while training.
        lora_bias: b of s (B A x + b), (out,), where it is trained.
    """

    factors: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    weight_name: ClassVar[str] = "weight"
    on_disk = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
        "whole.bias": "base_layer.bias",
    }
    lora_bias: nn.Parameter | None

    def __init__(self, site: Site, r: int, scaling: float, dropout: float, autocast: bool) -> None:
        super().__init__()
        self.r, self.scaling, self.lora_dropout = r, scaling, dropout
        weight = self.spec(site)
        # float32 on a 16-bit base: bfloat16's numbers near 0.01 lie 6e-5 apart, and a smaller step is lost.
        dtype = trainable_dtype(weight.dtype, autocast)
        for name, shape in zip(self.factors, self.shapes(site, r), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)))

        self.register_parameter("lora_bias", None)

    @staticmethod
    def spec(site: Site) -> TensorSpec:
        """The shape, dtype and device of the weight that is changed."""
        return site.spec

    @staticmethod
    @abstractmethod
    def shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A (r first) and B (out first)."""

    @property
    def trained(self) -> tuple[nn.Parameter, nn.Parameter]:
        """(A, B) as they are trained; with MiCA, B stays as it is."""
        a, b = self.factors
        return getattr(self, a), getattr(self, b)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B), whose product is the change."""
        return self.trained

    def add_bias(self, site: Site) -> None:
        """Train a bias of B as well, zero at the start."""
        self.lora_bias = nn.Parameter(self.trained[1].new_zeros(site.base.features(site.module)[1]))

    def biased(self, bias_O: Tensor | None) -> Tensor | None:
        """The bias of the base and s b: in one product, both are one."""
        if self.lora_bias is None:
            return bias_O
        # In the adapter's float32: the product casts the sum to its own dtype once.
        return self.scaling * self.lora_bias if bias_O is None else bias_O + self.scaling * self.lora_bias

    def freeze_b(self) -> None:
        """Leave B as it starts: a buffer, stored with the adapter and never trained."""
        b = self.trained[1]
        delattr(self, self.factors[1])
        self.register_buffer(self.factors[1], b.detach())

    def keep_start(self) -> None:
        """Keep factors to start from. Raises: ConfigError, for kinds that have none."""
        raise ConfigError(f"a {type(self).__name__} starts from no factors of its base")

    def initialise(self, config: Start, site: Site) -> None:
        """Set A and B; the update s B A is zero, but for `init_lora_weights=False`, where both are drawn."""
        a, b = self.trained
        warn_of_rank(self.r, b.shape[0], a[0].numel())
        if config.initialisation == "gaussian":
            nn.init.normal_(a, std=1 / self.r)
        else:
            # He-uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)): how `nn.Linear` and so `peft` draw A.
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)

    def forward(self, base: Frozen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        # In the adapter's dtype and rounded once: the plain formula is what the fused products are compared with.
        return (y + self.scaling * self.low_rank(self.dropped(x))).to(y.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """dropout(x), in the adapter's dtype."""
        x = x.to(self.trained[0].dtype)
        return F.dropout(x, self.lora_dropout) if self.training and self.lora_dropout else x

    def low_rank(self, x: Tensor) -> Tensor:
        """B(A(x)), unscaled."""
        a, b = self.pair
        return self.up(self.down(x, a), b)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def up(self, z: Tensor, b: Tensor) -> Tensor:
        return F.linear(z, b, self.lora_bias)

    def product(self) -> Tensor:
        """B A as (out, in, ...) in float32: the update without its scale."""
        # (out, r) by (r, in, ...) over r.
        a, b = (factor.float() for factor in self.pair)
        return torch.tensordot(b, a, dims=1)

    def fold(self, dense: Dense) -> Dense:
        weight = dense[self.weight_name]
        # Added in float32 and rounded once: a 16-bit sum would round the small update before it is there.
        folded = {self.weight_name: weight.float().add(self.product(), alpha=self.scaling).to(weight.dtype)}
        if self.lora_bias is not None:
            if "bias" not in dense:
                raise MergeError(
                    "lora_bias was trained on a layer that has no bias to write it into; keep the adapter apart"
                )
            bias = dense["bias"]
            # With the same scale: B's bias is behind s, as its weight is.
            folded["bias"] = bias.float().add(self.lora_bias, alpha=self.scaling).to(bias.dtype)
        return dense | folded

    @classmethod
    def combine(
        cls, deltas: list[Any], weights: list[float], how: str, target: Any, site: Site, **options: Any
    ) -> None:
        """Set `target` to a combination of sum_i w_i s_i B_i A_i; `how` and its options are those of `combined`."""
        a, b = combined(deltas, weights, how, target.r, **options)
        with torch.no_grad():
            for factor, value, ranks in (
                (target.trained[0], a, (slice(a.shape[0]),)),
                (target.trained[1], b, (slice(None), slice(b.shape[1]))),
            ):
                # An "svd" of a small matrix gives fewer ranks than the target may have.
                factor.zero_()
                factor[ranks].copy_(value.view_as(factor[ranks]))
            # The scales s_i are inside of the factors. Ranks beyond what was put in stay zero, and add nothing.
            if target.lora_bias is not None:
                # As for the factors, scales inside: the target's own is one.
                scales = [weight * delta.scaling for weight, delta in zip(weights, deltas, strict=True)]
                biases = [scale * delta.lora_bias for scale, delta in zip(scales, deltas, strict=True)]
                target.lora_bias.copy_(torch.stack(biases).sum(0))
        target.scaling = 1.0

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.lora_dropout:g}"


class LoraLinear(LoraDelta):
    """y_TO = base(x_TI) + s * (x_TI A_RI^T) B_OR^T."""

    @staticmethod
    def shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        features_in, features_out = site.base.features(site.module)
        return (r, features_in), (features_out, r)

    def row_parts(self, base: Frozen) -> RowParts | None:
        a_RI, b_OR = self.pair
        return RowParts(a_RI, self.scaling * b_OR, bias=self.biased(None))

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

    def initialise(self, config: Start, site: Site) -> None:
        if not config.initialisation.startswith(LINEAR_ONLY):
            super().initialise(config, site)
            return
        with torch.no_grad():
            for parameter, value in zip(self.trained, self._start(config, site), strict=True):
                parameter.copy_(value)
            if self.moved:
                # Copies in the adapter's own dtype, so that the difference is exactly zero at the start.
                self.get_buffer("start_A").copy_(self.trained[0])
                self.get_buffer("start_B").copy_(self.trained[1])

    def _start(self, config: Start, site: Site) -> Factors:
        """The factors that follow from the base weight. Raises: ConfigError, where that can't be read."""
        if site.spec.device.type == "meta":
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} reads the weight of '{site.name}', which is offloaded"
            )
        if config.initialisation == "loftq":
            assert config.originals is not None
            assert isinstance(config.loftq_config, LoftQConfig)
            config.loftq_config.check()
            return pissa(config.originals.lost(site), self.r, self.scaling)
        weight_OI = site.base.weight(site.module).detach()
        if config.initialisation == "orthogonal":
            return orthogonal(weight_OI, self.r)
        if config.initialisation == "mica":
            return mica(weight_OI, self.r)
        return principal(weight_OI, self.r, self.scaling, config.initialisation)

    def since_start(self, config: Start, site: Site, a_RI: Tensor, b_OR: Tensor) -> Factors:
        """Factors of B A - B0 A0, for A and B that `peft` trained on the base less B0 A0."""
        # Zeros until the start was computed: a weight that trains has no zero for its leading direction.
        a0_RI, b0_OR = self.get_buffer("start_A"), self.get_buffer("start_B")
        if not a0_RI.any():
            # Filled and not started: the same decomposition of the same weight gives the same product, whatever the
            # signs of its directions.
            self.initialise(config, site)
        return _difference(a_RI.to(a0_RI), b_OR.to(b0_OR), a0_RI, b0_OR)

    def stand_on_quantized(self, site: Site, config: LoftQConfig) -> bool:
        """Let what LoftQ's quantization leaves of W stand in for W; a base in 4 bits is that already.

        Returns:
            Whether there is a stand-in.

        Raises:
            ConfigError: the base is quantized otherwise.
        """
        if is_4bit(site):
            return False
        if site.base.dequantizer(site.module) is not None:
            raise ConfigError(
                f"'{site.name}' is quantized otherwise than LoftQ quantized the base that this adapter was trained on; "
                'load the base in 16 bits or with quantize="nf4"'
            )
        weight_OI = site.base.weight(site.module).detach()
        # Of full rank, W - Q fits into no factors: Q takes the place of W while this adapter is active.
        quantized = quantized_by_loftq(weight_OI, self.r, config).to(weight_OI.dtype)
        self.hold_beside("weight", site.base.repack(site.module, {"weight": quantized})["weight"])
        return True

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
        # [A - A0; A0] and [B, B - B0], the rank-2r LoRA of the file, taken apart again (ADR 7).
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
        # By the number of the kernel's axes; a transposed convolution never comes here, for it is no `conv` base.
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]
        self.pad: tuple[list[int], str] | None = None
        if conv.padding_mode != "zeros":
            # `F.conv2d` pads with zeros alone: reflected and circular borders are padded before it.
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
        return self.convolve(z, b, self.lora_bias, groups=self.groups)

    def product(self) -> Tensor:
        if self.groups > 1:
            raise MergeError(
                "an update of a grouped convolution is not grouped itself and can't be merged; "
                "exclude that module, or keep the adapter apart"
            )
        a, b = (factor.float() for factor in self.pair)
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

    def initialise(self, config: Start, site: Site) -> None:
        a, b = self.trained
        warn_of_rank(self.r, b.shape[0], a.shape[1])
        # The other way round than in a linear layer, as in `peft`: A is the looked-up table, and starts at zero.
        nn.init.normal_(a) if config.init_lora_weights is False else nn.init.zeros_(a)
        nn.init.normal_(b)

    def add_bias(self, site: Site) -> None:
        raise ConfigError(f"lora_bias is for layers, and '{site.name}' is an embedding; leave it out of target_modules")

    def dropped(self, x: Tensor) -> Tensor:
        """The ids: there is nothing in them to drop."""
        return x

    def low_rank(self, x: Tensor) -> Tensor:
        return super().low_rank(x) * self.embed_scale

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        # A^T (rows, r) is looked up as the base's table is; the row of the padding token gets no gradient.
        return F.embedding(x, a.t(), self.padding_idx)


KINDS: dict[str, type[LoraDelta]] = {"linear": LoraLinear, "conv": LoraConv, "embedding": LoraEmbedding}
