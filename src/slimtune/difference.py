"""Changes that are trained as the difference to a parameter, and their sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.delta import Delta, Dense, Frozen, Site, standing_in, trainable_dtype
from slimtune.errors import ConfigError, MergeError


class Difference(Delta):
    """Trained differences to parameters of the module: its own forward, with W + D standing in for W.

    D is zero at the start. The sum is formed in D's dtype and rounded to W's. A parameter that the module could have
    but hasn't, such as a bias that is None, counts as zero.

    Attributes:
        difference: D by the name of the parameter, laid out as the module stores it.
    """

    difference: nn.ParameterDict

    def __init__(self, site: Site, names: Sequence[str], autocast: bool) -> None:
        super().__init__()
        self.base = site.base
        self.difference = nn.ParameterDict()
        for name in names:
            own = site.base.floating(site.module, name)
            like = site.outline if own is None else own
            shape = (site.base.features(site.module)[1],) if own is None else own.shape
            dtype = trainable_dtype(like.dtype, autocast)
            self.difference[name] = nn.Parameter(torch.zeros(shape, device=like.device, dtype=dtype))

    @property
    def differences(self) -> dict[str, Tensor]:
        """D by the name of the parameter."""
        return dict(self.difference.items())

    def forward(self, base: Frozen, *args: Any, **kwargs: Any) -> Any:
        with standing_in(base.module, self.read_as(base.module)):
            return base(*args, **kwargs)

    def read_as(self, module: Any) -> dict[str, Tensor]:
        sums = {}
        for name, d in self.differences.items():
            own = self.base.floating(module, name)
            sums[name] = d.to(self.base.outline(module).dtype) if own is None else (own + d).to(own.dtype)
        return sums

    def fold(self, dense: Dense) -> Dense:
        """W + D. Raises: MergeError, where the module has no place for it."""
        changes = {n: self.base.turned(d) if n == "weight" else d for n, d in self.differences.items()}
        for name in changes.keys() - dense.keys():
            raise MergeError(
                f"the base's architecture has no place for a {name} here, so that none can be written into it; keep "
                "the adapter apart"
            )
        return dense | {name: (dense[name] + d).to(dense[name].dtype) for name, d in changes.items()}

    @classmethod
    def combine(
        cls, deltas: list[Any], weights: list[float], how: str, target: Any, site: Site, **options: Any
    ) -> None:
        """Set `target` to sum_i w_i D_i. Raises: ConfigError."""
        add_up(deltas, weights, how, target, **options)


@torch.no_grad()
def add_up(
    deltas: list[Any], weights: list[float], how: str, target: nn.Module, svd_clamp: float | None = None
) -> None:
    """Set the parameters of `target` to the weighted sum of the deltas'.

    A sum of full rank is its own best approximation, so that "svd" and "linear" are the same here.

    Raises:
        ConfigError: another way of combining, or deltas of other shapes.
    """
    if how not in ("linear", "svd") or svd_clamp is not None:
        raise ConfigError(
            f"these adapters are combined by their weighted sum alone; use combination_type='linear', found {how!r}"
            + ("" if svd_clamp is None else f" with svd_clamp={svd_clamp}")
        )
    for name, parameter in target.named_parameters():
        terms = [delta.get_parameter(name) for delta in deltas]
        if any(term.shape != parameter.shape for term in terms):
            raise ConfigError(f"'{name}' has other shapes in these adapters, which can't be added up")
        parameter.zero_()
        for weight, term in zip(weights, terms, strict=True):
            parameter.add_(term, alpha=weight)
