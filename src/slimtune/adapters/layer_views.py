"""What code written for `peft` looks for on a layer: `layer.lora_A["default"].weight`, `.scaling`, `.base_layer`.

An adopted module has none of them: its adapters are its deltas. The names are read-only views of these, made when they
are asked for. Tensors in them are the adapter's own, so that writing into one changes the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.delta import Delta
from slimtune.core.frozen import deltas_of, with_tensors

TENSORS = (
    *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_E", "ranknum"),
    *("ia3_l", "vera_lambda_b", "vera_lambda_d", "ln_tuning_layers", "trainable_tokens_delta"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
"""The names under which `peft` keeps an adapter's tensors on a layer."""
SETTINGS = ("r", "scaling")
"""What a delta has under the same name."""
FLAGS = ("use_dora", "use_rslora", "lora_alpha")
"""What the adapter's config has under the same name."""


class ByAdapter(Mapping[str, Any]):
    """A value of each adapter on one module by the adapter's name."""

    def __init__(self, module: Any, names: list[str], value: Callable[[str], Any]) -> None:
        self._module, self._names, self._value = module, names, value

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._value(name)

    def __getattr__(self, name: str) -> Any:
        """As `[name]`: `peft`'s are containers of torch's, which take both."""
        if name.startswith("_") or name not in self._names:
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return repr(dict(self))


class Settings(ByAdapter, MutableMapping[str, Any]):
    """As `ByAdapter`, of an attribute of the deltas that may be set."""

    def __init__(self, module: Any, names: list[str], attribute: str) -> None:
        deltas = deltas_of(module)
        super().__init__(module, names, lambda name: getattr(deltas[name], attribute))
        self._attribute = attribute

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(deltas_of(self._module)[name], self._attribute, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("an adapter's setting can't be deleted; call delete_adapter")


class LayerView:
    """One name of `peft`'s on the class of an adopted module; what the module itself has of that name comes first."""

    def __init__(self, view: Callable[[Any, str], Any]) -> None:
        self._view = view

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            raise AttributeError(self._name)
        # A data descriptor would win over the instance; this one gives way by hand, since nn.Module keeps its tensors
        # in dicts.
        for own in (module._parameters, module._buffers, module._modules):
            if self._name in own:
                return own[self._name]
        view = self._view(module, self._name) if deltas_of(module) else None
        if view is None:
            raise AttributeError(f"'{type(module).__name__}' object has no attribute '{self._name}'")
        return view


def _tensors(module: Any, name: str) -> ByAdapter | None:
    deltas = deltas_of(module)
    named = [adapter for adapter, delta in deltas.items() if _of(delta, name)]
    return ByAdapter(module, named, lambda adapter: _layer(_of(deltas[adapter], name), name)) if named else None


def _of(delta: Any, name: str) -> dict[str, Tensor]:
    """The tensors that a delta stores under a name, by what stands behind it and a dot."""
    # With `keep_vars`, so that these are the parameters themselves and not detached copies.
    stored = delta.to_disk(delta.state_dict(keep_vars=True))
    heads = {key: key.partition(".") for key in stored}
    return {rest: stored[key] for key, (head, _, rest) in heads.items() if head == name}


def _layer(tensors: dict[str, Tensor], name: str) -> Any:
    """A tensor that stands alone as it is; else a module with these parameters, a linear layer for a matrix."""
    if "" in tensors and name != "lora_magnitude_vector":
        return tensors[""]
    weight = tensors.get("weight", tensors.get(""))
    if weight is not None and weight.ndim == 2:
        # On "meta": no memory for a weight that is replaced in the next line.
        module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors, device="meta")
    else:
        module = nn.Module()
    for key, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            module._parameters[key or "weight"] = tensor
        else:
            module._parameters.pop(key or "weight", None)
            vars(module)[key or "weight"] = tensor
    return module


def _settings(module: Any, name: str) -> Settings | None:
    named = [adapter for adapter, delta in deltas_of(module).items() if hasattr(delta, name)]
    return Settings(module, named, name) if named else None


def _flags(module: Any, name: str) -> ByAdapter | None:
    configs = module.adapter_state.configs
    named = [adapter for adapter in deltas_of(module) if hasattr(configs[adapter], name)]
    return ByAdapter(module, named, lambda adapter: getattr(configs[adapter], name)) if named else None


def _dropout(module: Any, name: str) -> ByAdapter | None:
    deltas = deltas_of(module)
    named = [adapter for adapter, delta in deltas.items() if hasattr(delta, name)]
    return ByAdapter(module, named, lambda adapter: _dropout_layer(getattr(deltas[adapter], name))) if named else None


def _dropout_layer(p: float) -> nn.Module:
    return nn.Dropout(p) if p else nn.Identity()


def _copies(module: Any, name: str) -> ByAdapter | None:
    deltas = deltas_of(module)
    named = [adapter for adapter, delta in deltas.items() if type(delta) is Delta and delta.holds]
    return ByAdapter(module, named, lambda n: with_tensors(module, deltas[n].stand_ins())) if named else None


def _delta_weight(module: Any, name: str) -> Callable[[str], Tensor]:
    def get_delta_weight(adapter: str) -> Tensor:
        """What the adapter adds to the weight when it is merged, in the layout of the weight."""
        base, delta = module.adopted_base, deltas_of(module)[adapter]
        with torch.no_grad():
            # The difference of two 16-bit weights would have lost most of a small update.
            dense = {name: tensor.float() for name, tensor in base.dense(module).items()}
            return base.turned(delta.fold(dict(dense))["weight"] - dense["weight"])

    return get_delta_weight


def _plain(module: Any, name: str) -> Any:
    return with_tensors(module, {})


def _active(module: Any, name: str) -> list[str]:
    """The active adapters; of a module that is trained as a copy or by rows alone, those that train it."""
    active, deltas = list(module.adapter_state.active), deltas_of(module)
    is_changed = any(type(delta) is not Delta and not hasattr(delta, "token_indices") for delta in deltas.values())
    return active if is_changed else [adapter for adapter in active if adapter in deltas]


def _activation(module: Any, name: str) -> Callable[..., None]:
    def set_adapter(adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, of all layers: which are active is one thing for the whole model."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        module.adapter_state.check_known(*names)
        module.adapter_state.active = names
        for adapter, delta in deltas_of(module).items():
            delta.requires_grad_(adapter in names and not inference_mode)

    return set_adapter


def _scaled(module: Any, name: str) -> Callable[[float], None]:
    def scale(factor: float) -> None:
        """Multiply the scale of the active adapters here, or divide it."""
        for adapter, delta in deltas_of(module).items():
            if adapter in module.adapter_state.active and hasattr(delta, "scaling"):
                delta.scaling *= factor if name == "scale_layer" else 1 / factor

    return scale


def _features(module: Any, name: str) -> int:
    return module.adopted_base.features(module)[name == "out_features"]


def _held_plain(module: Any, name: str) -> Any:
    return with_tensors(module, {}) if _copies(module, name) else None


def layer_views() -> dict[str, LayerView]:
    """All names of `peft`'s for layers, for the class of an adopted module."""
    state: dict[str, Callable[[Any, str], Any]] = {
        "active_adapters": _active,
        "active_adapter": _active,
        "set_adapter": _activation,
        "scale_layer": _scaled,
        "unscale_layer": _scaled,
        "_all_available_adapter_names": lambda module, _: lambda: sorted(deltas_of(module)),
        "_available_adapters": lambda module, _: set(deltas_of(module)),
        "in_features": _features,
        "out_features": _features,
        "merged_adapters": lambda module, _: [n for n in module.adapter_state.merged if n in deltas_of(module)],
        "merged": lambda module, _: any(name in deltas_of(module) for name in module.adapter_state.merged),
        "disable_adapters": lambda module, _: not module.adapter_state.enabled,
        "base_layer": _plain,
        "get_base_layer": lambda module, _: lambda: with_tensors(module, {}),
        "get_delta_weight": _delta_weight,
        "modules_to_save": _copies,
        "original_module": _held_plain,
        "lora_dropout": _dropout,
    }
    views = state | dict.fromkeys(TENSORS, _tensors) | dict.fromkeys(SETTINGS, _settings) | dict.fromkeys(FLAGS, _flags)
    return {name: LayerView(view) for name, view in views.items()}
