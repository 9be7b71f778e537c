"""LoRA on single parameters: weights that a module keeps as tensors rather than as linear layers, as experts do.

W'_e = W_e + s * B_e A_e for each expert e, and the module computes with W' whatever it computes with W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.delta import Delta, trainable_dtype
from slimtune.core.frozen import Dense, Frozen, Site
from slimtune.errors import ConfigError, TargetError, did_you_mean, listing
from slimtune.methods.lora.init import warn_of_rank, wide


class LoraParameters(Delta):
    """W'_EOI = W_EOI + s * B_EOR A_ERI for parameters of one module; W may be stored as (E, in, out) or (out, in).

    A is kept as (r * E, in) and B as (out, r * E), as in `peft`: in A the experts lie one after the other, in B their
    columns take turns.

    Attributes:
        names: the parameters, in the module's order.
        scaling: the factor s of each.
    """

    reweighs = True

    def __init__(self, site: Site, ranks: Mapping[str, int], scaling: Mapping[str, float], autocast: bool) -> None:
        super().__init__()
        self.names, self.ranks, self.scaling = tuple(ranks), dict(ranks), dict(scaling)
        # Which way round a stored tensor lies, transformers says by a flag of the module.
        self.is_transposed = bool(getattr(site.module, "is_transposed", False))
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, r in ranks.items():
            weight = site.module.get_parameter(name)
            _check(site, name, weight)
            experts, features_out, features_in = self._shape(weight)
            options: Any = {"device": weight.device, "dtype": trainable_dtype(weight.dtype, autocast)}
            self.lora_A[name] = nn.Parameter(torch.empty(r * experts, features_in, **options))
            self.lora_B[name] = nn.Parameter(torch.empty(features_out, r * experts, **options))

    def _shape(self, weight: Tensor) -> tuple[int, int, int]:
        """(experts, out, in) of a stored parameter."""
        experts, rows, columns = (1, *weight.shape)[-3:]
        return (experts, columns, rows) if self.is_transposed and weight.ndim == 3 else (experts, rows, columns)

    def initialise(self, config: Any, site: Site) -> None:
        """Set A and B; the update is zero, but for `init_lora_weights=False`, where both are drawn."""
        how = config.init_lora_weights
        if not isinstance(how, bool) and str(how).lower() != "gaussian":
            raise ConfigError(
                f"init_lora_weights={how!r} starts from the weights of layers and has no form for target_parameters; "
                "use True or 'gaussian'"
            )
        for name in self.names:
            a, b = self.lora_A[name], self.lora_B[name]
            warn_of_rank(self.ranks[name], *self._shape(site.module.get_parameter(name))[1:])
            if isinstance(how, str):
                nn.init.normal_(a, std=1 / self.ranks[name])
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b) if how else nn.init.kaiming_uniform_(b, a=math.sqrt(5))

    def forward(self, base: Frozen, *args: Any, **kwargs: Any) -> Any:
        weights = {name: self.adapted(name, base.module._parameters[name]) for name in self.names}
        return base.under(weights, *args, **kwargs)

    def adapted(self, name: str, weight: Tensor) -> Tensor:
        """W' in the shape and dtype of W: one new tensor, of which autograd keeps the factors alone."""
        experts, features_out, features_in = self._shape(weight)
        # Views of the stored layouts: A is (E * r, in), B (out, r * E) with the expert counting fastest.
        a_ERI = self.lora_A[name].view(experts, -1, features_in)
        b_EOR = self.lora_B[name].view(features_out, -1, experts).permute(2, 0, 1)
        left, right = (a_ERI.mT, b_EOR.mT) if self.is_transposed and weight.ndim == 3 else (b_EOR, a_ERI)
        stack = weight.view(-1, *weight.shape[-2:])
        # A stand-in has the dtype of what it stands for, also under autocast.
        with torch.autocast(weight.device.type, enabled=False):
            # (E, out, in) + s * (E, out, r) (E, r, in) in one kernel and one new tensor.
            changed = torch.baddbmm(stack, left.to(weight.dtype), right.to(weight.dtype), alpha=self.scaling[name])
        return changed.view(weight.shape)

    def fold(self, dense: Dense) -> Dense:
        with torch.no_grad():
            return dense | {n: self.adapted(n, wide(dense[n])).to(dense[n].dtype) for n in self.names}

    def disk_name(self, parameter: str) -> str:
        """As `peft` nests its wrappers: the last parameter outermost."""
        factor, _, name = parameter.partition(".")
        if factor not in ("lora_A", "lora_B"):
            return super().disk_name(parameter)
        # `peft` wraps a module once for each parameter: the wrapper of the first lies inside of all others.
        return "base_layer." * (len(self.names) - 1 - self.names.index(name)) + f"{factor}.weight"

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={self.ranks[name]}, scaling={self.scaling[name]:g}" for name in self.names)


def holders(targets: Sequence[str], modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The modules that own the targeted parameters, with the names of these in the module's order.

    Raises:
        TargetError: no parameter is called so.
    """
    owners: dict[str, list[str]] = {}
    matched: set[str] = set()
    seen: set[int] = set()
    for path, module in modules.items():
        if not path or id(module) in seen:
            continue
        seen.add(id(module))
        for name, _ in module.named_parameters(recurse=False):
            hits = {target for target in targets if f".{path}.{name}".endswith(f".{target}")}
            matched |= hits
            if hits:
                owners.setdefault(path, []).append(name)
    for target in targets:
        if target not in matched:
            raise _not_found(target, modules)
    return owners


def _not_found(target: str, modules: Mapping[str, nn.Module]) -> TargetError:
    there = {
        ".".join([*path.split("."), name][-target.count(".") - 1 :])
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
        if path and parameter.ndim > 1
    }
    stacks = {name for m in modules.values() for name, p in m.named_parameters(recurse=False) if p.ndim == 3}
    hint = did_you_mean(target, there) or f"; parameters with three dimensions are {listing(stacks) or 'none'}"
    return TargetError(f"target_parameters names '{target}', which no parameter is called{hint}")


def _check(site: Site, name: str, weight: Tensor) -> None:
    called = f"'{site.name}.{name}'"
    if weight.ndim not in (2, 3):
        raise TargetError(f"{called} has {weight.ndim} dimensions; target_parameters takes those with 2 or 3")
    if name == "weight" and site.base.dequantizer(site.module) is not None:
        raise TargetError(f"{called} is quantized, and no update can be added to codes; name it in target_modules")
    if not weight.is_floating_point() or weight.itemsize < 2:
        raise TargetError(f"{called} is stored as {weight.dtype}, to which an update can't be added")
    if name == "weight" and site.kind != "other" and (site.kind != "linear" or site.base.is_transposed):
        raise TargetError(
            f"{called} is the weight of a {type(site.module).__name__}; name the module in target_modules instead"
        )
