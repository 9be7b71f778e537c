"""A weighted combination of adapters as a new adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimtune.adapter import Draft, attached, draft
from slimtune.errors import ConfigError, listing


def combined(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    how: str,
    svd_rank: int | None,
    svd_clamp: float | None,
) -> tuple[Any, Draft]:
    """The config and the deltas of sum_i w_i adapter_i, not attached yet.

    Raises:
        ConfigError: adapters that can't be combined so.
        AdapterExistsError: the name is taken.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ConfigError(f"each adapter needs a weight, found {len(adapters)} adapters and {len(weights)} weights")
    how = "linear" if len(adapters) == 1 else how
    config = _config([model.peft_config[adapter] for adapter in adapters], how, svd_rank)
    sources: dict[int, list[tuple[Any, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for site, delta in attached(model, adapter):
            sources.setdefault(id(site.module), []).append((delta, weight))
    if any(delta.holds for group in sources.values() for delta, _ in group):
        raise ConfigError(
            "adapters that train whole modules or biases can't be combined; leave out modules_to_save and bias"
        )
    drafted = [(s, d) for s, d in draft(model, name, config, True, strict=False) if id(s.module) in sources]
    options = {"svd_clamp": svd_clamp} if how == "svd" else {}
    for site, target in drafted:
        deltas, factors = zip(*sources[id(site.module)], strict=True)
        type(deltas[0]).combine(list(deltas), list(factors), how, target, site, **options)
    return config, drafted


def _config(configs: Sequence[Any], how: str, svd_rank: int | None) -> Any:
    if any(type(config) is not type(configs[0]) for config in configs):
        found = listing(str(config.peft_type) for config in configs)
        raise ConfigError(f"only adapters of one method can be combined, found {found}")
    return configs[0].combined(configs[1:], how, svd_rank)
