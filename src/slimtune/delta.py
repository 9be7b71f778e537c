"""The one abstraction: a method is a formula around a frozen callable.

A `PeftConfig` says what a user wants, a `Base` knows the bits of one kind of frozen weight, and a `Delta` is the
trainable change that the config builds for one site: M methods and B kinds of base cost M + B pieces of code.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from slimtune.errors import ConfigError, MergeError, TargetError, did_you_mean, listing
from slimtune.structure import Role, role_of

Dense = dict[str, Tensor]
"""The parameters of one module by name, `weight` as (out, in, ...): what a change is folded into."""

Kind = Literal["linear", "conv", "embedding", "other"]


class TaskType(StrEnum):
    """What a model is tuned for; the names are those of the file format."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class Outline(NamedTuple):
    """What a weight looks like as (out, in, ...), known without expanding it; `dtype` is what it is computed in."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Base(ABC):
    """How one kind of frozen module keeps its weight: read as dense, written back, never more.

    Attributes:
        module_types: the modules that it is for; by full name where importing them takes long.
    """

    kind: ClassVar[Kind]
    module_types: ClassVar[tuple[type[nn.Module] | str, ...]]
    fan_in_fan_out: ClassVar[bool] = False
    """Whether the weight is stored as (in, out)."""

    @abstractmethod
    def features(self, module: Any) -> tuple[int, int]:
        """(in_features, out_features) of the map that the module computes."""

    @abstractmethod
    def weight(self, module: Any) -> Tensor:
        """The weight as (out, in, ...), a view of the stored one where that is possible."""

    def turned(self, stored: Tensor) -> Tensor:
        """A dense weight that is laid out as the module stores it, as (out, in, ...)."""
        return stored

    def outline(self, module: Any) -> Outline:
        """The weight's shape, dtype and device."""
        weight = self.weight(module)
        return Outline(weight.shape, weight.dtype, weight.device)

    def stored_as(self, module: nn.Module) -> str:
        """As which numbers the module's own parameters are stored, or its buffers if it has none, in words."""
        return dtypes_of(module.parameters(recurse=False)) or dtypes_of(module.buffers(recurse=False))

    def held(self, module: nn.Module) -> list[Tensor]:
        """All tensors that the module itself keeps."""
        return [*module.parameters(recurse=False), *module.buffers(recurse=False)]

    def recall(self, module: Any) -> Callable[[], Tensor] | None:
        """What expands the weight once more, so that a backward pass need not keep it; None where it is kept anyway."""
        return None

    def bias(self, module: Any) -> Tensor | None:
        """The bias that the module adds to its output, if it has one."""
        return getattr(module, "bias", None)

    def floating(self, module: nn.Module, name: str) -> Tensor | None:
        """A parameter of the module in floating point, laid out as a dense module stores it."""
        return module._parameters[name]

    def dense(self, module: nn.Module) -> Dense:
        """All parameters of the module by name, the weight as (out, in, ...)."""
        own = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
        return own | {"weight": self.weight(module).detach()} if "weight" in own else own

    def repack(self, module: nn.Module, dense: Dense) -> Dense:
        """The inverse of `dense`: the tensors as the module stores them."""
        return dense

    def loses_gradient(self, module: Any) -> bool:
        """Whether gradients don't come through the module, found by trying where its forward isn't known."""
        return False

    def is_textbook(self, module: nn.Module) -> bool:
        """Whether the module computes its kind's textbook product and nothing else."""
        forward = getattr(type(module), "adopted_from", type(module)).forward
        return forward in {kind.forward for kind in self.module_types if not isinstance(kind, str)}

    def may_fuse(self, module: nn.Module) -> bool:
        """Whether a fused product may stand in for the module's own: a textbook one with a frozen weight."""
        return False


@dataclass(frozen=True)
class Site:
    """One place where a delta attaches: the module, its name in the model and its kind of base.

    The model itself is a site too, with an empty name.
    """

    name: str
    module: Any
    base: Base

    @property
    def kind(self) -> Kind:
        return self.base.kind

    @property
    def outline(self) -> Outline:
        """The shape, dtype and device of its weight."""
        return self.base.outline(self.module)

    @property
    def role(self) -> Role | None:
        """What the module does in its block, where that can be told."""
        return role_of(self.name)


class Frozen:
    """What a delta is put around in one call of a module: called, it is what that computes without the delta."""

    __slots__ = ("_weight", "base", "call", "module")

    def __init__(self, module: Any, base: Base, call: Callable[..., Any]) -> None:
        self.module, self.base, self.call = module, base, call
        self._weight: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The frozen weight as (out, in, ...), expanded once."""
        if self._weight is None:
            self._weight = self.base.weight(self.module)
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        """The bias that the module adds to its output, if it has one."""
        return self.base.bias(self.module)


class Delta(nn.Module):
    """A trainable change to one frozen module.

    After `hold`, `whole` has parameters of the module that are trained as such (a bias, a new head) and `running` its
    statistics: while the delta is active they stand in for the module's own.
    """

    whole: nn.ParameterDict
    running: BufferDict

    on_disk: ClassVar[Mapping[str, str]] = {}
    """What the file format calls each parameter, after the site's name and a dot."""

    unmergeable: ClassVar[str] = ""
    """Why a change of this method can't be written into weights, a sentence; empty where it can."""

    reweighs: ClassVar[bool] = False
    """Whether the formula is a change of parameters, right for whatever the module computes from them."""

    def forward(self, base: Frozen, *args: Any, **kwargs: Any) -> Any:
        """The method's equation; `base(x)` is what the frozen module computes."""
        return base(*args, **kwargs)

    def initialise(self, config: Any, site: Site) -> None:
        """Set the parameters to where training starts, as the config asks."""

    def disk_name(self, parameter: str) -> str:
        """What the file format calls this parameter or buffer, after the site's name and a dot.

        A name that starts with a slash stands alone, without the site's name.
        """
        return self.on_disk.get(parameter) or parameter.removeprefix("whole.").removeprefix("running.")

    def to_disk(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored, by `disk_name`, from the parameters and buffers by their names here."""
        return {self.disk_name(name): tensor for name, tensor in own.items()}

    def from_disk(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_disk`."""
        return {name: stored[self.disk_name(name)] for name in self.state_dict()}

    def fold(self, dense: Dense) -> Dense:
        """The equation written into dense parameters, as new tensors; what is held whole is there already.

        Raises:
            MergeError: the change can't be written into the weights.
        """
        if self.unmergeable:
            raise MergeError(self.unmergeable)
        return dense

    def fold_beside(self, dense: Dense, frozen: Dense) -> Dense:
        """As `fold`, where other adapters may be in `dense` already; `frozen` is without any."""
        return self.fold(dense)

    @classmethod
    def combine(cls, deltas: list[Any], weights: list[float], how: str, target: Any, **options: Any) -> None:
        """Set `target` to a weighted combination of deltas. Raises: ConfigError, for methods that have none."""
        raise ConfigError(f"adapters with a {cls.__name__} can't be combined by '{how}'")

    def hold(self, site: Site, *names: str) -> None:
        """Train copies of these parameters of the module in place of its own."""
        own = {name: site.base.floating(site.module, name) for name in names}
        self.whole = nn.ParameterDict({name: p.detach().clone() for name, p in own.items() if p is not None})

    def hold_all(self, site: Site) -> None:
        """Train a copy of everything that the module itself owns, running statistics included."""
        self.hold(site, *(name for name, _ in site.module.named_parameters(recurse=False)))
        self.hold_statistics(site.module)

    def hold_statistics(self, module: nn.Module) -> None:
        """Keep copies of the module's running statistics in place of its own."""
        self.whole = self.whole if self.holds else nn.ParameterDict()
        self.running = BufferDict()
        for name, buffer in statistics(module).items():
            self.running.register_buffer(name, buffer.detach().clone())

    def stand_ins(self) -> dict[str, Tensor]:
        """What replaces the module's own parameters and buffers while this delta is active."""
        if not self.holds:
            return {}
        running = dict(self.running.named_buffers()) if "running" in self._modules else {}
        return dict(self.whole.items()) | running

    @property
    def holds(self) -> bool:
        """Whether parameters of the module are trained whole."""
        return "whole" in self._modules

    def excludes(self, other: Any) -> bool:
        """Whether this delta and another one on the same module can't be active together."""
        return self.holds and other.holds

    def passes_over(self, key: str) -> bool:
        """Whether a stored tensor of this key served training alone, so that this delta does without it."""
        return False


def deltas_of(module: Any) -> Mapping[str, Any]:
    """The deltas of an adopted module by adapter; the root and the head are adopted without having any."""
    return module._modules.get("deltas", {})


@contextmanager
def standing_in(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """These tensors in place of the module's own parameters and buffers for a while."""
    slots: dict[str, Any] = {n: module._parameters if n in module._parameters else module._buffers for n in tensors}
    own = {name: slot[name] for name, slot in slots.items()}
    for name, tensor in tensors.items():
        slots[name][name] = tensor
    try:
        yield
    finally:
        for name, tensor in own.items():
            slots[name][name] = tensor


class BufferDict(nn.Module):
    """Buffers by name: the running statistics of a module that is trained whole."""


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the module's state; constants that aren't stored are none."""
    return {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


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
        sums = {}
        for name, d in self.differences.items():
            own = base.base.floating(base.module, name)
            sums[name] = d.to(base.base.outline(base.module).dtype) if own is None else (own + d).to(own.dtype)
        with standing_in(base.module, sums):
            return base(*args, **kwargs)

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
    def combine(cls, deltas: list[Any], weights: list[float], how: str, target: Any, **options: Any) -> None:
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


C = TypeVar("C", bound="PeftConfig")

Whereabouts = Literal["linear", "bias", "norm", "everything", "input", "output", "model"]
"""Places by what is there: linear layers of the blocks, modules with a bias, normalisations, all modules with
parameters, the input embeddings, the output layers, or the model as a whole."""


@dataclass
class PeftConfig:
    """What all methods share; the fields and defaults are `peft`'s.

    Raises:
        ConfigError: a field that doesn't exist, or that this library can't honour.
    """

    task_type: TaskType | str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    learning_rate: ClassVar[float] = 2e-4
    """What `slimtune train` learns with where nothing is said."""

    way_out: ClassVar[str] = "name the modules in target_modules"
    """What to do where the model has nothing of `default_targets`."""

    inert: ClassVar[Mapping[str, Any]] = {}
    """Fields of `peft` that this library doesn't implement, with the value at which they change nothing."""

    def __post_init__(self) -> None:
        self.foreign: dict[str, Any] = {}
        if self.task_type is not None and self.task_type not in list(TaskType):
            near = did_you_mean(str(self.task_type).upper(), list(TaskType))
            raise ConfigError(f"task_type {self.task_type!r} is none of {listing(TaskType)}{near}")

    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def default_targets(self) -> tuple[Role | Whereabouts, ...]:
        """Where the method attaches if no `target_modules` are named."""
        return ("linear",)

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> Delta:
        """The delta for one site, its parameters not set yet. Raises: TargetError, ConfigError."""
        raise ConfigError(f"{type(self).__name__} names no method; use LoraConfig or another method's config")

    def further_modules(self, model: Any, modules: Mapping[str, nn.Module], chosen: Sequence[str]) -> list[str]:
        """Names of modules that take part without being targets: those whose weights are tied to a chosen one's.

        Raises:
            TargetError, ConfigError: a field of the method names something that isn't there.
        """
        return []

    def settle(self, model: Any, drafted: list[tuple[Site, Any]]) -> None:
        """See all deltas of an adapter together, before it is attached: link them, check them, note what was found.

        What is taken out of the list isn't attached.

        Raises:
            TargetError, ConfigError: the method doesn't go with this model.
        """

    def allocate(self, drafted: Sequence[tuple[Site, Any]], step: int) -> None:
        """Share the ranks of an adapter out anew after a training step. Raises: ConfigError."""
        raise ConfigError(f"{self.peft_type} adapters keep their ranks while training; AdaLoRA's are shared out anew")

    def combined(self, others: Sequence[Any], how: str, rank: int | None) -> PeftConfig:
        """The config of a weighted combination with other adapters of this method. Raises: ConfigError."""
        raise ConfigError(f"{self.peft_type} adapters can't be combined into one; activate them together instead")

    def stored_fields(self) -> dict[str, Any]:
        """The fields of an adapter as it is stored, where that isn't how it is trained."""
        return self.to_dict()

    def check_readable(self) -> None:
        """See that an adapter that is stored with this config can be read. Raises: ConfigError."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, those included that were only passed through."""
        own = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return dict(self.inert) | self.foreign | own

    @classmethod
    def from_dict(cls: type[C], fields: Mapping[str, Any]) -> C:
        """A config from what a file says; the class follows from `peft_type`.

        Raises:
            ConfigError: an unknown method, or an unknown field that is set to something.
        """
        peft_type = fields.get("peft_type")
        owner = method(str(peft_type)) if peft_type else cls
        if not issubclass(owner, cls):
            raise ConfigError(f"this is a {peft_type} adapter, not one for {cls.__name__}")
        known = {f.name for f in dataclasses.fields(owner)}
        config = owner(**{name: value for name, value in fields.items() if name in known})
        config.foreign = {name: value for name, value in fields.items() if name not in known}
        for name, value in config.foreign.items():
            config.check_foreign(name, value)
        return config

    @classmethod
    def from_pretrained(cls: type[C], model_id: str | Path, subfolder: str | None = None, **hub: Any) -> C:
        """The config of an adapter folder or Hub repository.

        Raises:
            AdapterFileError: no such folder, or no readable `adapter_config.json` in it.
        """
        from slimtune.storage.peft_format import read_config

        return cls.from_dict(read_config(model_id, subfolder, **hub))

    def save_pretrained(self, save_directory: str) -> None:
        """Write `adapter_config.json` into the folder, whole or not at all."""
        from slimtune.storage.peft_format import write_config

        write_config(save_directory, self.to_dict())

    @classmethod
    def check_foreign(cls, name: str, value: Any) -> None:
        """Let a field pass that changes nothing. Raises: ConfigError, for one that would."""
        if name in cls.inert and value == cls.inert[name]:
            return
        if name not in cls.inert and value in (None, False, "", [], {}):
            return
        why = "is not implemented here" if name in cls.inert else "is unknown to this version"
        raise ConfigError(f"the field {name!r} is set to {value!r}, which {why} and would change the result")


@dataclass
class TargetedConfig(PeftConfig):
    """What methods share that change chosen modules.

    `target_modules`: names (the last components of module paths), a regular expression over whole paths,
    `"all-linear"`, or None for the places where the method belongs.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = _names(self.target_modules)
        self.exclude_modules = _names(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"

    def joined_targets(self, others: Sequence[TargetedConfig]) -> set[str] | str | None:
        """The targets of this config and others together. Raises: ConfigError, for names beside an expression."""
        targets: list[Any] = [config.target_modules for config in (self, *others)]
        if len({type(names) for names in targets}) > 1:
            raise ConfigError("adapters whose target_modules are names don't combine with one that has an expression")
        if isinstance(self.target_modules, str):
            return "|".join(f"({expression})" for expression in targets)
        return None if self.target_modules is None else set().union(*targets)


@dataclass
class LayeredConfig(TargetedConfig):
    """What methods share that can be kept to some layers: their numbers, and where in a path the number stands."""

    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                "layers_to_transform needs target_modules as a list of names, found "
                f"{self.target_modules!r}; list the names, or write the layers into an expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern says where the layer number stands; give layers_to_transform as well")


def _names(value: Any) -> Any:
    return set(value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, set) else value


_methods: dict[str, type[PeftConfig]] = {}


def register(config: type[C]) -> type[C]:
    """Enrol a method by its config; constructor arguments that don't exist are refused with a suggestion."""
    plain_init = config.__init__
    known = [name for name in inspect.signature(plain_init).parameters if name != "self"]

    @functools.wraps(plain_init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        strangers = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        for name, value in strangers.items():
            if name not in config.inert:
                near = did_you_mean(name, known)
                raise ConfigError(
                    f"{config.__name__} has no field {name!r}{near or '; see help(' + config.__name__ + ')'}"
                )
            config.check_foreign(name, value)
        plain_init(self, *args, **kwargs)

    config.__init__ = checked_init
    _methods[config().peft_type or ""] = config
    return config


def methods() -> dict[str, type[PeftConfig]]:
    """Every method by its `peft_type`; a file in `methods/` enrols itself by being there."""
    package = importlib.import_module("slimtune.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"slimtune.methods.{module.name}")
    return dict(_methods)


def method(peft_type: str) -> type[PeftConfig]:
    """The config class of a method. Raises: ConfigError, for a method that isn't here."""
    known = methods()
    if peft_type not in known:
        raise ConfigError(
            f"the method {peft_type!r} is not implemented; known are {listing(known)}{did_you_mean(peft_type, known)}"
        )
    return known[peft_type]


def means(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern`, a name or expression, means the module of that path."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def dtypes_of(tensors: Iterable[Tensor]) -> str:
    """The types of number of some tensors, in words."""
    return "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def trainable_dtype(dtype: torch.dtype, autocast_adapter_dtype: bool) -> torch.dtype:
    """The dtype of a delta on a weight of this dtype: 16-bit steps are too coarse for small updates."""
    return torch.float32 if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16) else dtype


def added(dense: Dense, update: Tensor) -> Dense:
    """The parameters with an update of the weight, added in float32 or better and rounded once."""
    weight = dense["weight"]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return dense | {"weight": weight.to(dtype).add(update.to(dtype).reshape(weight.shape)).to(weight.dtype)}


def wrong_kind(site: Site, method_name: str, takes: str) -> TargetError:
    """The error for a module that a method can't change."""
    return TargetError(f"{method_name} can't attach to '{site.name}', a {type(site.module).__name__}; it takes {takes}")
