"""The adopted root: a model that carries adapters, under the names of `peft.PeftModel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from slimtune.adapter import Draft, adopted_modules, attach, attached, draft, draft_stored, fill, keep_embeddings
from slimtune.adopt import ENCODERS, FAST_PATHS, Switch, WithoutFastPath, adopt
from slimtune.bases import base_of
from slimtune.calling import wrapped
from slimtune.combine import combined
from slimtune.config import PeftConfig
from slimtune.delta import deltas_of
from slimtune.errors import ConfigError, MergeError
from slimtune.frugal import adopt_frugal
from slimtune.fused_head import check_head, is_around, is_fused, put_inside
from slimtune.hub import parted
from slimtune.saving import Saving
from slimtune.storage.peft_format import adapter_folder, read_adapter
from slimtune.unloading import Unloading

_TRAINED_AS_ANY = {
    name: property(lambda self: False) for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
}
"""What trainers ask of a model: transformers' refuses a quantized one that isn't `peft`'s, TRL's cast its adapters."""


def get_peft_model(
    model: Any, peft_config: PeftConfig, adapter_name: str = "default", autocast_adapter_dtype: bool = True
) -> Any:
    """Attach a new adapter to the model, in place, and freeze everything else; gives back the same object.

    Args:
        autocast_adapter_dtype: keep the adapter in float32 where the base is in 16 bits.

    Raises:
        TargetError: a pattern matches nothing, or a module can't be adapted.
        ConfigError: a config that doesn't fit the model.
        AdapterExistsError: the model has an adapter of that name.
    """
    drafted = draft(model, adapter_name, peft_config, autocast_adapter_dtype, strict=True)
    for site, delta in drafted:
        delta.initialise(peft_config, site)
    _add(model, adapter_name, peft_config, drafted)
    return model


def _add(model: Any, name: str, config: Any, drafted: Draft) -> None:
    """Attach an adapter; the first one makes the model a `PeftModel`, freezes it and is active."""
    first = not isinstance(model, PeftModel)
    if first:
        _adopt_root(model)
    attach(model, name, drafted)
    if config.base_model_name_or_path is None:
        base, revision = parted(getattr(model, "name_or_path", None) or "")
        config.base_model_name_or_path, config.revision = base or None, config.revision or revision
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(site.base.fan_in_fan_out for site, _ in drafted)
    model.peft_config[name] = config
    if first:
        model.set_adapter(name, inference_mode=config.inference_mode)


def _adopt_root(model: Any) -> None:
    trained_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    adopt(model, Switch(), PeftModel)
    model.peft_config, model.return_logits, model.kept = {}, False, []
    model.trained_before = trained_before
    for module in model.modules():
        if isinstance(module, ENCODERS) and module is not model:
            adopt(module, model.adapter_switch, WithoutFastPath)
    adopt_frugal(model, model.adapter_switch)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and base_of(head).kind == "linear":
        adopt(head, model.adapter_switch)


class PeftModel(Unloading, Saving):
    """Mixed in front of the class of a model that carries adapters; the model keeps its own class beside.

    Attributes:
        peft_config: the config of each adapter by its name.
        return_logits: in training, a causal model's loss is computed in chunks and its `logits` are None; set this to
            get them.
        kept: the tensors that a merge replaced.
        trained_before: the names of the parameters that needed gradients before the first adapter came.
    """

    adopted_from: ClassVar[type[nn.Module]]

    @staticmethod
    def members(model_type: type[nn.Module]) -> dict[str, Any]:
        """The methods that wrap this model type's own, and what trainers ask of it."""
        return wrapped(model_type) | _TRAINED_AS_ANY | (FAST_PATHS if issubclass(model_type, ENCODERS) else {})

    def __setattr__(self, name: str, value: Any) -> None:
        """As the module's own; a forward of TRL's that runs the layers itself goes inside of what adapters put around.

        Raises:
            ConfigError: it would pass by an adapter on the head.
        """
        if name == "forward" and is_fused(value):
            check_head(self)
            if is_around(self):
                name, value = "instance_forward", put_inside(self, value)
        super().__setattr__(name, value)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, autocast_adapter_dtype: bool = True) -> None:
        """Attach another new adapter, not active yet. Raises: as `get_peft_model`."""
        get_peft_model(self, peft_config, adapter_name, autocast_adapter_dtype)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        low_cpu_mem_usage: bool = False,
        **hub: Any,
    ) -> None:
        """Attach an adapter from disk or the Hub; one of that name takes the stored weights over.

        Args:
            low_cpu_mem_usage: taken as in `peft`; an adapter is always loaded without being initialised first.

        Raises:
            AdapterFileError: the files are missing or damaged.
            BaseMismatchError: the adapter was made for another base.
        """
        folder = adapter_folder(model_id, subfolder, **hub)
        _load(self, adapter_name, folder, None, is_trainable, autocast_adapter_dtype)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: str | Path | None = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        low_cpu_mem_usage: bool = False,
        **hub: Any,
    ) -> Any:
        """The base model with an adapter from disk or the Hub attached, for inference unless `is_trainable`.

        Args:
            low_cpu_mem_usage: taken as in `peft`; an adapter is always loaded without being initialised first.

        Raises:
            AdapterFileError: the files are missing or damaged.
            BaseMismatchError: the adapter was made for another base.
        """
        own: Any = getattr(cls, "adopted_from", None)
        if own is not None and not isinstance(model, nn.Module):
            # The model's own class method, reached through the class of an adopted model.
            return own.from_pretrained(model, **hub)
        if not isinstance(model, nn.Module) or model_id is None:
            raise ConfigError(
                f"from_pretrained takes the base model and then the adapter, found {type(model).__name__} and "
                f"{model_id!r}; to load both at once use AutoPeftModelForCausalLM"
            )
        folder = adapter_folder(model_id, subfolder, **hub)
        _load(model, adapter_name, folder, config, is_trainable, autocast_adapter_dtype)
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, the oldest of the others becomes active.

        Raises:
            AdapterNotFoundError: there is no such adapter.
            MergeError: it is merged.
        """
        self._check_known(adapter_name)
        if adapter_name in self.adapter_switch.merged:
            raise MergeError(f"the adapter '{adapter_name}' is merged into the weights; call unmerge_adapter() first")
        model: Any = self
        for _, module in adopted_modules(model):
            if adapter_name in deltas_of(module):
                del module.deltas[adapter_name]
        del self.peft_config[adapter_name]
        active = tuple(name for name in self.active_adapters if name != adapter_name)
        self.set_adapter(active or tuple(self.peft_config)[:1])

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
    ) -> None:
        """Attach a weighted combination of adapters as a new one: "linear", "svd" or "cat".

        Vectors, biases and whole differences have one combination, their weighted sum; "linear" and "svd" both mean it.

        Raises:
            AdapterNotFoundError, AdapterExistsError: by the names.
            ConfigError: adapters that can't be combined so.
        """
        self._check_known(*adapters)
        config, drafted = combined(self, adapters, weights, adapter_name, combination_type, svd_rank, svd_clamp)
        _add(self, adapter_name, config, drafted)

    def update_and_allocate(self, global_step: int) -> None:
        """Let AdaLoRA share the ranks of the active adapters out anew: after `backward`, before `zero_grad`.

        Args:
            global_step: the number of this step, the first of which is 0.

        Raises:
            ConfigError: an adapter of another method, or no gradients.
        """
        for name in self.active_adapters:
            self.peft_config[name].allocate(attached(self, name), global_step)

    def get_base_model(self) -> Any:
        """The model itself: it is the base, with adapters attached in place."""
        return self


def _load(
    model: Any,
    name: str,
    folder: Path,
    config: PeftConfig | None,
    is_trainable: bool,
    autocast_adapter_dtype: bool,
) -> None:
    config = config or PeftConfig.from_pretrained(folder)
    config.check_readable()
    attach_stored(model, name, config, read_adapter(folder), folder, is_trainable, autocast_adapter_dtype)


def attach_stored(
    model: Any,
    name: str,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    source: str | Path,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
) -> None:
    """Attach an adapter with stored tensors; one of that name takes them over.

    Raises:
        BaseMismatchError: the tensors, which come from `source`, were made for another base.
    """
    keep_embeddings(model, config, tensors)
    config.inference_mode = not is_trainable
    if name in getattr(model, "peft_config", {}):
        fill(attached(model, name), tensors, source)
    else:
        _add(model, name, config, draft_stored(model, name, config, tensors, source, autocast_adapter_dtype))
    if not is_trainable:
        model.eval()
