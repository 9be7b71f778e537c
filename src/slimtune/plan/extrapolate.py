"""Deep models are simulated at two small depths and extrapolated: each block adds as much as the one before it.

What is live at an operation is linear in the number of its block and in the number of blocks, so that each phase is
fullest in one of the first blocks, in one of the last, or outside of them; each of these snapshots is extrapolated on
its own. For blocks that repeat it is exact; where they don't, the whole model is simulated.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from slimtune.adapters.targets import resolve
from slimtune.core.config import PeftConfig
from slimtune.plan.memory import MemoryBreakdown, Phase, Snapshot, Work

Key = tuple[Phase, str, bool]
"""A phase, a module by the position of its block, and whether it is past the head."""


@dataclass(frozen=True)
class ModelCounts:
    """Sizes of a model that are counted without running it; `block_bytes` are those of its largest block."""

    depth: int
    parameters: int
    trainable: int
    trainable_bytes: int
    block_bytes: int
    trainable_block_bytes: int


@dataclass(frozen=True)
class TraceSummary:
    """The result of one simulated run: the peak of each phase and module, and totals."""

    snapshots: Mapping[Key, Snapshot]
    activations: Mapping[str, int]
    counts: ModelCounts
    paged_bytes: int
    work: Mapping[Phase, Work]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blocks:
    """How the blocks of a model repeat: so many `leading` ones of their own kind, then a pattern of `period`.

    Attributes:
        path: of the list of blocks.
    """

    path: str
    count: int
    leading: int
    period: int

    @property
    def margin(self) -> int:
        """How many blocks at either end are looked at one by one."""
        # Whole periods of at least two blocks: the first and last block are special (embedding and head beside them).
        return self.period * -(-2 // self.period)

    @property
    def first(self) -> int:
        return self.leading + self.margin

    @property
    def last(self) -> int:
        return self.margin + (self.count - self.leading) % self.period

    @property
    def depths(self) -> tuple[int, int]:
        """The two depths to simulate."""
        return self.first + self.last, self.first + self.last + self.period

    @property
    def steps(self) -> int:
        """How often what the second depth adds to the first is missing from the whole."""
        return (self.count - self.depths[0]) // self.period

    def label(self, path: str, depth: int) -> str | None:
        """A module's path with its block counted from the nearer end; None for blocks between the ends."""
        match = re.match(rf"{re.escape(self.path)}\.(\d+)", path)
        if match is None:
            return path
        number = int(match[1])
        if self.first <= number < depth - self.last:
            return None
        position = str(number) if number < self.first else str(number - depth)
        return f"{self.path}.{position}{path[match.end() :]}"

    def unlabelled(self, label: str) -> str:
        """The path in the whole model."""
        return re.sub(
            rf"^{re.escape(self.path)}\.-(\d+)", lambda match: f"{self.path}.{self.count - int(match[1])}", label
        )


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The longest list of blocks, with its path."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return max(lists, key=lambda pair: len(pair[1]), default=None)


def find_repeating_blocks(config: Any, build: Callable[[Any], Any], method: PeftConfig | None) -> Blocks | None:
    """How the blocks of a configuration repeat, or None where a short model can't stand for the whole.

    Raises:
        TargetError, ConfigError: the method doesn't go with this model.
    """
    count = getattr(config, "num_hidden_layers", None)
    by_pattern = any(getattr(method, name, None) for name in ("rank_pattern", "alpha_pattern"))
    if not isinstance(count, int) or getattr(config, "is_encoder_decoder", False) or by_pattern:
        return None
    # On `meta` a model of 400 GB takes no memory and a second; shapes and types are all that is compared.
    with torch.device("meta"):
        model = build(config)
    named = block_list(model)
    if named is None or len(named[1]) != count:
        return None
    path, modules = named
    targets = resolve(model, method) if method is not None else None
    sites = [] if targets is None else [site.name for site in (*targets.sites, *targets.whole, *targets.biases)]
    fingerprints = [_fingerprint(f"{path}.{i}", m, sites, _per_layer(config, i)) for i, m in enumerate(modules)]
    # The shortest period first: 1 for most models, 2 for alternating attention (Gemma 2), up to 8 (Jamba); up to three
    # leading blocks of another kind (DeepSeek's dense ones).
    for leading, period in ((lead, p) for p in range(1, 9) for lead in range(4)):
        blocks = Blocks(path, count, leading, period)
        repeats = all(fingerprints[i] == fingerprints[i + period] for i in range(leading, count - period))
        # Worth it only where the two short models have fewer blocks together than the whole one.
        if repeats and sum(blocks.depths) < count:
            return blocks
    return None


def _fingerprint(path: str, block: nn.Module, sites: list[str], settings: Any) -> Any:
    parameters = tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())
    kinds = tuple(type(module) for module in block.modules())
    return parameters, kinds, settings, tuple(name[len(path) :] for name in sites if name.startswith(f"{path}."))


def _per_layer(config: Any, number: int) -> tuple[Any, ...]:
    """What a configuration says of one layer in lists with an entry for each."""
    return tuple(repr(value[number]) for value in _lists(config).values())


def _lists(config: Any) -> dict[str, list[Any]]:
    values = {name: getattr(config, name, None) for name in vars(config)}
    return {k: v for k, v in values.items() if isinstance(v, list) and len(v) == config.num_hidden_layers}


def cut(config: Any, depth: int) -> Any:
    """The configuration of the same model with fewer blocks."""
    short = copy.deepcopy(config)
    for name, value in _lists(config).items():
        setattr(short, name, value[:depth])
    short.num_hidden_layers = depth
    return short


def extrapolate(small: TraceSummary, large: TraceSummary, blocks: Blocks) -> TraceSummary | None:
    """The summary of the whole model, or None where the two differ in more than their depth."""
    if small.snapshots.keys() != large.snapshots.keys() or small.activations.keys() != large.activations.keys():
        return None
    steps = blocks.steps

    # Linear in depth: f(n) = f(d0) + (f(d1) - f(d0)) / period * (n - d0), with d1 = d0 + period, in whole bytes.
    def on(before: int, after: int) -> int:
        return before + (after - before) * steps

    def parts(before: MemoryBreakdown, after: MemoryBreakdown) -> MemoryBreakdown:
        return MemoryBreakdown(**{name: on(value, after.named()[name]) for name, value in before.named().items()})

    snapshots = {
        key: replace(s, module=blocks.unlabelled(key[1]), parts=parts(small.snapshots[key].parts, s.parts))
        for key, s in large.snapshots.items()
    }
    work = {
        phase: Work(on(small.work[phase].flops, w.flops), on(small.work[phase].bytes_moved, w.bytes_moved))
        for phase, w in large.work.items()
    }
    return replace(
        large,
        snapshots=snapshots,
        activations={name: on(small.activations[name], value) for name, value in large.activations.items()},
        counts=replace(
            large.counts,
            depth=blocks.count,
            parameters=on(small.counts.parameters, large.counts.parameters),
            trainable=on(small.counts.trainable, large.counts.trainable),
            trainable_bytes=on(small.counts.trainable_bytes, large.counts.trainable_bytes),
        ),
        paged_bytes=on(small.paged_bytes, large.paged_bytes),
        work=work,
    )
