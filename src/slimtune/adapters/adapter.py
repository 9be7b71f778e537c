"""One adapter on one model: drafted, filled from stored tensors or combined from others, attached, read out again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from slimtune.adapters.adopt import Adopted, adopt, attach_to
from slimtune.adapters.constrain import constrained
from slimtune.adapters.embeddings import base_copies, saved_whole
from slimtune.adapters.stored_keys import on_model
from slimtune.adapters.targets import resolve, walk
from slimtune.bases import base_of, claim
from slimtune.bases.foreign import ForeignLinear
from slimtune.core.config import PeftConfig
from slimtune.core.constrained import Constrained
from slimtune.core.delta import Delta
from slimtune.core.frozen import Site, deltas_of, without_wrappers
from slimtune.errors import (
    AdapterExistsError,
    BaseMismatchError,
    ConfigError,
    SlimtuneError,
    TargetError,
    did_you_mean,
    first_line,
    listing,
    warn,
)
from slimtune.storage.peft_format import check_adapter_name, key
from slimtune.storage.source import name_here

_ALWAYS_TAKEN = 1024
"""Tensors as long as this take no memory to speak of."""

Placed = list[tuple[Site, Delta]]
"""The deltas of one adapter with their sites."""


class Draft(NamedTuple):
    """An adapter that isn't attached yet, with a copy of its config that says what it means on this model."""

    config: Any
    placed: Placed


def draft(
    model: Any, name: str, config: PeftConfig, autocast_adapter_dtype: bool, strict: bool, replaces: bool = False
) -> Draft:
    """All deltas of a new adapter, none attached yet: an error leaves the model and the config as they were.

    Modules that another library quantized become ours first, on the same storage.

    Args:
        strict: every pattern of the config must match; off for a config that was read from a file.
        replaces: an adapter of that name may be there; it is to give way.

    Raises:
        TargetError, ConfigError, AdapterExistsError: as `get_peft_model`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"an adapter attaches to a torch.nn.Module, found a {type(model).__name__}")
    check_adapter_name(name)
    if name in getattr(model, "peft_config", {}) and not replaces:
        raise AdapterExistsError(
            f"the model already has an adapter '{name}'; choose another name or delete it with delete_adapter"
        )
    # Before anything is resolved: the kinds of bases, and with them what "linear" means, follow from the classes.
    claim(model)
    targets = resolve(model, config, strict)
    resolved = targets.config
    # By identity: a module that stands at two paths gets one delta, as it has one weight.
    deltas = {id(site.module): (site, resolved.delta_for(site, autocast_adapter_dtype)) for site in targets.sites}
    for site in targets.whole:
        deltas[id(site.module)] = (site, Delta())
        deltas[id(site.module)][1].hold_all(site)
    # `setdefault`: where the method has a delta already, its bias is held in that one and not in a second.
    for site in targets.biases:
        deltas.setdefault(id(site.module), (site, Delta()))[1].hold(site, "bias")
    placed = list(deltas.values())
    # All at once and before any is attached: what is tied must be known whole, and an error must leave nothing behind.
    resolved.link_deltas(model, placed)
    placed = constrained(model, resolved, placed)
    if not resolved.inference_mode:
        _check_gradients(model, placed)
    return Draft(resolved, placed)


def _check_gradients(model: nn.Module, placed: Placed) -> None:
    """See that gradients come through the modules from the first delta on. Raises: TargetError."""
    sites = {id(site.module) for site, _ in placed}
    # Below the first delta nothing learns, so that a layer that swallows gradients there does no harm.
    for path, module in itertools.dropwhile(lambda named: id(named[1]) not in sites, walk(model)):
        base = base_of(module)
        if isinstance(base, ForeignLinear) and base.loses_gradient(module):
            raise TargetError(
                f"gradients don't come through '{path}', a {type(module).__name__}, so that nothing below it would "
                "learn; load the base in 16 bits or quantized by bitsandbytes"
            )


def draft_stored(
    model: Any,
    name: str,
    config: Any,
    tensors: Mapping[str, Tensor],
    source: str | Path,
    autocast: bool,
    ignore_mismatched_sizes: bool = False,
) -> Draft:
    """All deltas of an adapter that was stored, with its tensors in them, none attached yet.

    Raises:
        BaseMismatchError: the tensors were made for another base, or the config asks for far larger ones.
        TargetError, ConfigError, AdapterExistsError: as `draft`.
    """
    # A file's config may ask for r = 10^9: the memory is taken before any shape is compared, and that would end the
    # process.
    longest = max([_ALWAYS_TAKEN, *(side for tensor in tensors.values() for side in tensor.shape)])
    for field in config.sizes:
        size = getattr(config, field, None)
        if size is not None and not (isinstance(size, int) and size <= longest):
            raise BaseMismatchError(f"'{source}' says {field}={size!r}, and no tensor in it is so long; restore it")
    try:
        drafted = draft(model, name, config, autocast, strict=False, replaces=True)
    except SlimtuneError:
        raise
    except RuntimeError as error:
        raise BaseMismatchError(f"'{source}' asks for tensors that can't be had: {first_line(error)}") from error
    fill(model, drafted.config, drafted.placed, tensors, source, ignore_mismatched_sizes=ignore_mismatched_sizes)
    return drafted


def draft_combined(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    how: str,
    svd_rank: int | None,
    options: Mapping[str, Any],
) -> Draft:
    """The adapter sum_i w_i adapter_i, not attached yet.

    Raises:
        ConfigError: adapters that can't be combined so.
        AdapterExistsError: the name is taken.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ConfigError(f"each adapter needs a weight, found {len(adapters)} adapters and {len(weights)} weights")
    configs = [model.peft_config[adapter] for adapter in adapters]
    if any(type(config) is not type(configs[0]) for config in configs):
        methods = listing(str(config.peft_type) for config in configs)
        raise ConfigError(f"only adapters of one method can be combined, found {methods}")
    known = ("svd_clamp", "svd_full_matrices", "svd_driver", "density", "majority_sign_method")
    for unknown in options.keys() - set(known):
        raise ConfigError(f"add_weighted_adapter takes no argument {unknown!r}{did_you_mean(unknown, known)}")
    # Of one adapter there is nothing to join.
    how, options = ("linear", {}) if len(adapters) == 1 else (how, options)
    config = configs[0].combined(configs[1:], how, svd_rank)
    sources: dict[int, list[tuple[Any, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for site, delta in attached(model, adapter):
            sources.setdefault(id(site.module), []).append((delta, weight))
    if any(delta.holds for group in sources.values() for delta, _ in group):
        raise ConfigError(
            "adapters that train whole modules or biases can't be combined; leave out modules_to_save and bias"
        )
    resolved, placed = draft(model, name, config, True, strict=False)
    # Joined expressions may match more than the parts did together.
    placed = [(site, target) for site, target in placed if id(site.module) in sources]
    for site, target in placed:
        deltas, factors = zip(*sources[id(site.module)], strict=True)
        type(deltas[0]).combine(list(deltas), list(factors), how, target, site, **options)
    return Draft(resolved, placed)


def leave_unset(placed: Placed) -> None:
    """Take the parameters' memory away, to be given back by `fill`; those that deltas share stay shared."""
    _replace_parameters(placed, lambda site, parameter: parameter.to("meta"))


@contextmanager
def _given_memory(placed: Placed) -> Iterator[None]:
    """Zeros for parameters without values, which are without again where an error keeps them from being filled."""
    unset = [(site, delta) for site, delta in placed if any(parameter.is_meta for parameter in delta.parameters())]
    _replace_parameters(unset, lambda site, parameter: torch.zeros_like(parameter, device=site.spec.device))
    try:
        yield
    except BaseException:
        leave_unset(unset)
        raise


def _replace_parameters(placed: Placed, change: Callable[[Site, nn.Parameter], Tensor]) -> None:
    # One new parameter for each old one: deltas that share a parameter share it afterwards as well.
    changed: dict[nn.Parameter, nn.Parameter] = {}
    for site, delta in placed:
        # Copies of the base's own have their values.
        for module in (module for module in delta.modules() if module is not getattr(delta, "whole", None)):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter not in changed:
                    changed[parameter] = nn.Parameter(change(site, parameter), parameter.requires_grad)
                if parameter is not None:
                    module._parameters[name] = changed[parameter]


def attach(model: Any, name: str, placed: Placed) -> None:
    """Put the deltas at their sites, not active yet."""
    for site, delta in placed:
        # Frozen until it is active: else an optimizer that is built now would take parameters that no forward runs
        # through.
        delta.train(site.module.training).requires_grad_(False)
        attach_to(adopt(site.module, model.adapter_state), name, delta)


def adopted_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """All adopted modules by their first path."""
    seen: dict[int, tuple[str, Any]] = {}
    for name, module in walk(model):
        if isinstance(module, Adopted):
            seen.setdefault(id(module), (name, module))
    return list(seen.values())


def conflict(model: Any, names: Sequence[str]) -> str | None:
    """The path of the first module that two of these adapters can't both change, or None."""
    for path, module in adopted_modules(model):
        together = [delta for name, delta in deltas_of(module).items() if name in names]
        if any(one.excludes(other) or other.excludes(one) for one, other in itertools.combinations(together, 2)):
            return path
    return None


def detach(model: Any, name: str) -> None:
    """Take an adapter's deltas off the modules."""
    for _, module in adopted_modules(model):
        if name in deltas_of(module):
            del module.deltas[name]


def attached(model: Any, name: str) -> Placed:
    """The deltas of an adapter that the model has."""
    return [
        (Site(path, module, module.adopted_base), deltas_of(module)[name])
        for path, module in adopted_modules(model)
        if name in deltas_of(module)
    ]


def fill(
    model: Any,
    config: Any,
    placed: Placed,
    tensors: Mapping[str, Tensor],
    source: str | Path,
    partial: bool = False,
    ignore_mismatched_sizes: bool = False,
) -> _IncompatibleKeys:
    """Copy stored tensors into an adapter's deltas, each into its own; gives back the missing and the unexpected keys.

    The tensors come by the keys that they have on this model, see `on_model`.

    Args:
        partial: take what there is, and warn of tensors that are missing or left over.
        ignore_mismatched_sizes: leave tensors of another shape alone, and warn of them.

    Raises:
        BaseMismatchError: nothing matches; or, unless it is wanted so, a tensor is missing, left over or of another
            shape; nothing is copied then.
        ConfigError: what is stored serves inference alone.
    """
    is_unset = any(parameter.is_meta for _, delta in placed for parameter in delta.parameters())
    with _given_memory(placed):
        # What has no values yet can't stay as it is.
        return _fill(model, config, placed, tensors, source, partial and not is_unset, ignore_mismatched_sizes)


def _fill(
    model: Any, config: Any, placed: Placed, tensors: Mapping[str, Tensor], source: str | Path, partial: bool,
    ignore_mismatched_sizes: bool,
) -> _IncompatibleKeys:  # fmt: skip
    tensors = config.read(tensors, placed, source)
    # From what the deltas hold now: it gives each stored name with the shape that it must have.
    disk_names = [(site, delta, delta.to_disk(delta.state_dict())) for site, delta in placed]
    own = {key(site.name, name): tensor for site, _, names in disk_names for name, tensor in names.items()}
    missing, strange = own.keys() - tensors.keys(), _strangers(model, placed, tensors, {*own})
    matching = own.keys() & tensors.keys()
    if (missing or strange) and not (partial and matching):
        lacks = f"it lacks {listing(missing, 3)}" if missing else ""
        holds = f"it holds {listing(strange, 3)} besides" if strange else ""
        what = " and ".join(filter(None, [lacks, holds]))
        raise BaseMismatchError(
            f"'{source}' was made for another base or other targets{_two_bases(config, model)}: {what}; "
            f"{len(matching)} of {len(own)} tensors match"
        )
    sites = {key(site.name, name): site for site, _, names in disk_names for name in names}
    mismatched = {name for name in matching if own[name].shape != tensors[name].shape}
    bases = _two_bases(config, model)
    for name in (name for name in own if name in matching):
        _check_fits(sites[name], name, own[name], tensors[name], source, bases, ignore_mismatched_sizes)
    for names, what in ((missing, "lacks"), (strange, "holds besides"), (mismatched, "has in another shape")):
        if names:
            warn(f"'{source}' {what} {listing(names, 3)}, which stay as they are")
    # Everything that can be refused has been by here: from now on tensors are written into a live adapter.
    taken = {name: tensors[name] for name in matching - mismatched}
    for site, delta in placed:
        if isinstance(delta, Constrained):
            delta.check_base(site, taken)
    with torch.no_grad():
        for site, delta, names in disk_names:
            # A delta reads all of its names or none (`from_disk` may take factors apart), so that what the file lacks
            # is filled up with what is there.
            whole = {name: taken.get(key(site.name, name), tensor) for name, tensor in names.items()}
            inside = delta.from_disk(whole)
            for name, tensor in delta.state_dict().items():
                # In place: optimizers, compiled code and tied deltas all hold on to the very parameters.
                tensor.copy_(inside[name])
    return _IncompatibleKeys(sorted(missing), sorted(strange))


def _two_bases(config: Any, model: Any) -> str:
    """The base that an adapter names and the one at hand, in parentheses; empty where they are one or unknown."""
    named, here = name_here(config.base_model_name_or_path or ""), getattr(model, "name_or_path", None)
    return f" (it names {named}, and this model is {here})" if named and here and named != here else ""


def _check_fits(
    site: Site, name: str, own: Tensor, stored: Tensor, source: str | Path, bases: str, any_shape: bool
) -> None:
    """See that a stored tensor is of the kind and shape of the delta's own. Raises: BaseMismatchError."""
    if stored.is_complex() or stored.is_floating_point() != own.is_floating_point():
        raise BaseMismatchError(
            f"'{name}' in '{source}' is of {stored.dtype}, where {own.dtype} is trained; save the adapter again from "
            "the trained model"
        )
    if own.shape != stored.shape and not any_shape:
        raise BaseMismatchError(
            f"'{source}' was made for another base{bases}: '{name}' is {tuple(stored.shape)} in the file and "
            f"{tuple(own.shape)} on this model{_way_to_mend(site, own, stored)}"
        )


def _way_to_mend(site: Site, own: Tensor, stored: Tensor) -> str:
    """What to do where the base had another number of tokens or labels when the adapter was made."""
    differing = [pair for pair in zip(own.shape, stored.shape, strict=False) if len(set(pair)) > 1]
    rows = site.base.features(site.module)[0 if site.kind == "embedding" else 1]
    # One side differs, and it is the side of the module's rows: then it is the vocabulary or the number of labels.
    if own.ndim != stored.ndim or len(differing) != 1 or differing[0][0] != rows:
        return ""
    resize = f"call model.resize_token_embeddings({differing[0][1]}) before loading"
    if site.kind == "embedding":
        return f"; the base had other tokens then: {resize}"
    return f"; if that is the output layer, {resize}, or load the base with as many labels"


def _strangers(model: Any, placed: Placed, tensors: Mapping[str, Tensor], own: set[str]) -> set[str]:
    """Stored tensors that no delta takes; copies of the base's own embeddings are none."""
    bases = base_copies(model, placed)
    return {name for name in tensors.keys() - own if name not in bases or not _is_copy(tensors[name], bases[name])}


def _is_copy(stored: Tensor, own: Tensor) -> bool:
    # In the file's dtype: what was stored of a 32-bit base in 16 bits is still a copy of it.
    return stored.shape == own.shape and torch.equal(own.to(stored.device, stored.dtype), stored)


def adapter_tensors(model: Any, name: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of one adapter by their names on disk, gathered where they are sharded.

    Args:
        state_dict: the model's tensors by name, where its own are not at hand.
    """
    tensors: dict[str, Tensor] = {}
    given = {without_wrappers(path): tensor for path, tensor in (state_dict or {}).items()}
    for site, delta in attached(model, name):
        # FSDP and DeepSpeed hand the gathered tensors over as a state dict of the whole model.
        prefix = f"{site.name}.deltas.{name}." if site.name else f"deltas.{name}."
        own = {inside: gathered(given.get(prefix + inside, tensor)) for inside, tensor in delta.state_dict().items()}
        tensors |= {key(site.name, stored): tensor for stored, tensor in delta.to_disk(own).items()}
    return tensors


def base_tensors(model: Any) -> dict[str, Tensor]:
    """The base's own tensors by their names without adapters, from before a merge where one is on."""
    # While merged, the module's own weight holds the sum; what the base has lies here.
    before = {id(module): tensors for module, tensors in model.adapter_state.replaced}
    tensors: dict[str, Tensor] = {}
    for path, module in walk(model):
        own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        own |= {
            n: t for n, t in module._buffers.items() if t is not None and n not in module._non_persistent_buffers_set
        }
        own |= before.get(id(module), {})
        tensors |= {f"{path}.{name}" if path else name: tensor.detach() for name, tensor in own.items()}
    return tensors


def gathered(tensor: Any) -> Tensor:
    """The whole of a tensor that may be sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter by their names on disk.

    Args:
        unwrap_compiled: of `peft`; what torch.compile wrapped has its plain names here, whether asked for or not.
        save_embedding_layers: whether the base's token embeddings are among them: True, False, or "auto" for those
            that were resized after the base was loaded.

    Raises:
        AdapterNotFoundError, ConfigError.
    """
    model.adapter_state.check_known(adapter_name)
    whole = saved_whole(model, attached(model, adapter_name), save_embedding_layers)
    return adapter_tensors(model, adapter_name, state_dict) | whole


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Copy tensors, by their names on disk, into an adapter; gives back the missing and the unexpected keys.

    Tensors that are missing stay as they are, which is warned of, as is what is left over.

    Args:
        ignore_mismatched_sizes: leave tensors of another shape alone, and warn of them.
        low_cpu_mem_usage: taken as in `peft`; tensors are copied one by one, and an adapter that was left without
            values by `get_peft_model(low_cpu_mem_usage=True)` gets its memory here.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        BaseMismatchError: no tensor is of this adapter, or one has another shape.
    """
    model.adapter_state.check_known(adapter_name)
    placed, config = attached(model, adapter_name), model.peft_config[adapter_name]
    tensors, source = on_model(model, peft_model_state_dict), "the state dict"
    return fill(model, config, placed, tensors, source, True, ignore_mismatched_sizes)
