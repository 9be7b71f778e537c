"""Which modules a config means on a model. Every pattern must match something; the config stays as it was given."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from slimtune.bases import base_of
from slimtune.core.frozen import Site, holds_deltas, walk
from slimtune.core.patterns import compiled, matching, means
from slimtune.core.roles import input_embeddings
from slimtune.errors import TargetError, did_you_mean, listing

ALL_LINEAR = "all-linear"

_PLACES = {
    "linear": "linear layers",
    "bias": "modules with a bias",
    "norm": "normalisations",
    "everything": "modules with parameters",
    "output": "output layers",
}
"""The words for `Whereabouts` in an error."""
_ANYWHERE = frozenset({"model", "input", "output", "everything"})
"""Default targets that don't lie in the blocks of one part of a model."""


@dataclass(frozen=True)
class Targets:
    """What a config means on one model.

    Attributes:
        sites: where the method's formula goes.
        whole: the modules that are trained whole.
        biases: where a bias alone is trained.
        config: a copy of the config with what it left open filled in: the names of its target modules, new heads
            among `modules_to_save`, and what the method itself looked up.
    """

    sites: list[Site]
    whole: list[Site]
    biases: list[Site]
    config: Any


class Modules(dict[str, nn.Module]):
    """All modules of a base by path."""

    def __init__(self, walked: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__(walked)
        # A module that is used in two places has its first path, as in a state dict.
        self._first = {id(module): name for name, module in reversed(self.items())}

    def site(self, name: str) -> Site:
        """The module of that path as a site, under its first path."""
        module = self[name]
        return Site(self._first[id(module)], module, base_of(module))


def resolve(model: nn.Module, config: Any, strict: bool = True) -> Targets:
    """The sites of a config on a model; neither of the two is changed.

    Args:
        strict: every name and pattern must match; off for a config that was read from a file, whose tensors are
            matched one by one anyway.

    Raises:
        TargetError: nothing matches, with what there is and the nearest name.
    """
    # Shallow: fields are replaced below, never changed in place.
    config = copy.copy(config)
    modules = Modules(walk(model))
    # A new head is drawn at each load, so that a difference from it would mean nothing: it is kept whole.
    heads = [] if "output" in config.default_targets else _heads(model)
    keep = [name for name in heads if strict and name not in (config.modules_to_save or [])]
    if keep:
        config.modules_to_save = [*(config.modules_to_save or []), *keep]
    whole = _whole(modules, config.modules_to_save or [], strict)
    # What is trained whole takes no delta of the method: both would change the same weight.
    taken = {id(site.module) for site in whole}
    wanted = [name for name in _wanted(model, modules, config, strict) if id(modules[name]) not in taken]
    further = config.further_modules(model, modules, wanted)
    for name in further:
        if id(modules[name]) in taken:
            raise TargetError(
                f"'{name}' is in modules_to_save, which trains it whole; it can't be changed in part besides"
            )
    chosen = list({id(modules[name]): modules.site(name) for name in wanted}.values())
    sites = list({id(modules[name]): modules.site(name) for name in [*wanted, *further]}.values())
    if not sites:
        raise TargetError(
            f"target_modules {_targets(config)!r} leaves nothing to train; "
            f"the model has {listing(_last(name) for name in modules if name)}"
        )
    if strict:
        _check_patterns(config, sites)
    everything = "everything" in config.default_targets and config.target_modules is None
    if hasattr(config, "target_modules") and config.target_modules in (None, ALL_LINEAR) and not everything:
        modules_chosen = {id(site.module) for site in chosen}
        others = {name for name, module in modules.items() if id(module) not in modules_chosen}
        config.target_modules = _suffixes([site.name for site in chosen], others)
    return Targets(sites, whole, _bias_sites(modules, config, taken, {id(site.module) for site in sites}), config)


def _wanted(model: nn.Module, modules: Modules, config: Any, strict: bool) -> list[str]:
    targets, exclude = _targets(config), getattr(config, "exclude_modules", None)
    layers, pattern = getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None)
    # `classifier` in modules_to_save means `classifier.dense` as well, and no other module that only begins so.
    inside_saved = [re.compile(rf"(^|.*\.){re.escape(m)}($|\..*)") for m in config.modules_to_save or []]
    names = [name for name in modules if name and not any(p.match(name) for p in inside_saved)]
    if targets is None or targets == ALL_LINEAR:
        places = ("linear",) if targets else config.default_targets
        matched = _by_place(model, modules, names, places, blocks_only=targets is None)
        text_model = text_model_of(model)
        if targets is None and text_model and not _ANYWHERE.intersection(places):
            matched = [name for name in matched if name.startswith(f"{text_model}.")]
        if not matched:
            available = listing(_last_names(names)) or "numbers alone"
            raise TargetError(
                f"{config.peft_type} attaches to {listing(_PLACES.get(place, place) for place in places)}, of which "
                f"nothing is found in this model; {config.way_out}; there are {available}"
            )
        matched = _in_layers(matched, layers, pattern)
    elif isinstance(targets, str):
        matched = matching(targets, names)
        if not matched:
            raise TargetError(
                f"the expression {targets!r} matches no module path; paths look like "
                f"'{_example(modules)}'{did_you_mean(_last(targets), _last_names(names))}"
            )
    else:
        whole = "everything" in config.default_targets
        hits = _by_names(names, targets, strict, modules.keys() - set(names), whole)
        matched = _in_layers(hits, layers, pattern)
    inside = "everything" in config.default_targets
    if inside:
        matched = _inside(modules, matched)
    if exclude:
        excluded = _excluded(names, exclude, strict)
        excluded |= set(_inside(modules, excluded)) if inside else set()
        matched = [name for name in matched if name not in excluded]
    for name in matched:
        _check_called(modules, name)
    return matched


def _by_names(
    names: list[str], targets: Iterable[str], strict: bool, saved: Set[str] = frozenset(), takes_blocks: bool = False
) -> list[str]:
    matched: dict[str, None] = {}
    # Sorted: peft stores a set, and the first mistake that is reported shouldn't change from run to run.
    for target in sorted(targets):
        # By whole parts of the path, as peft does: "proj" doesn't mean "q_proj".
        hits = [name for name in names if name == target or name.endswith(f".{target}")]
        if strict and not hits and any(name == target or name.endswith(f".{target}") for name in saved):
            raise TargetError(
                f"'{target}' is in target_modules and in modules_to_save, which trains it whole; leave it out of one"
            )
        if strict and not hits:
            raise TargetError(
                f"target_modules names '{target}', which no module is called{_near_target(target, names, takes_blocks)}"
            )
        matched.update(dict.fromkeys(hits))
    return [name for name in names if name in matched]


def _inside(modules: Modules, chosen: Iterable[str]) -> list[str]:
    """The modules with parameters that are chosen or lie inside a chosen one."""
    chosen = set(chosen)
    return [
        name for name in modules if not chosen.isdisjoint(_beginnings(name)) and _is_there(modules, name, "everything")
    ]


def _excluded(names: list[str], exclude: Any, strict: bool) -> set[str]:
    hits = set(matching(exclude, names) if isinstance(exclude, str) else _by_names(names, exclude, strict=False))
    if strict and not hits:
        raise TargetError(f"exclude_modules {exclude!r} matches no module; there are {listing(_last_names(names))}")
    return hits


def _in_layers(names: list[str], layers: Any, pattern: Any) -> list[str]:
    if layers is None or layers == []:
        return names
    wanted = {layers} if isinstance(layers, int) else set(layers)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])
    # Lazy, so that the first number counts: `blocks.3.experts.7.w1` is in layer 3.
    searches = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    numbers = {name: _first_match(searches, name) for name in names}
    missing = wanted - set(numbers.values())
    if missing:
        there = listing(str(i) for i in sorted({i for i in numbers.values() if i is not None}))
        raise TargetError(
            f"layers_to_transform names layer {min(missing)}, which the model hasn't; there are "
            f"{there or 'no numbered layers, see layers_pattern'}"
        )
    return [name for name in names if numbers[name] in wanted]


def _first_match(searches: list[str], name: str) -> int | None:
    matches = (compiled(search).match(name) for search in searches)
    return next((int(match["idx"]) for match in matches if match), None)


def _targets(config: Any) -> Any:
    return getattr(config, "target_modules", None)


def _by_place(
    model: nn.Module, modules: Modules, names: list[str], places: tuple[str, ...], blocks_only: bool
) -> list[str]:
    """The modules that a method's `default_targets` mean."""
    matched: set[str] = set()
    for place in places:
        if place == "model":
            matched.add("")
        elif place == "linear":
            matched.update(_linear_layers(model, modules, names, blocks_only))
        elif place == "output":
            matched.update(_outputs(model, modules, names))
        elif place == "input":
            matched.update(name for name in names if modules[name] is input_embeddings(model))
        elif place == "everything":
            matched.update(name for name in ["", *names] if _is_there(modules, name, place))
        else:
            matched.update(name for name in names if _is_there(modules, name, place))
    return [name for name in ["", *names] if name in matched]


def _is_there(modules: Modules, name: str, place: str) -> bool:
    """Whether a module is what one of `default_targets` means."""
    site = modules.site(name)
    own = dict(site.module.named_parameters(recurse=False))
    if place == "everything":
        return bool(own)
    if place == "bias":
        return "bias" in own
    if place == "norm":
        # By name, as every architecture has its own class (LlamaRMSNorm, ...), with (features,) to scale.
        return type(site.module).__name__.endswith("Norm") and "weight" in own and own["weight"].ndim == 1
    return site.role == place and site.kind == "linear" and not _is_bypassed(modules, name)


def _outputs(model: nn.Module, modules: Modules, names: list[str]) -> list[str]:
    """The parts of new heads, and the output layer."""
    heads, layer = _heads(model), _output_layer(model)
    return [
        name
        for name in names
        if modules[name] is layer
        or (name.split(".")[0] in heads and next(modules[name].parameters(recurse=False), None) is not None)
    ]


def _linear_layers(model: nn.Module, modules: Modules, names: list[str], blocks_only: bool) -> list[str]:
    """All linear layers but the output layer; those in repeated blocks alone, if there are such blocks."""
    head = _output_layer(model)
    linear = [
        name
        for name in names
        if base_of(modules[name]).kind == "linear" and modules[name] is not head and not _is_bypassed(modules, name)
    ]
    lists = [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    # Heads and projectors outside of the repeated blocks are few and odd; the defaults leave them alone.
    in_blocks = [name for name in linear if any(name.startswith(prefix) for prefix in lists)]
    return in_blocks if blocks_only and in_blocks else linear


def text_model_of(model: Any) -> str | None:
    """The path of the text model in one that reads images or sound besides; None for any other model.

    Training on text gives no gradient to the rest of it.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return None
    if config.get_text_config() is config:
        return None
    decoder = model.get_decoder()
    path = next((name for name, module in walk(model) if module is decoder and name), None)
    # Not of a model as CLIP, whose two halves are trained against each other.
    return path if path and (model.can_generate() or _last(path) == "language_model") else None


def _is_bypassed(modules: Modules, name: str) -> bool:
    return bool(name) and isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def _check_called(modules: Modules, name: str) -> None:
    if isinstance(modules[name], nn.ParameterList | nn.ParameterDict | nn.RNNBase):
        raise TargetError(
            f"'{name}' is a {type(modules[name]).__name__}, whose parameters are read without a call that an adapter "
            "could stand around; exclude it with exclude_modules"
        )
    if _is_bypassed(modules, name):
        raise TargetError(
            f"'{name}' belongs to a torch.nn.MultiheadAttention, which reads its weight and never calls "
            "it, so that a change around it would have no effect; exclude it with exclude_modules"
        )


def _output_layer(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter else None


def _heads(model: Any) -> list[str]:
    """Children of the root outside its backbone that have parameters: classifiers, which start untrained."""
    # An empty prefix gives the attribute "", which no module has.
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    head = _output_layer(model)
    if not isinstance(backbone, nn.Module) or backbone is model:
        return []
    return [
        name
        for name, child in model.named_children()
        if child is not backbone
        and not holds_deltas(model, name)
        and any(True for _ in child.parameters())
        and not any(module is head for module in child.modules())
    ]


def _whole(modules: Modules, names: list[str], strict: bool) -> list[Site]:
    sites: dict[int, Site] = {}
    for wanted in names:
        roots = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if strict and not roots:
            raise TargetError(
                f"modules_to_save names '{wanted}', which no module is called"
                f"{did_you_mean(wanted, _last_names(modules))}"
            )
        for root in roots:
            for name, module in walk(modules[root], root):
                if next(module.parameters(recurse=False), None) is not None:
                    sites[id(module)] = modules.site(name)
    return list(sites.values())


def _bias_sites(modules: Modules, config: Any, taken: set[int], chosen: set[int]) -> list[Site]:
    """Where `bias="all"` trains a bias: everywhere that one is.

    Raises:
        TargetError: one of torch's attention, which reads it without a call.
    """
    if getattr(config, "bias", "none") != "all":
        return []
    # With such an attention as a target it is for the method to say whether it takes biases.
    decides = any(isinstance(module, nn.MultiheadAttention) and id(module) in chosen for module in modules.values())
    for name, module in () if decides else modules.items():
        is_alone = _is_bypassed(modules, name) and id(module) not in taken
        if is_alone and getattr(module, "bias", None) is not None:
            raise TargetError(
                f"bias='all' would train the bias of '{name}' without effect: it belongs to a "
                "torch.nn.MultiheadAttention, which reads it and never calls the module; choose bias='none', or the "
                "one that trains the biases of the targets alone"
            )
    own = {
        id(module): modules.site(name)
        for name, module in modules.items()
        if name and isinstance(getattr(module, "bias", None), nn.Parameter) and id(module) not in taken
    }
    return list(own.values())


def _check_patterns(config: Any, sites: list[Site]) -> None:
    names = [site.name for site in sites]
    if getattr(config, "target_parameters", None):
        names += [f"{site.name}.{name}" for site in sites for name, _ in site.module.named_parameters(recurse=False)]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or {}:
            if not any(means(pattern, name) for name in names):
                raise TargetError(
                    f"{field} names {pattern!r}, which none of the targets is called"
                    f"{did_you_mean(pattern, _last_names(names)) or '; they are ' + listing(_last_names(names))}"
                )


def _suffixes(names: list[str], others: set[str]) -> set[str]:
    """The shortest endings that mean these modules and no others."""
    # A set of every ending of every other path: large, and yet quicker than comparing each pair of paths.
    other_endings = {ending for other in others for ending in _endings(other)}
    return {next((e for e in _endings(name) if e not in other_endings), name) for name in names}


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _near_target(target: str, names: Sequence[str], takes_blocks: bool) -> str:
    """What else could be meant, as the end of a sentence; few methods take a block, which has no weight of its own."""
    blocks = set() if takes_blocks else {name.rpartition(".")[0] for name in names}
    leaves = _last_names(name for name in names if name not in blocks)
    return did_you_mean(target, leaves) or f"; there are {listing(leaves)}"


def _last_names(names: Iterable[str]) -> set[str]:
    return {_last(name) for name in names if name and not _last(name).isdigit()}


def _example(modules: Modules) -> str:
    return max((n for n in modules if base_of(modules[n]).kind == "linear"), key=len, default="layers.0.linear")
