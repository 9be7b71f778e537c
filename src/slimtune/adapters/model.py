"""The adopted root: a model that carries adapters, under the names of `peft.PeftModel`."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from slimtune.adapters import merge as merging
from slimtune.adapters.activation_memory import adopt_frugal
from slimtune.adapters.adapter import (
    Draft,
    adapter_tensors,
    adopted_modules,
    attach,
    attached,
    draft,
    draft_stored,
    fill,
    keep_embeddings,
)
from slimtune.adapters.adopt import ENCODERS, FAST_PATHS, AdapterState, Adopted, WithoutFastPath, adopt, release
from slimtune.adapters.forward import wrapped
from slimtune.adapters.requantize import merge_requantized
from slimtune.adapters.summary import Coverage, count_of, coverage
from slimtune.adapters.trl_forward import check_head, is_around, is_fused, put_inside
from slimtune.bases import base_of
from slimtune.core.config import PeftConfig
from slimtune.core.delta import deltas_of
from slimtune.errors import AdapterNotFoundError, ConfigError, MergeError, did_you_mean, listing
from slimtune.methods.adalora import AdaLoraConfig
from slimtune.quantization.dequantize import expanded, make_plain, plain_dtype, untie_if_changed
from slimtune.storage.hub import parted
from slimtune.storage.peft_format import (
    KEY_PREFIX,
    adapter_folder,
    is_checkpoint,
    offer_to_trainer,
    read_adapter,
    save_adapter,
)
from slimtune.storage.quantization_metadata import mend_saving


class Carrying(Adopted):
    """What a `PeftModel` knows of its adapters; its attributes are told there."""

    adopted_from: ClassVar[type[nn.Module]]
    peft_config: dict[str, PeftConfig]
    return_logits: bool
    kept: merging.Kept
    trained_before: set[str]

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are in effect, or would be if they weren't disabled."""
        return list(self.adapter_state.active)

    @property
    def active_adapter(self) -> str:
        """The active adapter; the first of several."""
        return self.adapter_state.active[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the active adapter."""
        return self.peft_config[self.active_adapter]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter or several the active ones; these alone are trainable, unless for inference.

        Raises:
            AdapterNotFoundError: there is no adapter of that name.
            ConfigError: two of them train the same module whole.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self._check_known(*names)
        model: Any = self
        modules = adopted_modules(model)
        for path, module in modules:
            own = deltas_of(module)
            together = [own[name] for name in names if name in own]
            if any(one.excludes(other) for one, other in itertools.combinations(together, 2)):
                what = f"train their own copy of what '{path}' has" if path else "put tokens of their own in front"
                raise ConfigError(
                    f"the adapters {listing(names)} each {what} and can't be active together; activate one of them"
                )
        self.adapter_state.active = names
        for _, module in modules:
            for name, delta in deltas_of(module).items():
                for parameter in delta.parameters():
                    parameter.requires_grad = name in names and not inference_mode

    def disable_adapter_layers(self) -> None:
        """The base without its unmerged adapters until `enable_adapter_layers`."""
        self.adapter_state.enabled = False

    def enable_adapter_layers(self) -> None:
        """The active adapters in effect again."""
        self.adapter_state.enabled = True

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        model: Any = self
        parameters = list(model.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(count_of(p) for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def coverage(self, adapter_name: str | None = None) -> Coverage:
        """Which modules an adapter (the active one) trains, how many of how many; `print` it."""
        name = adapter_name or self.active_adapter
        self._check_known(name)
        return coverage(self, name)

    def _check_known(self, *names: str) -> None:
        for name in names:
            if name not in self.peft_config:
                raise AdapterNotFoundError(
                    f"there is no adapter '{name}'; there are {listing(self.peft_config) or 'none'}"
                    f"{did_you_mean(name, self.peft_config)}"
                )


_ADVICE = (
    "; most of the update is rounded away: merge into 16 bits, or for a model in few bits merge into the original "
    "16-bit base and quantize what that gives"
)


class Unloading(Carrying):
    """What a `PeftModel` can do to become a plain model."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The untouched base for a while, also while adapters are merged."""
        merged = self.adapter_state.merged
        self.unmerge_adapter()
        try:
            with self.adapter_state.using(enabled=False):
                yield
        finally:
            if merged:
                self.merge_adapter(merged)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Write the active adapters (or these) into the weights; `unmerge_adapter` takes them out to the bit.

        Args:
            safe_merge: compare the outputs before and after on probe inputs.

        Raises:
            MergeError: it can't be done or strays too far; nothing is changed then.
        """
        self._merge(adapter_names, safe_merge)

    def _merge(self, adapter_names: Sequence[str] | None, safe: bool, dtype: torch.dtype | None = None) -> None:
        names = self.adapter_state.active if adapter_names is None else tuple(adapter_names)
        self._check_known(*names)
        if self.kept:
            merged = listing(self.adapter_state.merged)
            raise MergeError(f"adapters are merged already: {merged}; call unmerge_adapter() first")
        self.kept = merging.merge(self, names, safe, dtype)

    def unmerge_adapter(self) -> None:
        """Put the weights back that were there before `merge_adapter`."""
        merging.restore(self.kept)
        self.kept, self.adapter_state.merged = [], ()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        requantize: bool = False,
        drift_inputs: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The plain model with the active adapters (or these) in its weights; it is this very object.

        A quantized base becomes a plain one of the model's dtype, also where no adapter is.

        Args:
            progressbar: taken as in `peft`; a merge takes no time to speak of and shows none.
            safe_merge: compare the outputs before and after on probe inputs.
            requantize: leave a quantized base quantized; the merged weights are quantized again, which wipes small
                updates out. What is lost is warned of and kept as the model's `merge_drift`.
            drift_inputs: a batch to measure that on, with labels for the loss; without it, pseudo-random inputs.

        Raises:
            MergeError: it can't be done or strays too far; nothing is changed then.
            ConfigError: the base is quantized in a way that can't be expanded.
        """
        if drift_inputs is not None and not requantize:
            raise ConfigError("drift_inputs measure what requantize=True loses; pass both or none")
        names = self.adapter_state.merged or adapter_names
        if requantize:
            return self._merged_requantized(names, safe_merge, drift_inputs)
        dtype = plain_dtype(self)
        was_merged = bool(self.kept)
        if not was_merged:
            self._merge(names, safe_merge, dtype)
        try:
            weights = expanded(self, dtype)
        except BaseException:
            if not was_merged:
                self.unmerge_adapter()
            raise
        untie_if_changed(self)
        return make_plain(self._released(), weights)

    def _merged_requantized(self, names: Sequence[str] | None, safe: bool, inputs: Mapping[str, Tensor] | None) -> Any:
        merged = self.adapter_state.merged
        chosen = self.adapter_state.active if names is None else tuple(names)
        self._check_known(*chosen)
        self.unmerge_adapter()
        try:
            self.kept, drift = merge_requantized(self, chosen, safe, inputs)
        except BaseException:
            if merged:
                self.merge_adapter(merged)
            raise
        untie_if_changed(self)
        model = self._released()
        mend_saving(model)
        model.merge_drift = drift
        warnings.warn(f"merged into quantized weights: {drift}{_ADVICE if drift.survived < 0.5 else ''}", stacklevel=3)
        return model

    def unload(self) -> Any:
        """The plain model without any adapter; it is this very object, with its own class and tensors."""
        self.unmerge_adapter()
        return self._released()

    def _released(self) -> Any:
        model: Any = self
        trained_before = self.trained_before
        for _, module in adopted_modules(model):
            release(module)
        for name in ("peft_config", "return_logits", "kept", "trained_before"):
            delattr(model, name)
        # That of another merge, before these adapters came.
        vars(model).pop("merge_drift", None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained_before)
        return model


class Saving(Carrying):
    """What a `PeftModel` writes in place of the model's own weights."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Write the adapters alone: `default` into the folder, others into subfolders of their names.

        Args:
            state_dict: the model's gathered tensors, where they are sharded.
            hub: what transformers' `push_to_hub` takes.

        Raises:
            AdapterFileError: the disk didn't take it; what was there is unharmed.
        """
        if not safe_serialization:
            raise ConfigError(
                "safe_serialization=False would write a pickle, which can run code when it is read; adapters are "
                "always written as safetensors"
            )
        _check_embeddings(save_embedding_layers)
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self._check_known(*names)
        for name in names:
            # Gathering sharded tensors takes part of every process.
            tensors = adapter_tensors(self, name, state_dict)
            if is_main_process:
                save_adapter(Path(save_directory, "" if name == "default" else name), self._stored(name), tensors)
        if is_main_process and is_checkpoint(save_directory) and self.active_adapter in names:
            active = self.active_adapter
            offer_to_trainer(save_directory, Path(save_directory, "" if active == "default" else active))
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """As the model's own; an adapter's tensors by their names on disk go into the active adapter.

        That is how transformers' Trainer resumes. Raises: BaseMismatchError.
        """
        stored = adapter_tensors(self, self.active_adapter) if "prompt_embeddings" in state_dict else {}
        if state_dict and all(name.startswith(KEY_PREFIX) or name in stored for name in state_dict):
            set_peft_model_state_dict(self, state_dict, self.active_adapter)
            return _IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]

    def _stored(self, name: str) -> dict[str, Any]:
        """The config of an adapter as it is stored."""
        fields = self.peft_config[name].stored_fields() | {"inference_mode": True}
        if fields["task_type"] is None:
            own = self.adopted_from
            fields["auto_mapping"] = {"base_model_class": own.__name__, "parent_library": own.__module__}
        return fields


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter by their names on disk. Raises: AdapterNotFoundError, ConfigError."""
    _check_embeddings(save_embedding_layers)
    model._check_known(adapter_name)
    return adapter_tensors(model, adapter_name, state_dict)


def set_peft_model_state_dict(
    model: Any, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Copy tensors, by their names on disk, into an adapter. Raises: AdapterNotFoundError, BaseMismatchError."""
    model._check_known(adapter_name)
    fill(attached(model, adapter_name), peft_model_state_dict, "the state dict")


def _check_embeddings(save_embedding_layers: str | bool) -> None:
    if save_embedding_layers not in ("auto", False):
        raise ConfigError(
            "to save an embedding, train it: put it into modules_to_save; found "
            f"save_embedding_layers={save_embedding_layers!r}"
        )


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
        config.fan_in_fan_out = any(site.kind == "linear" and site.base.is_transposed for site, _ in drafted)
    model.peft_config[name] = config
    if first:
        model.set_adapter(name, inference_mode=config.inference_mode)


def _adopt_root(model: Any) -> None:
    trained_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    adopt(model, AdapterState(), PeftModel)
    model.peft_config, model.return_logits, model.kept = {}, False, []
    model.trained_before = trained_before
    for module in model.modules():
        if isinstance(module, ENCODERS) and module is not model:
            adopt(module, model.adapter_state, WithoutFastPath)
    adopt_frugal(model, model.adapter_state)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and base_of(head).kind == "linear":
        adopt(head, model.adapter_state)


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
        if adapter_name in self.adapter_state.merged:
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
            config = self.peft_config[name]
            if not isinstance(config, AdaLoraConfig):
                raise ConfigError(
                    f"{config.peft_type} adapters keep their ranks while training; AdaLoRA's are shared out anew"
                )
            config.allocate(attached(self, name), global_step)

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


def combined(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    how: str,
    svd_rank: int | None,
    svd_clamp: float | None,
) -> tuple[Any, Draft]:
    """The config and the deltas of sum_i w_i adapter_i, not attached yet.

    Raises:
        ConfigError: adapters that can't be combined so.
        AdapterExistsError: the name is taken.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ConfigError(f"each adapter needs a weight, found {len(adapters)} adapters and {len(weights)} weights")
    how = "linear" if len(adapters) == 1 else how
    config = _config([model.peft_config[adapter] for adapter in adapters], how, svd_rank)
    sources: dict[int, list[tuple[Any, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for site, delta in attached(model, adapter):
            sources.setdefault(id(site.module), []).append((delta, weight))
    if any(delta.holds for group in sources.values() for delta, _ in group):
        raise ConfigError(
            "adapters that train whole modules or biases can't be combined; leave out modules_to_save and bias"
        )
    drafted = [(s, d) for s, d in draft(model, name, config, True, strict=False) if id(s.module) in sources]
    options = {"svd_clamp": svd_clamp} if how == "svd" else {}
    for site, target in drafted:
        deltas, factors = zip(*sources[id(site.module)], strict=True)
        type(deltas[0]).combine(list(deltas), list(factors), how, target, site, **options)
    return config, drafted


def _config(configs: Sequence[Any], how: str, svd_rank: int | None) -> Any:
    if any(type(config) is not type(configs[0]) for config in configs):
        found = listing(str(config.peft_type) for config in configs)
        raise ConfigError(f"only adapters of one method can be combined, found {found}")
    return configs[0].combined(configs[1:], how, svd_rank)
