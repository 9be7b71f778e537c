"""The matrices that tuning changed: each one's weight before and after, read one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.adapters.adapter import adopted_modules
from slimtune.bases import base_of
from slimtune.core.frozen import Dense, deltas_of, with_tensors
from slimtune.core.roles import input_embeddings
from slimtune.errors import BaseMismatchError, ConfigError, MergeError, did_you_mean, listing
from slimtune.methods.lora.layers import LoraDelta


@dataclass(frozen=True)
class Update:
    """W and W' of one matrix, (out, in) in float32; those of a quantized base are what its codes stand for.

    Attributes:
        factors: (s B, A) of a LoRA, whose product is W' - W; None where the change has no such form.
    """

    before: Tensor
    after: Tensor
    factors: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class TunedMatrix:
    """Where a matrix is, and how to read it.

    Attributes:
        module: the path of its module.
        parameter: its name there.
        expert: which one of a stack of matrices it is.
    """

    module: str
    parameter: str
    expert: int | None
    read: Callable[[], Update]

    @property
    def name(self) -> str:
        """The path of the module, with the parameter where that isn't its weight."""
        path = self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"
        return path if self.expert is None else f"{path}[{self.expert}]"

    @property
    def layer(self) -> int | None:
        """The number of the block that it is in."""
        block = re.search(r"\.(\d+)\.", f".{self.module}.")
        return int(block[1]) if block else None

    @property
    def kind(self) -> str:
        """What it is called in its block, such as q_proj."""
        words = [word for word in self.module.split(".") if not word.isdecimal()]
        return words[-1] if self.parameter == "weight" else f"{words[-1]}.{self.parameter}"


@dataclass(frozen=True)
class Updates:
    """All matrices that were tuned, and the paths of the embeddings and heads that were left out."""

    matrices: list[TunedMatrix]
    left_out: list[str]

    def named(self, name: str) -> TunedMatrix:
        """The matrix of that name. Raises: ConfigError, with the nearest."""
        by_name = {one.name: one for one in self.matrices}
        if name not in by_name:
            near = did_you_mean(name, by_name) or f"; they are called like '{self.matrices[0].name}'"
            raise ConfigError(f"no tuned matrix '{name}'{near}")
        return by_name[name]


def adapter_updates(model: Any, name: str, embeddings: bool = False) -> Updates:
    """The matrices that an adapter changes.

    Args:
        embeddings: those of embeddings and heads as well.

    Raises:
        ConfigError: the method changes no weight matrix.
    """
    modules = [(path, module) for path, module in adopted_modules(model) if name in deltas_of(module)]
    reasons = {deltas_of(module)[name].unmergeable for _, module in modules} - {""}
    if reasons:
        raise ConfigError(
            f"the adapter '{name}' changes no weights, so that there is no update to take apart ({min(reasons)}); "
            "compare its losses with slimtune forgetting instead"
        )
    ends, left_out, tuned = _ends(model), [], []
    for path, module in modules:
        changed = [
            TunedMatrix(path, parameter, expert, _reader(path, module, name, parameter, expert))
            for parameter, expert in _changed_matrices(path, module, name)
        ]
        # (vocabulary, hidden): its rows are tokens and no directions of a layer; Shuttleworth et al. look at the
        # blocks' matrices.
        if changed and id(module) in ends and not embeddings:
            left_out.append(path)
        else:
            tuned += changed
    return Updates(_some(tuned, left_out, f"the adapter '{name}'"), left_out)


def model_updates(before: Any, after: Any, embeddings: bool = False) -> Updates:
    """The matrices of a tuned model beside those of its base; what is equal in both isn't among them.

    A base without the head that tuning gave it, such as an encoder that became a classifier, is compared by its body;
    a new head has no weights before, and is left out whatever `embeddings` says.

    Raises:
        BaseMismatchError: the models aren't of one architecture.
        ConfigError: no matrix differs.
    """
    bases, new = _counterparts(before, after)
    ends, left_out, tuned = _ends(after), new, []
    for path, module in after.named_modules():
        changed = []
        for parameter, tensor in ({} if path in new else _dense(module)).items():
            own = bases.get(path)
            frozen = _dense(own).get(parameter) if own is not None else None
            if frozen is None or frozen.shape != tensor.shape:
                what = "nothing" if frozen is None else f"{tuple(frozen.shape)}"
                raise BaseMismatchError(
                    f"'{path}.{parameter}' is {tuple(tensor.shape)} in the tuned model and {what} in the base; name "
                    "the model that it was tuned from with --base"
                )
            # Bit by bit: frozen layers of a full fine-tune come out of the file as they went in.
            if not torch.equal(frozen, tensor):
                changed += [(parameter, expert) for expert in _experts(module, tensor)]
        matrices = [
            TunedMatrix(path, parameter, expert, _pair_reader(bases[path], module, parameter, expert))
            for parameter, expert in changed
        ]
        if matrices and id(module) in ends and not embeddings:
            left_out.append(path)
        else:
            tuned += matrices
    return Updates(_some(tuned, left_out, "the tuned model"), left_out)


def _counterparts(before: Any, after: Any) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules of a base by their paths in the tuned model, and the paths of those with weights that it lacks."""
    prefix = getattr(after, "base_model_prefix", "")
    if type(before) is type(after) or not prefix or not hasattr(after, prefix):
        return dict(before.named_modules()), []
    # The base may be the bare encoder (no prefix) or a model with another head (the body under its prefix).
    body = getattr(before, prefix, before)
    bases = {f"{prefix}.{path}".rstrip("."): module for path, module in body.named_modules()}
    outside = [path for path, module in after.named_modules() if not f"{path}.".startswith(f"{prefix}.")]
    return bases, [path for path in outside if path and _dense(after.get_submodule(path))]


def _some(tuned: list[TunedMatrix], left_out: list[str], what: str) -> list[TunedMatrix]:
    if not tuned and left_out:
        raise ConfigError(f"{what} changes only embeddings or heads ({listing(left_out)}); pass --embeddings")
    if not tuned:
        raise ConfigError(
            f"{what} changes no weight matrix, so that there is no update to take apart; compare the losses with "
            "slimtune forgetting instead"
        )
    return tuned


def _ends(model: Any) -> set[int]:
    """The modules at both ends of the model: embeddings, and what turns the last state into an answer."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    known = {id(module) for module in (input_embeddings(model), output) if module is not None}
    heads = {id(module) for path, module in model.named_modules() if path in ("score", "classifier", "lm_head")}
    return known | heads | {id(module) for module in model.modules() if base_of(module).kind == "embedding"}


def _dense(module: nn.Module) -> Dense:
    """The parameters of a module that hold matrices, the weight as (out, in, ...)."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    packed = base_of(module).dequantizer(module) is not None
    if not own and not packed:
        return {}
    return {name: tensor for name, tensor in base_of(module).dense(module).items() if tensor.ndim > 1}


def _experts(module: nn.Module, tensor: Tensor) -> Iterator[int | None]:
    """Of a stack of matrices the number of each one; a convolution's kernel is one matrix."""
    # (experts, rows, columns), as transformers 5 stores a layer's experts in one parameter.
    yield from range(len(tensor)) if tensor.ndim == 3 and base_of(module).kind == "other" else (None,)


def _matrix(tensor: Tensor, expert: int | None) -> Tensor:
    return (tensor if expert is None else tensor[expert]).detach().float().flatten(1)


def _changed_matrices(path: str, module: Any, name: str) -> list[tuple[str, int | None]]:
    before, after = _folded(path, module, name)
    changed = [parameter for parameter, tensor in after.items() if tensor is not before[parameter]]
    return [(parameter, expert) for parameter in changed for expert in _experts(module, after[parameter])]


@torch.no_grad()
def _folded(path: str, module: Any, name: str) -> tuple[Dense, Dense]:
    """The matrices of a module without the adapter and with it, in float32: a sum in 16 bits would be mostly noise."""
    delta = deltas_of(module)[name]
    frozen = {n: tensor.float() for n, tensor in base_of(module).dense(module).items()}
    held = {n: tensor.detach() for n, tensor in delta.stand_ins().items()}
    own = dict(frozen)
    if held:
        trained = base_of(module).dense(with_tensors(module, held))
        # What stands in for the module's own (modules_to_save, a bias) is tuned already; the fold goes on from there.
        own |= {n: t.float() for n, t in trained.items() if n in held}
    try:
        # As merges do it, so that any method with a merge has a spectrum, without a word of its own.
        folded = delta.fold_beside(own, own)
    except MergeError as error:
        raise ConfigError(
            f"what was tuned of '{path}' has no form as weights, so that there is no update to take apart ({error}); "
            "compare the losses with slimtune forgetting instead"
        ) from error
    matrices = {n: tensor for n, tensor in frozen.items() if tensor.ndim > 1}
    return matrices, {n: folded[n] for n in matrices}


def _reader(path: str, module: Any, name: str, parameter: str, expert: int | None) -> Callable[[], Update]:
    # Read again for each matrix and dropped after it: all of them in float32 would be two more copies of the model.
    def read() -> Update:
        before, after = _folded(path, module, name)
        return Update(
            _matrix(before[parameter], expert), _matrix(after[parameter], expert), factors_of(deltas_of(module)[name])
        )

    return read


def _pair_reader(before: nn.Module, after: nn.Module, parameter: str, expert: int | None) -> Callable[[], Update]:
    return lambda: Update(_matrix(_dense(before)[parameter], expert), _matrix(_dense(after)[parameter], expert))


def factors_of(delta: Any) -> tuple[Tensor, Tensor] | None:
    """(s B, A), (out, r) and (r, in), of a delta that adds their product; DoRA and others do more than that."""
    if not isinstance(delta, LoraDelta) or type(delta).fold is not LoraDelta.fold:
        return None
    a, b = (factor.detach().float().flatten(1) for factor in delta.pair)
    return delta.scaling * b, a
