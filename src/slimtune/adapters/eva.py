"""EVA: LoRA started from, and its ranks shared out by, what the layers read (Paischer et al. 2024, arXiv:2410.07170).

The rows of A are the principal directions of a layer's inputs on the data to be tuned on. All directions of all layers
compete for the ranks: a layer gets as many as it has among those that explain the most of their layer's variance.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from slimtune.adapters.adapter import attached
from slimtune.adapters.adopt import attach_to
from slimtune.core.delta import Delta
from slimtune.core.frozen import Site
from slimtune.errors import ConfigError, did_you_mean
from slimtune.methods.lora.config import LoraConfig
from slimtune.methods.lora.eva import EvaConfig, IncrementalPCA
from slimtune.methods.lora.layers import LoraDelta, LoraLinear

Sites = dict[str, tuple[Site, LoraLinear]]


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = lambda model, batch: model(**batch),
    adapter_name: str = "default",
) -> None:
    """Start an adapter with `init_lora_weights="eva"` from data; ranks move between its linear layers.

    Of several processes the first one reads its data, and all start from what it finds.

    Args:
        dataloader: batches of the data to be tuned on; read again and again until the directions have converged.
        eva_state_dict: in its place, the directions (rank, in) by the name of the layer, found before.
        forward_fn: how the model is called with a batch.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        ConfigError: an adapter that doesn't start by EVA, or has been trained; no data, or too little; a sharded model.
    """
    model.adapter_state.check_known(adapter_name)
    config = model.peft_config[adapter_name]
    sites: Sites = {s.name: (s, d) for s, d in attached(model, adapter_name) if isinstance(d, LoraLinear)}
    _check(config, sites, adapter_name)
    if (dataloader is None) == (eva_state_dict is None):
        raise ConfigError("EVA takes its directions from a dataloader or from an eva_state_dict; give one of them")
    if dataloader is not None:
        find = functools.partial(principal_directions, model, config, sites, dataloader, forward_fn)
        eva_state_dict = _of_first_process(model, find)
    for name in eva_state_dict or {}:
        if name not in sites:
            raise ConfigError(
                f"eva_state_dict has '{name}', which the adapter doesn't train{did_you_mean(name, sites)}"
            )
    _start(model, adapter_name, config, sites, eva_state_dict or {})


def _check(config: Any, sites: Sites, adapter_name: str) -> None:
    if not isinstance(config, LoraConfig) or config.initialisation != "eva":
        raise ConfigError(f"the adapter '{adapter_name}' doesn't start by EVA; give it init_lora_weights='eva'")
    if not sites:
        raise ConfigError(f"the adapter '{adapter_name}' trains no linear layer, and EVA starts those alone")
    if any(delta.trained[1].any() for _, delta in sites.values()):
        raise ConfigError(f"the adapter '{adapter_name}' has been trained already; EVA would throw that away")


def _of_first_process(model: Any, find: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the first process finds, for all of them, which wait for it. Raises: ConfigError, in all of them."""
    processes = torch.distributed
    if not processes.is_initialized() or processes.get_world_size() == 1:
        return find()
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ConfigError("EVA runs the model in the first process alone, and it is sharded; start by EVA before that")
    outcome: list[Any] = [{}, None]  # directions, error
    if processes.get_rank() == 0:
        try:
            # On the CPU: pickled tensors come back on the device that they had, which is the first process's GPU.
            outcome[0] = {name: rows.cpu() for name, rows in find().items()}
        except ConfigError as error:
            outcome[1] = str(error)
    processes.broadcast_object_list(outcome)
    if outcome[1]:
        raise ConfigError(outcome[1])
    return outcome[0]


def principal_directions(
    model: Any, config: LoraConfig, sites: Sites, dataloader: Iterable[Any], forward_fn: Callable[[Any, Any], Any]
) -> dict[str, Tensor]:
    """The directions that each layer's A starts from, (rank, in) by its name; a rank may be zero."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        search: _Search | None = None
        while True:
            taken = search.taken if search else 0
            # Over and over: a small set of data may need several rounds until its directions stand still.
            for batch in dataloader:
                batch = _moved(batch, device)
                search = search or _Search(config, sites, _same_inputs(model, sites, batch, forward_fn))
                if search.converged:
                    return search.directions()
                mask = _counting_tokens(model, search.settings, batch)
                with _reading(sites, search.unconverged, functools.partial(search.take, mask)):
                    forward_fn(model, batch)
                search.share_out()
            if search is None or search.taken == taken:
                raise ConfigError(
                    "EVA found no batch with as many tokens that count as a layer may get ranks; use more or larger "
                    "batches, or use_label_mask=False"
                )
    finally:
        model.train(was_training)


class _Search:
    """The analyses of what the layers read.

    Attributes:
        leaders: by the name of each layer, the first layer that reads the same; the analysis is kept for that one.
        ranks: how many directions each layer would get now.
    """

    def __init__(self, config: LoraConfig, sites: Sites, leaders: dict[str, str]) -> None:
        assert isinstance(config.eva_config, EvaConfig)
        self.settings, self.leaders = config.eva_config, leaders
        own = {name: config.rank_for(name) for name in sites}
        self.budget = sum(own.values())
        self.most = {
            # No layer can have more directions than its input is wide, nor a useful B more than its output.
            name: min(round(own[name] * self.settings.rho), *site.base.features(site.module))
            for name, (site, _) in sites.items()
        }
        self.ranks = dict(self.most)
        self.analyses = {
            # q, k and v read the same activations: one analysis for three layers, with as many directions as the
            # greediest may get.
            leader: IncrementalPCA(max(self.most[name] for name in sites if leaders[name] == leader))
            for leader in leaders.values()
        }

    @property
    def taken(self) -> int:
        return sum(analysis.count for analysis in self.analyses.values())

    @property
    def unconverged(self) -> set[str]:
        """The leaders with a direction in use that the last batch turned too far."""
        analyses, tau = self.analyses, self.settings.tau
        return {
            leader for name, leader in self.leaders.items() if not analyses[leader].converged(self.ranks[name], tau)
        }

    @property
    def converged(self) -> bool:
        return not self.unconverged

    def take(self, mask: Tensor | None, leader: str, x: Tensor) -> None:
        """Take what a layer reads into its analysis, if enough of it counts."""
        x_TI = x[mask] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)
        if len(x_TI) >= self.analyses[leader].components:
            self.analyses[leader].update(x_TI)

    def share_out(self) -> None:
        """Give the budget to the directions that explain the most."""
        shares = [(name, self.analyses[leader].shares_K[: self.most[name]]) for name, leader in self.leaders.items()]
        if not all(len(shares_K) for _, shares_K in shares):
            return
        owners = [name for name, shares_K in shares for _ in shares_K]
        # Stable, so that equal shares fall to the earlier layer on every machine.
        best = torch.cat([shares_K for _, shares_K in shares]).argsort(descending=True, stable=True)[: self.budget]
        counts = Counter(owners[i] for i in best.tolist())
        self.ranks = {name: counts[name] for name in self.leaders}

    def directions(self) -> dict[str, Tensor]:
        """The first rows of each layer's A, (rank, in) by its name."""
        rows = {}
        for name, leader in self.leaders.items():
            analysis, rank = self.analyses[leader], self.ranks[name]
            by = analysis.singular_K[:rank, None].sqrt() if self.settings.whiten else 1.0
            rows[name] = analysis.directions_KI[:rank] / by
        return rows


def _start(model: Any, adapter_name: str, config: LoraConfig, sites: Sites, directions: Mapping[str, Tensor]) -> None:
    """Give each layer its rank and its A; a layer without a rank loses its delta."""
    assert isinstance(config.eva_config, EvaConfig)
    changed = {name: len(rows) for name, rows in directions.items() if len(rows) != config.rank_for(name)}
    if config.eva_config.adjust_scaling_factors:
        # Anchored: a pattern without `^` is an ending, and would mean other layers of that name too.
        alphas = {f"^{n}": config.alpha_for(n) * rank / config.rank_for(n) for n, rank in changed.items() if rank}
        config.alpha_pattern = alphas | config.alpha_pattern
    config.rank_pattern = {f"^{name}": rank for name, rank in changed.items() if rank} | config.rank_pattern
    for name, rows in directions.items():
        site, delta = sites[name]
        if name in changed and not len(rows):
            _drop(site, delta, adapter_name)
        else:
            new = _of_new_rank(config, site, delta) if name in changed else delta
            new.trained[0].copy_(rows)
            attach_to(site.module, adapter_name, new)
    if not all(len(rows) for rows in directions.values()):
        kept = [site.name for site, delta in attached(model, adapter_name) if isinstance(delta, LoraDelta)]
        config.target_modules = set(kept)


def _of_new_rank(config: LoraConfig, site: Site, old: LoraLinear) -> LoraLinear:
    new: Any = config.delta_for(site).to(old.trained[0].dtype)
    new.initialise(config, site)
    for parameter in new.parameters():
        parameter.requires_grad_(old.trained[0].requires_grad)
    if old.holds:
        new.whole = old.whole
    return new.train(old.training)


def _drop(site: Site, delta: LoraLinear, adapter_name: str) -> None:
    del site.module.deltas[adapter_name]
    if delta.holds:
        alone = Delta()
        alone.whole = delta.whole
        attach_to(site.module, adapter_name, alone)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _counting_tokens(model: Any, settings: EvaConfig, batch: Any) -> Tensor | None:
    """Which tokens of the batch count, where the batch tells."""
    if not isinstance(batch, Mapping):
        return None
    masks = [batch["attention_mask"].bool()] if isinstance(batch.get("attention_mask"), Tensor) else []
    labels, ids = batch.get("labels"), batch.get("input_ids")
    # The labels of an encoder-decoder are another text than what it reads.
    aligned = isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape
    if settings.use_label_mask and aligned and not getattr(model.config, "is_encoder_decoder", False):
        # Tokens that give no loss shall have no say in where training starts.
        masks.append(labels != settings.label_mask_value)
    return functools.reduce(torch.logical_and, masks) if masks else None


@contextmanager
def _reading(sites: Sites, names: Iterable[str], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand over what these layers read."""

    def hook(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _module, read: take(name, read[0])

    handles = [sites[name][0].module.register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same_inputs(model: Any, sites: Sites, batch: Any, forward_fn: Callable[[Any, Any], Any]) -> dict[str, str]:
    """By the name of each layer, the first one that reads the same. Raises: ConfigError, for layers left out."""
    firsts: dict[Any, str] = {}
    leaders: dict[str, str] = {}

    def note(name: str, x: Tensor) -> None:
        # By the bits: equal inputs are the same activations, and no layout of any architecture has to be known.
        bits = x.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
        leaders.setdefault(name, firsts.setdefault((x.shape, hash(bits)), name))

    with _reading(sites, sites, note):
        forward_fn(model, batch)
    for name in sites:
        if name not in leaders:
            raise ConfigError(f"EVA's data never passes through '{name}'; leave that layer out of target_modules")
    return {name: leaders[name] for name in sites}
