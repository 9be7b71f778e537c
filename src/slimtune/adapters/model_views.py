"""What code written for `peft` looks for on a model: `model.base_model.model`, its statuses, its soft prompt.

A `PeftModel` of this library is the base itself. `PeftNames` is mixed into it, so that what `peft` wraps around a base
can be reached under its names; nothing here is needed to train or to run an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from slimtune.adapters.adapter import adopted_modules, attached
from slimtune.adapters.adopt import AdapterState
from slimtune.bases.packed import Packed
from slimtune.core.delta import Delta
from slimtune.core.frozen import deltas_of
from slimtune.errors import ConfigError

Irregular = Literal["irregular"]


PREFIXES = {
    "LORA": "lora_",
    "ADALORA": "lora_",
    "IA3": "ia3_",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "VERA": "vera_lambda_",
    "TRAINABLE_TOKENS": "trainable_tokens_",
}
"""What `peft` calls the parameters of a method with; what is trained as a copy of the base's is under `deltas`."""


class BaseModelView:
    """`model.base_model` of `peft`: its `model` is the base, which is the model itself.

    The names of a `PeftModel` are the model's; every other one is that of what transformers calls the base model, the
    layers without the head.
    """

    def __init__(self, model: Any, inner: Any) -> None:
        # Past `__setattr__`, which hands everything on to the model.
        vars(self).update(_model=model, _inner=inner)

    @property
    def model(self) -> Any:
        return self._model

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or the list of several."""
        active = self._model.active_adapters
        return active[0] if len(active) == 1 else active

    def __getattr__(self, name: str) -> Any:
        if self._inner is self._model and name in ("get_encoder", "set_encoder", "get_decoder", "set_decoder"):
            # Which transformers would look up here for ever: it asks the base model unless that is the model.
            raise AttributeError(name)
        is_ours = not name.startswith("__") and any(name in vars(cls) for cls in _own_classes(type(self._model)))
        return getattr(self._model if is_ours else self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return other is self._inner or (type(other) is BaseModelView and other._inner is self._inner)

    def __hash__(self) -> int:
        return hash(self._inner)

    def __repr__(self) -> str:
        return repr(self._inner)


def _own_classes(model_type: type) -> Iterable[type]:
    """The classes of this library that a model's class has in front of its own."""
    return [cls for cls in model_type.__mro__ if cls.__module__.startswith(f"{__package__}.") and cls is not model_type]


class PeftNames:
    """Mixed into `PeftModel`: attributes and methods of `peft`'s that code for it reads."""

    adapter_state: AdapterState

    @property
    def base_model(self) -> Any:
        """The base under `.model`, as `peft` has it, and transformers' base model else."""
        prefix = getattr(self, "base_model_prefix", None)
        # Past `__getattr__`, which a model may have changed: `_modules` holds what was registered under the name.
        inner = self._modules.get(prefix) if prefix else None  # pyright: ignore[reportAttributeAccessIssue]
        return BaseModelView(self, self if inner is None else inner)

    @property
    def peft_type(self) -> str:
        """The method of the active adapter."""
        return str(self._active_config.peft_type)

    @property
    def prefix(self) -> str:
        """What the names of the active method's parameters have in them."""
        return PREFIXES.get(self.peft_type, "deltas.")

    @property
    def _is_prompt_learning(self) -> bool:
        return self._active_config.is_prompt_learning

    @property
    def _active_config(self) -> Any:
        return self.adapter_state.configs[self.adapter_state.active[0]]

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype of the base."""
        return getattr(self, "dtype", None)

    @property
    def special_peft_forward_args(self) -> set[str]:
        """What a call may be given that the base doesn't take."""
        return {"adapter_names"}

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that adapters train whole."""
        configs = self.adapter_state.configs.values()
        return {name for config in configs for name in getattr(config, "modules_to_save", None) or []} or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter is in effect."""
        return self.adapter_state.enabled and bool(self.adapter_state.active)

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the modules that any adapter changes."""
        return [path for path, module in adopted_modules(self) if deltas_of(module) and path]  # pyright: ignore[reportArgumentType]

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Let the parameters of these adapters learn, or not, whichever are active. Raises: AdapterNotFoundError."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.adapter_state.check_known(*names)
        for name in names:
            for _, delta in attached(self, name):
                delta.requires_grad_(requires_grad)

    def get_prompt(self, batch_size: int) -> Tensor:
        """The active adapter's soft prompt (batch, tokens, dim), as it learns. Raises: ConfigError, without one."""
        name = self.adapter_state.active[0]
        if self.peft_type == "PREFIX_TUNING":
            raise ConfigError(f"the adapter '{name}' is a prefix, which each attention keeps among its keys and values")
        # As it is computed, not as it is stored: gradients go through P-tuning's encoder.
        prompts: list[Any] = [delta for _, delta in attached(self, name) if hasattr(delta, "encoded")]
        learned = [delta.prompt() for delta in prompts]
        return (learned[0] if learned else self._soft_prompt(name)).expand(batch_size, -1, -1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The soft prompt of an adapter as it is stored. Raises: ConfigError, for a method without one."""
        return self._soft_prompt(adapter_name).detach().cpu()

    def _soft_prompt(self, adapter_name: str) -> Tensor:
        self.adapter_state.check_known(adapter_name)
        for _, delta in attached(self, adapter_name):
            stored = delta.to_disk(delta.state_dict(keep_vars=True))
            if "/prompt_embeddings" in stored:
                return stored["/prompt_embeddings"]
        method = self.adapter_state.configs[adapter_name].peft_type
        raise ConfigError(f"the adapter '{adapter_name}' is one of {method}, which has no soft prompt")

    def get_layer_status(self) -> list[LayerStatus]:
        """The state of the adapters on each module that they change."""
        return get_layer_status(self)

    def get_model_status(self) -> ModelStatus:
        """The state of the adapters over the whole model."""
        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` takes the adapter: no, because that function of `peft` isn't here."""
        return False


@dataclass
class LayerStatus:
    """The adapters on one module.

    Attributes:
        enabled: whether unmerged adapters are in effect at all.
        requires_grad: by adapter, whether all of its parameters here learn; "irregular" where only some do.
        devices: by adapter, where its tensors are.
        quantization_backend: the kind of module that holds the frozen weight as codes, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class ModelStatus:
    """The adapters of a whole model; what isn't the same on all layers is "irregular"."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: Any) -> list[LayerStatus]:
    """The state of the adapters on each module that they change. Raises: ConfigError, where there are none."""
    changed = [(path, m) for path, m in (adopted_modules(model) if hasattr(model, "adapter_state") else [])]
    statuses = [_status(path, module) for path, module in changed if deltas_of(module)]
    if not statuses:
        raise ConfigError("no adapter layers: the model has no adapter; attach one with get_peft_model")
    return statuses


def _status(path: str, module: Any) -> LayerStatus:
    state, deltas = module.adapter_state, deltas_of(module)
    return LayerStatus(
        name=path,
        module_type=type(next(iter(deltas.values()))).__name__,
        enabled=state.enabled,
        active_adapters=list(state.active),
        merged_adapters=[name for name in state.merged if name in deltas],
        requires_grad={name: _learns(delta) for name, delta in deltas.items()},
        available_adapters=sorted(deltas),
        devices={name: sorted({t.device.type for t in delta.state_dict().values()}) for name, delta in deltas.items()},
        quantization_backend=type(module).__name__ if isinstance(module.adopted_base, Packed) else None,
    )


def _learns(delta: Delta) -> bool | Irregular:
    learning = {parameter.requires_grad for parameter in delta.parameters()}
    return _alike(learning, False)


def get_model_status(model: Any) -> ModelStatus:
    """The state of the adapters over the whole model. Raises: ConfigError, where there are none."""
    layers = get_layer_status(model)
    trainable, total = model.get_nb_trainable_parameters()
    available = sorted({name for layer in layers for name in layer.available_adapters})
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    is_partial = any((set(layer.available_adapters) - set(layer.merged_adapters)) & set(merged) for layer in layers)
    return ModelStatus(
        base_model_type=model.adopted_from.__name__,
        adapter_model_type=type(model).__name__,
        peft_types={name: str(config.peft_type) for name, config in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_alike({layer.enabled for layer in layers}, True),
        active_adapters=list(model.active_adapters),
        # An adapter that is merged in some layers and merely there in others; one that a layer doesn't have is no
        # matter.
        merged_adapters="irregular" if is_partial else merged,
        requires_grad={
            name: _alike({layer.requires_grad[name] for layer in layers if name in layer.requires_grad}, False)
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, [])}) for name in available
        },
        quantization_backend=_alike({layer.quantization_backend for layer in layers}, None),
    )


def _alike(values: set[Any], otherwise: Any) -> Any:
    """The one value, or "irregular" where there are several."""
    return next(iter(values), otherwise) if len(values) < 2 else "irregular"
