"""Folding adapters into the weights, taking them out again to the bit, and measuring how far outputs move by it.

And how a model becomes a plain one again, the same object: with its adapters in its weights, or without them.

A module is folded alone (`fold`), its new tensors take the place of its own (`_exchange`), and the old ones are kept
for `unmerge`. What a fold means for a forward is tried on probe inputs: always for a module whose forward isn't its
kind's own (`_check_fold`), and for the whole model in a safe merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapters.adapter import adopted_modules, conflict
from slimtune.adapters.adopt import frozen_forward, release, run
from slimtune.bases import base_of
from slimtune.core.delta import Delta, Difference
from slimtune.core.frozen import Dense, call_under, deltas_of, with_tensors
from slimtune.errors import MergeError, listing
from slimtune.quantization.dequantize import expanded, make_plain, plain_dtype, untie_if_changed

MAX_RELATIVE_DRIFT = 0.1
"""A safe merge refuses when the outputs change by more than this part of their norm; bf16 rounding stays far below."""

Store = Callable[[Any, Dense], Dense]
"""Turns a module and its folded tensors into those that the module is to hold."""


def merge(
    model: Any, names: tuple[str, ...], safe: bool = False, dtype: torch.dtype | None = None, store: Store | None = None
) -> None:
    """Write adapters into the model's weights until `unmerge`, beside those that are merged already.

    All are folded anew from the frozen weights: in one sum, rounded once, and with DoRA's norms those of the base.

    Args:
        safe: compare the outputs before and after on probe inputs.
        dtype: of weights that are stored as codes; without it, what their modules compute in.
        store: what is put into a module in place of the folded tensors.

    Raises:
        MergeError: it can't be done or strays too far; nothing is changed then.
    """
    state = model.adapter_state
    already = state.merged
    names = (*already, *(name for name in dict.fromkeys(names) if name not in already))
    unmerge(model)
    try:
        _check_compatible(model, names)
        probe = probe_inputs(model) if safe else None
        with state.using(applied=names):
            # Under the adapters that are about to be merged, whichever are active.
            before = outputs(model, probe) if probe else None
        for path, module in adopted_modules(model):
            if any(name in deltas_of(module) for name in names):
                tensors = _folded_at(path, module, names, dtype, store)
                # After each module: an error in a later one finds here what to put back.
                state.replaced.append((module, _exchange(module, tensors)))
        _tie_again(state.replaced)
        state.merged = names
        if probe and before is not None:
            with state.using(applied=()):
                _check_drift(compare_outputs(before, outputs(model, probe)))
    except BaseException:
        unmerge(model)
        if already:
            merge(model, already)
        raise


def _check_compatible(model: Any, names: tuple[str, ...]) -> None:
    """See that no two of these adapters train the same thing whole. Raises: MergeError."""
    path = conflict(model, names)
    if path is not None:
        raise MergeError(
            f"the adapters {listing(names)} each train their own copy of what '{path}' has, of which a weight can hold "
            "one; merge one of them"
        )


def unmerge(model: Any) -> None:
    """Put back the very tensors that were there before `merge`."""
    state = model.adapter_state
    for module, tensors in reversed(state.replaced):
        _exchange(module, tensors)
    state.replaced, state.merged = [], ()


@torch.no_grad()
def merge_plain(model: Any, names: tuple[str, ...], safe: bool) -> Any:
    """Merge these adapters beside those that are merged, and release the model; a quantized base is expanded.

    Raises:
        MergeError: it can't be done or strays too far; nothing is changed then.
        ConfigError: the base is quantized in a way that can't be expanded.
    """
    # One dtype for the modules that an adapter changes and for those that none does.
    dtype = plain_dtype(model)
    with as_before_on_failure(model):
        if not set(names) <= set(model.adapter_state.merged):
            merge(model, names, safe, dtype)
        weights = expanded(model, dtype)
    untie_if_changed(model)
    return make_plain(released(model), weights)


@contextmanager
def as_before_on_failure(model: Any) -> Iterator[None]:
    """The adapters that are merged now merged again, and no others, should the block raise."""
    merged = model.adapter_state.merged
    try:
        yield
    except BaseException:
        unmerge(model)
        if merged:
            merge(model, merged)
        raise


def released(model: Any) -> Any:
    """The model with its classes from before it was adopted, whatever its weights are now."""
    trained_before = model.adapter_state.trained_before
    for _, module in adopted_modules(model):
        release(module)
    # That of another merge, before these adapters came.
    vars(model).pop("merge_drift", None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained_before)
    return model


def fold(module: Any, names: tuple[str, ...], dtype: torch.dtype | None = None) -> Dense:
    """The parameters of a module that these adapters change, with them written in; nothing is changed.

    They are as the module stores them, but for a weight that is stored as codes, which is in floating point.

    Args:
        dtype: of a weight that is stored as codes; without it, what the module computes in.

    Raises:
        MergeError: a change has no form as weights, or the result is not finite.
    """
    base = base_of(module)
    deltas = [deltas_of(module)[name] for name in names if name in deltas_of(module)]
    # Clones, for the model may go on training its copies after `unmerge`.
    held = {name: tensor.detach().clone() for delta in deltas for name, tensor in delta.stand_ins().items()}
    expands_to = None if base.dequantizer(module) is None else dtype or base.spec(module).dtype
    frozen = base.dense(with_tensors(module, held))  # the weight as (out, in, ...), expanded where it is codes
    if expands_to is not None:
        # All sums are formed in the wider of the codes' own dtype and the wanted one, and rounded once, at the end:
        # rounding after each adapter would lose small updates beside a large weight.
        frozen["weight"] = frozen["weight"].to(torch.promote_types(frozen["weight"].dtype, expands_to))
    dense = frozen
    for delta in deltas:
        # Beside `frozen`: what depends on the base weight (DoRA's norms) means that of the base alone, not the sum.
        dense = delta.fold_beside(dense, frozen)
    # By identity: what no adapter changed keeps its codes and its ties.
    changed = {name for name, tensor in dense.items() if tensor is not frozen[name]}
    # Each number goes to its nearest. By chance a small update would arrive on average, six times nearer after a step
    # of tuning and no nearer after ten (benchmarks/rounding.py); but under a constraint what is merged must be to the
    # bit what was trained.
    stored = held | {name: tensor for name, tensor in base.repack(module, dense).items() if name in changed}
    if expands_to is not None and "weight" in stored:
        stored["weight"] = stored["weight"].to(expands_to)
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MergeError(
                f"merging makes '{name}' of a {type(module).__name__} infinite or not a number; the adapter is damaged "
                "or its training diverged"
            )
    _check_fold(module, names, stored)
    return stored


def _folded_at(path: str, module: Any, names: tuple[str, ...], dtype: torch.dtype | None, store: Store | None) -> Dense:
    """What the module of that path is to hold; errors name the path."""
    try:
        folded = fold(module, names, dtype)
        return store(module, folded) if store else folded
    except MergeError as error:
        raise MergeError(f"'{path}': {error}" if path else str(error)) from error


def _exchange(module: nn.Module, tensors: Dense) -> Dense:
    """Put tensors into the module; gives back those that they replace."""
    before: Dense = {}
    for name, tensor in tensors.items():
        slots = _slots(module, name)
        own = slots[name]
        # A view of the own storage is no new tensor: put in as a parameter, it would break the tie that it is part of.
        if tensor is own or (slots is module._parameters and _begin_alike(tensor, own)):
            continue
        before[name] = own
        if slots is module._parameters and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=own.requires_grad)
        slots[name] = tensor
    return before


def _slots(module: nn.Module, name: str) -> dict[str, Any]:
    """Where the module keeps its parameter or buffer of this name."""
    return module._parameters if name in module._parameters else module._buffers


def _begin_alike(tensor: Tensor, own: Tensor) -> bool:
    """Whether two tensors begin at the same place of one storage: `repack` may give back a view of the module's own."""
    same = tensor.untyped_storage()._cdata == own.untyped_storage()._cdata
    return same and tensor.storage_offset() == own.storage_offset()


def _tie_again(replaced: list[tuple[nn.Module, Dense]]) -> None:
    """Make weights that were one tensor before one again where they came out equal."""
    merged: dict[int, Tensor] = {}
    for module, before in replaced:
        for name, own in before.items():
            slots = _slots(module, name)
            # Only where both came out equal: an adapter on one end of a tie makes two weights of it.
            first = merged.setdefault(id(own), slots[name])
            if first is not slots[name] and torch.equal(first, slots[name]):
                slots[name] = first


def _check_fold(module: Any, names: tuple[str, ...], folded: Dense) -> None:
    """Compare the module under these adapters with the module under the folded tensors, on a probe input.

    A subclass may compute something in which a change of the weight is no change of the output by as much, as behind
    a non-linear function. Where the forward is that of the kind itself, nothing needs to be tried.

    Raises:
        MergeError: the two differ by more than rounding.
    """
    base = base_of(module)
    deltas = [delta for name, delta in deltas_of(module).items() if name in names]
    # Other parameters in the module's own forward are what they are when merged.
    exact = (Delta.forward, Difference.forward)
    changed = any(type(delta).forward not in exact and not delta.reweighs for delta in deltas)
    # Of codes there is no probe in their own dtype, and what merges is a plain layer in their place.
    is_tried = "instance_forward" in vars(module) and base.dequantizer(module) is None
    if not changed or (base.is_textbook(module) and not is_tried):
        return
    frozen, was_training = frozen_forward(module), module.training
    module.eval()
    try:
        with torch.no_grad():
            x = _module_probe(module, base.kind)
            with module.adapter_state.using(applied=names):
                expected = run(module, frozen, x)
            merged = call_under(module, folded, frozen, x)
            error = (merged - expected).double().norm()
            change, size = (expected - frozen(module, x)).double().norm(), expected.double().norm()
    finally:
        module.train(was_training)
    # A hundredth of the change, and what rounding alone may add: some steps of the weight's dtype at the output's size.
    # Written so that an error that is not a number is refused as well.
    if not error <= 0.01 * change + 4 * torch.finfo(expected.dtype).eps * size:
        raise MergeError(
            f"{type(module).__name__} has a forward of its own, in which a merged adapter is not what it was: on a "
            f"probe it misses by {float(error / change):.0%} of the change; exclude the module or keep the adapter "
            "apart"
        )


def _module_probe(module: Any, kind: str) -> Tensor:
    """A fixed input that the module's kind takes."""
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    if kind == "embedding":
        # Ids in order: an embedding's fold is a matter of rows, and these are different ones.
        return torch.arange(min(module.num_embeddings, 64), device=weight.device)
    if kind == "conv":
        # The least extent at which a dilated kernel still gives several outputs.
        reach = [d * (k - 1) + 4 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        shape: tuple[int, ...] = (1, module.in_channels, *reach)
    else:
        shape = (4, base_of(module).features(module)[0])
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def probe_inputs(model: Any, rows: int = 2, tokens: int = 32) -> dict[str, Tensor] | None:
    """Fixed pseudo-random inputs for a transformers model, or None where it isn't known what it takes."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(config, "vocab_size", None)
    if main == "input_ids" and vocabulary:
        ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator).to(device)
        extra = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
        return {"input_ids": ids} | extra
    size = getattr(config, "image_size", None)
    if main == "pixel_values" and isinstance(size, int):
        channels = getattr(config, "num_channels", 3)
        pixels = torch.randn(rows, channels, size, size, generator=generator)
        return {"pixel_values": pixels.to(device, next(model.parameters()).dtype)}
    return None


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The model's first output (its logits, or its last hidden state), in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        return model(**inputs)[0].float()
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Drift:
    """The difference between two sets of logits, in plain numbers."""

    max_abs: float
    mean_abs: float
    relative: float
    kl: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.2e}, largest difference {self.max_abs:.3g}, mean {self.mean_abs:.3g}, "
            f"relative {self.relative:.2e}, same first choice {self.top1_agreement:.1%}"
        )


def _check_drift(drift: Drift) -> None:
    if not drift.relative <= MAX_RELATIVE_DRIFT:
        raise MergeError(
            f"the merged model's outputs differ from the unmerged by {drift.relative:.1%} of their norm, beyond "
            f"{MAX_RELATIVE_DRIFT:.0%}; the model is as before"
        )


def compare_outputs(before: torch.Tensor, after: torch.Tensor) -> Drift:
    """Compare logits (..., classes) of the same inputs: `kl` is the mean of KL(before || after) in nats.

    Raises ValueError if the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"logits of different shapes can't be compared: {before.shape} and {after.shape}")
    # In float64, because the difference of two nearly equal distributions is all rounding in float32.
    p, q = before.detach().double().cpu(), after.detach().double().cpu()
    gap = (p - q).abs()
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return Drift(
        max_abs=gap.max().item(),
        mean_abs=gap.mean().item(),
        relative=((p - q).norm() / p.norm().clamp_min(torch.finfo(torch.float64).tiny)).item(),
        # Rounding may leave a KL of equal distributions at -1e-17.
        kl=kl.clamp_min(0).item(),
        top1_agreement=(p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    )
