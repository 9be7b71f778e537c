"""LoRA on `nn.MultiheadAttention`, which holds query, key and value in one weight and never calls its output layer.

W'_in = W_in + s B A, (3 D, D),  W'_out = W_out + 2 s B A, (D, D);  both stand in for the module's own while it runs
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.core.frozen import Frozen, Site, TensorSpec, standing_in
from slimtune.errors import ConfigError, TargetError
from slimtune.methods.lora.layers import LoraDelta, LoraLinear
from slimtune.storage.peft_format import key


class LoraAttention(LoraDelta):
    """At the attention: W_in + s B A, with A (r, D) and B (3 D, r); it puts the output layer's change in as well.

    Attributes:
        output: the change of the output layer, in a tuple so that it isn't a part of this delta.
    """

    reweighs = True
    weight_name = "in_proj_weight"
    output: tuple[LoraOutput, ...] = ()

    @staticmethod
    def shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        features = site.module.embed_dim
        return (r, features), (3 * features, r)

    @staticmethod
    def spec(site: Site) -> TensorSpec:
        weight = site.module.in_proj_weight
        return TensorSpec(weight.shape, weight.dtype, weight.device)

    def forward(self, base: Frozen, *args: Any, **kwargs: Any) -> Any:
        module, (output,) = base.module, self.output
        # What stands there by now, which may be another adapter's: changes of weights add up.
        # (3 D, D) and (D, D), made anew in each call: of a change of weights autograd keeps the factors alone.
        own = {"in_proj_weight": _changed(self, module._parameters["in_proj_weight"])}
        out = {"weight": _changed(output, module.out_proj._parameters["weight"])}
        with standing_in(module, own), standing_in(module.out_proj, out):
            return base(*args, **kwargs)


class LoraOutput(LoraLinear):
    """W_out + 2 s B A at the output layer, (D, D), whose forward isn't called: `LoraAttention` and merges find it here.

    `peft` adds s B A to the weight, and then has the layer merge it as well: that is what its files were trained as.
    """

    def __init__(self, site: Site, r: int, scaling: float, dropout: float, autocast: bool) -> None:
        super().__init__(site, r, scaling, dropout, autocast)
        self.attention, _, self.name = site.name.rpartition(".")

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        a, b = self.trained
        return 2 * a, b

    @classmethod
    def combine(
        cls, deltas: list[Any], weights: list[float], how: str, target: Any, site: Site, **options: Any
    ) -> None:
        super().combine(deltas, weights, how, target, site, **options)
        with torch.no_grad():
            target.trained[0].div_(2)  # the factors that were found are those of `pair`

    def disk_name(self, parameter: str) -> str:
        """As `peft` nests its wrappers: the attention is wrapped as a whole, and the layer inside of it."""
        return "/" + key(self.attention, f"base_layer.{self.name}.{super().disk_name(parameter)}")


def _changed(delta: LoraDelta, weight_OI: Tensor) -> Tensor:
    """W + s B A in the shape and dtype of W."""
    a_RI, b_OR = (factor.to(weight_OI.dtype) for factor in delta.pair)
    # A stand-in has the dtype of what it stands for, also under autocast.
    with torch.autocast(weight_OI.device.type, enabled=False):
        return torch.addmm(weight_OI, b_OR, a_RI, alpha=delta.scaling)


def check_attention(site: Site, config: Any) -> None:
    """Raises: TargetError, ConfigError, for an attention or a kind of LoRA that has no such form."""
    # There torch keeps three weights apart, which `peft` refuses as well.
    if not site.module._qkv_same_embed_dim:
        raise TargetError(f"'{site.name}' reads keys or values of another width than its queries; leave it out of LoRA")
    if not isinstance(config.init_lora_weights, bool) and config.initialisation != "gaussian":
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} starts from the weights of layers and has no form for "
            f"'{site.name}', an nn.MultiheadAttention; use True or 'gaussian'"
        )
    if config.use_dora or config.lora_bias or config.bias != "none":
        raise ConfigError(
            f"'{site.name}' is an nn.MultiheadAttention, which takes plain LoRA; leave out use_dora, lora_bias and bias"
        )
    # `peft` takes a dropout here and drops nothing, so that its files may name one.
    if config.lora_dropout and not config.inference_mode:
        raise ConfigError(
            f"'{site.name}' is an nn.MultiheadAttention, of which LoRA changes the weights and not the inputs of "
            f"layers, so that lora_dropout={config.lora_dropout} has nothing to drop; set it to 0"
        )


def link_outputs(drafted: Any) -> None:
    """Show each attention the change of its output layer."""
    outputs = {delta.attention: delta for _, delta in drafted if isinstance(delta, LoraOutput)}
    for site, delta in drafted:
        if isinstance(delta, LoraAttention):
            delta.output = (outputs[site.name],)
