"""What a user wants, as the fields of a method: one config class a method, enrolled by its file being there."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from slimtune.core.constraint import ConstraintConfig
from slimtune.core.delta import Delta
from slimtune.core.field_types import check_types
from slimtune.core.frozen import Site
from slimtune.core.roles import Role
from slimtune.errors import ConfigError, SlimtuneError, UnknownFieldError, did_you_mean, listing


class TaskType(StrEnum):
    """What a model is tuned for; the names are those of the file format."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class MethodName(str):
    """The name of a method, with the two attributes of an enum's member that code for `peft` reads."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)


CONSTRAINED = "CONSTRAINED_"
"""What stands before the `peft_type` of an adapter whose merged weights are held to a constraint."""

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

    in_peft: ClassVar[bool] = False
    """Whether `peft` has the method, so that it reads the files; each config says so itself, none inherits it."""

    way_out: ClassVar[str] = "name the modules in target_modules"
    """What to do where the model has nothing of `default_targets`."""

    sizes: ClassVar[tuple[str, ...]] = ("r",)
    """Fields that are lengths of stored tensors: a file in which one is larger than any tensor's side is damaged."""

    inert: ClassVar[Mapping[str, Any]] = {}
    """Fields of `peft` that this library doesn't implement, with the value at which they change nothing."""

    def __post_init__(self) -> None:
        self.foreign: dict[str, Any] = {}
        if self.peft_type is not None:
            self.peft_type = MethodName(self.peft_type)
        if self.task_type is not None and self.task_type not in list(TaskType):
            near = did_you_mean(str(self.task_type).upper(), list(TaskType))
            raise ConfigError(f"task_type {self.task_type!r} is none of {listing(TaskType)}{near}")

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method puts virtual tokens in front of the model's input and changes no module."""
        return self.default_targets == ("model",)

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

    def link_deltas(self, model: Any, drafted: list[tuple[Site, Any]]) -> None:
        """Link and check the deltas of one adapter, all at once, before any is attached.

        `drafted` may be changed in place: a delta that is taken out of it isn't attached.

        Raises:
            TargetError, ConfigError: the method doesn't go with this model.
        """

    def combined(self, others: Sequence[Any], how: str, rank: int | None) -> PeftConfig:
        """The config of a weighted combination with other adapters of this method. Raises: ConfigError."""
        raise ConfigError(f"{self.peft_type} adapters can't be combined into one; activate them together instead")

    def stored_fields(self) -> dict[str, Any]:
        """The fields of an adapter as it is stored, where that isn't how it is trained."""
        return self.to_dict()

    def read(self, tensors: Mapping[str, Tensor], placed: list[tuple[Site, Any]], source: object) -> dict[str, Tensor]:
        """The tensors of a file by their keys as these deltas store them, where `peft` stores them otherwise.

        Raises:
            ConfigError: what is stored can't be used as this config asks.
        """
        return dict(tensors)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, those included that were only passed through."""
        own = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        constraint = own.pop("constraint", None)
        if constraint and self.constraint:  # pyright: ignore[reportAttributeAccessIssue]
            # By another name: who reads the weights without the constraint computes something else.
            own |= {"constraint": constraint, "peft_type": f"{CONSTRAINED}{self.peft_type}"}
        # The order is one of precedence: what is unknown to the class never hides a field that it has.
        return dict(self.inert) | self.foreign | own

    @classmethod
    def from_dict(cls: type[C], fields: Mapping[str, Any]) -> C:
        """A config from what a file says; the class follows from `peft_type`.

        Raises:
            ConfigError: an unknown method, or an unknown field that is set to something.
        """
        peft_type = fields.get("peft_type")
        if fields.get("constraint"):
            peft_type = str(peft_type).removeprefix(CONSTRAINED)
            fields = {**fields, "peft_type": peft_type}
        # From the file and not from `cls`: `PeftConfig.from_pretrained` is how callers ask before they know the method.
        owner = method(str(peft_type)) if peft_type else cls
        if owner is PeftConfig:
            raise ConfigError(f"peft_type must name a method, found {peft_type!r}; known are {listing(methods())}")
        if not issubclass(owner, cls):
            raise ConfigError(f"this adapter is of {peft_type}, not one for {cls.__name__}")
        known = {f.name for f in dataclasses.fields(owner)}
        # Unknown fields are kept apart and written back by `to_dict`: reading and saving must lose nothing of a file.
        config = owner(**{name: value for name, value in fields.items() if name in known})
        config.foreign = {name: value for name, value in fields.items() if name not in known}
        for name, value in config.foreign.items():
            config.check_foreign(name, value)
        return config

    @classmethod
    def from_peft_type(cls: type[C], **fields: Any) -> C:
        """A config from its fields, of the method that `peft_type` names among them. Raises: ConfigError."""
        return cls.from_dict(fields)

    @classmethod
    def from_pretrained(cls: type[C], model_id: str | Path, subfolder: str | None = None, **hub: Any) -> C:
        """The config of an adapter folder or Hub repository.

        Raises:
            AdapterFileError: no such folder, or no readable `adapter_config.json` in it.
        """
        from slimtune.storage.peft_format import read_config

        return cls.from_dict(read_config(model_id, subfolder, **hub))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """The fields in an `adapter_config.json`. Raises: AdapterFileError."""
        from slimtune.storage.peft_format import read_fields

        return read_fields(Path(path_json_file))

    def save_pretrained(self, save_directory: str) -> None:
        """Write `adapter_config.json` into the folder, whole or not at all."""
        from slimtune.storage.peft_format import write_config

        write_config(save_directory, self.to_dict())

    def push_to_hub(self, repo_id: str, **hub: Any) -> Any:
        """Push `adapter_config.json` alone; takes what transformers' `push_to_hub` takes."""
        from transformers.utils.hub import PushToHubMixin

        class Pushed(PushToHubMixin):
            def save_pretrained(self, folder: str, **_: Any) -> None:
                config.save_pretrained(folder)

        config = self
        return Pushed().push_to_hub(repo_id, **hub)

    @classmethod
    def check_foreign(cls, name: str, value: Any) -> None:
        """Let a field pass that changes nothing. Raises: ConfigError, for one that would."""
        # At its neutral value the field changes nothing, whatever it is called: files of a newer `peft` stay readable.
        if name in cls.inert and value == cls.inert[name]:
            return
        if name not in cls.inert and value in (None, False, "", [], {}):
            return
        is_known = name in cls.inert
        why = "is not implemented here" if is_known else "is unknown to this version"
        way_out = "leave it out" if is_known else "update slimtune"
        raise ConfigError(
            f"the field {name!r} is set to {value!r}, which {why} and would change the result; {way_out}, or use peft "
            "for this adapter"
        )


@dataclass
class TargetedConfig(PeftConfig):
    """What methods share that change chosen modules.

    `target_modules`: names (the last components of module paths), a regular expression over whole paths,
    `"all-linear"`, or None for the places where the method belongs. `constraint`: what the merged weights are held to,
    see `slimtune.ConstraintConfig`; `peft` has no such thing, and refuses the file.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    constraint: ConstraintConfig | dict[str, Any] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.constraint = ConstraintConfig.of(self.constraint)
        # A set, as `peft` makes it: the order of names has no meaning, and two configs compare equal.
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
    if isinstance(value, StrEnum | MethodName):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, set) else value


_methods: dict[str, type[PeftConfig]] = {}


def register(config: type[C]) -> type[C]:
    """Enrol a method by its config; constructor arguments that don't exist are refused with a suggestion."""
    plain_init = config.__init__
    # Before it is wrapped: the wrapper's own signature takes anything.
    known = [name for name in inspect.signature(plain_init).parameters if name != "self"]

    @functools.wraps(plain_init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        strangers = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        for name, value in strangers.items():
            if name not in config.inert:
                near = did_you_mean(name, known)
                raise UnknownFieldError(
                    f"{config.__name__} has no field {name!r}{near or '; see help(' + config.__name__ + ')'}"
                )
            config.check_foreign(name, value)
        try:
            plain_init(self, *args, **kwargs)
        except SlimtuneError:
            raise
        except Exception:
            # A check of the method's own may stumble over a type that it hasn't thought of.
            check_types(self)
            raise
        check_types(self)

    config.__init__ = checked_init
    # Of this very class: a method derived from LoRA's config isn't one that `peft` reads.
    config.in_peft = vars(config).get("in_peft", False)
    # An instance by defaults, since `peft_type` is a field and not a class attribute; every method must be
    # constructible so.
    _methods[config().peft_type or ""] = config
    return config


def methods() -> dict[str, type[PeftConfig]]:
    """Every method by its `peft_type`; a file in `methods/` enrols itself by being there."""
    package = importlib.import_module("slimtune.methods")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return dict(_methods)


def method(peft_type: str) -> type[PeftConfig]:
    """The config class of a method. Raises: ConfigError, for a method that isn't here."""
    known = methods()
    if peft_type not in known:
        raise ConfigError(
            f"the method {peft_type!r} is not implemented; known are {listing(known)}{did_you_mean(peft_type, known)}"
        )
    return known[peft_type]
