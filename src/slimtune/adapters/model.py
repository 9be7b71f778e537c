"""A model that carries adapters, under the names of `peft.PeftModel`, and how it comes to carry the first of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers.utils.hub import PushToHubMixin

from slimtune.adapters.activation_memory import adopt_frugal
from slimtune.adapters.adapter import (
    Draft,
    adapter_tensors,
    adopted_modules,
    attach,
    attached,
    conflict,
    detach,
    draft,
    draft_combined,
    draft_stored,
    fill,
    leave_unset,
)
from slimtune.adapters.adopt import (
    ENCODERS,
    FAST_PATHS,
    AdapterState,
    Adopted,
    WithoutFastPath,
    adopt,
    adopt_head,
)
from slimtune.adapters.embeddings import saved_whole, stored_whole, vocabulary_of, warn_of_untrained_rows
from slimtune.adapters.forward import wrapped
from slimtune.adapters.fused_experts import onto_fused_experts
from slimtune.adapters.merge import merge, merge_plain, released, unmerge
from slimtune.adapters.model_views import PeftNames
from slimtune.adapters.read_options import ReadOptions
from slimtune.adapters.requantize import merge_quantized
from slimtune.adapters.stored_keys import on_model
from slimtune.adapters.summary import Summary, parameter_count, summary_of
from slimtune.adapters.trl_forward import check_head, is_around, is_from_trl, on_learned_tokens, put_inside
from slimtune.core.config import PeftConfig
from slimtune.core.constrained import inner_of
from slimtune.core.frozen import deltas_of
from slimtune.errors import ConfigError, listing, warn
from slimtune.methods.adalora import AdaLoraConfig
from slimtune.storage.hub import parted
from slimtune.storage.model_card import write_model_card
from slimtune.storage.peft_format import (
    KEY_PREFIX,
    adapter_folder,
    is_checkpoint,
    key,
    offer_to_trainer,
    read_adapter,
    save_adapter,
)
from slimtune.storage.source import id_on_hub, name_elsewhere

_NOT_QUANTIZED = {
    name: property(lambda self: False) for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
}
"""What trainers ask of a model: transformers' refuses a quantized one that isn't `peft`'s, TRL's cast its adapters."""


_HUB_METHODS = {
    name: getattr(PushToHubMixin, name) for name in ("push_to_hub", "_upload_modified_files", "_get_files_timestamps")
}


def get_peft_model(
    model: Any,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Attach a new adapter to the model, in place, and freeze everything else; gives back the same object.

    On a model that has an adapter of that name, the new one takes its place, which is warned of.

    Args:
        mixed: taken as in `peft`; adapters of several methods go together on any model here.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in 16 bits.
        revision: of the base on the Hub, to be stored with the adapter.
        low_cpu_mem_usage: leave the adapter's parameters on the device "meta", without values, for
            `set_peft_model_state_dict` or `load_adapter` to fill.

    Raises:
        TargetError: a pattern matches nothing, or a module can't be adapted.
        ConfigError: a config that doesn't fit the model.
    """
    replaces = adapter_name in getattr(model, "peft_config", {})
    if replaces:
        warn(
            f"the model has an adapter '{adapter_name}' already, which the new one replaces; choose another name to "
            "keep both, or call unload() first to begin with the base"
        )
    if revision is not None:
        peft_config.revision = revision
    _attach_new(model, peft_config, adapter_name, autocast_adapter_dtype, replaces, low_cpu_mem_usage)
    return model


def _attach_new(
    model: Any, config: PeftConfig, name: str, autocast: bool, replaces: bool = False, unset: bool = False
) -> None:
    drafted = draft(model, name, config, autocast, strict=True, replaces=replaces)
    if unset:
        leave_unset(drafted.placed)
    for site, delta in () if unset else drafted.placed:
        delta.initialise(drafted.config, site)
    warn_of_untrained_rows(model, drafted.placed)
    add_drafted(model, name, config, drafted)


def attach_stored(
    model: Any, name: str, config: Any, tensors: Mapping[str, Tensor], source: str | Path, is_trainable: bool = False,
    autocast_adapter_dtype: bool = True, options: ReadOptions | None = None,
) -> _IncompatibleKeys:  # fmt: skip
    """Attach an adapter with stored tensors, in place of one of that name; gives back missing and unexpected keys.

    Raises:
        BaseMismatchError: the tensors, which come from `source`, were made for another base.
    """
    options = options or ReadOptions()
    tensors = _on_this_model(model, config, tensors, is_trainable, options)
    any_shape = options.ignore_mismatched_sizes
    if name in getattr(model, "peft_config", {}) and _means_the_same(model.peft_config[name], config):
        # In place, so that what was compiled for these tensors still is.
        fill(model, config, attached(model, name), tensors, source, ignore_mismatched_sizes=any_shape)
    else:
        drafted = draft_stored(model, name, config, tensors, source, autocast_adapter_dtype, any_shape)
        add_drafted(model, name, config, drafted)
    if not is_trainable:
        model.eval()
    return _IncompatibleKeys([], [])


def draft_for_inference(model: Any, name: str, config: Any, tensors: Mapping[str, Tensor], source: str | Path) -> Draft:
    """A stored adapter for `add_drafted`, which alone touches the model: it may run in another thread meanwhile.

    Raises:
        BaseMismatchError: the tensors, which come from `source`, were made for another base.
    """
    tensors = _on_this_model(model, config, tensors, False, ReadOptions())
    drafted = draft_stored(model, name, config, tensors, source, True)
    for _, delta in drafted.placed:
        delta.eval()
    return drafted


def _on_this_model(
    model: Any, config: Any, tensors: Mapping[str, Tensor], is_trainable: bool, options: ReadOptions
) -> dict[str, Tensor]:
    """The tensors by the keys that they have on this model, with what the config says of them noted in it."""
    tensors = onto_fused_experts(model, config, on_model(model, tensors, options.key_mapping))
    resized = stored_whole(model, config, tensors)
    if resized:
        config.modules_to_save = [*(getattr(config, "modules_to_save", None) or []), *resized]
    config.inference_mode = not is_trainable
    return tensors


def _means_the_same(one: PeftConfig, other: PeftConfig) -> bool:
    """Whether two configs ask for the same tensors with the same meaning."""
    neutral = dict.fromkeys(("inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"))
    return type(one) is type(other) and one.to_dict() | neutral == other.to_dict() | neutral


def add_drafted(model: Any, name: str, config: Any, drafted: Draft) -> None:
    """Attach an adapter, in place of one of that name; the first one makes the model a `PeftModel` and is active."""
    first = not isinstance(model, PeftModel)
    if first:
        _adopt_root(model)
    elif name in model.peft_config:
        model.adapter_state.check_unmerged(name, "replace")
        detach(model, name)
    attach(model, name, drafted.placed)
    # Nothing can fail any more: the config takes over what it means on this model, as `peft` has it.
    vars(config).update(vars(drafted.config))
    if config.base_model_name_or_path is None:
        base, revision = parted(getattr(model, "name_or_path", None) or "")
        config.base_model_name_or_path, config.revision = name_elsewhere(base) or None, config.revision or revision
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(site.kind == "linear" and site.base.is_transposed for site, _ in drafted.placed)
    model.peft_config[name] = config
    active = model.adapter_state.active
    if not active or name in active:
        model.set_adapter(active or name, inference_mode=config.inference_mode)


def _adopt_root(model: Any) -> None:
    """Freeze the model and make a `PeftModel` of it, still without any adapter."""
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.requires_grad_(False)
    state = AdapterState(trained_before=trained, vocabulary=vocabulary_of(model))
    adopt(model, state, PeftModel)
    for module in model.modules():
        if isinstance(module, ENCODERS) and module is not model:
            adopt(module, state, WithoutFastPath)
    adopt_frugal(model, state)
    adopt_head(model, state)


class PeftModel(PeftNames, Adopted):
    """Mixed in front of the class of a model that carries adapters, which stays the model's class beside.

    All that it knows of its adapters is in `adapter_state`; their tensors are the deltas at its modules. Its `forward`
    and `generate` are the model's own, wrapped in `adapters/forward.py`.
    """

    @staticmethod
    def _members_for(module_type: type[nn.Module]) -> dict[str, Any]:
        fast_paths = FAST_PATHS if issubclass(module_type, ENCODERS) else {}
        # A module of one's own goes to the Hub as transformers' models do.
        hub = {} if hasattr(module_type, "push_to_hub") else _HUB_METHODS
        return wrapped(module_type) | _NOT_QUANTIZED | fast_paths | hub

    def __setattr__(self, name: str, value: Any) -> None:
        """As the module's own; a forward of TRL's that runs the layers itself goes inside of what adapters put around.

        Raises:
            ConfigError: it would pass by an adapter on the head.
        """
        if name == "forward" and is_from_trl(value):
            check_head(self)
            value = on_learned_tokens(self, value)
            if is_around(self):
                name, value = "instance_forward", put_inside(self, value)
        super().__setattr__(name, value)

    # -- Adapters come and go.

    @classmethod
    def from_pretrained(
        cls, model: Any, model_id: str | Path | None = None, adapter_name: str = "default", is_trainable: bool = False,
        config: PeftConfig | None = None, autocast_adapter_dtype: bool = True, subfolder: str | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """The base model with an adapter from disk or the Hub attached, for inference unless `is_trainable`.

        Args:
            options: the Hub's (`revision`, `token`, `cache_dir`, ...), and `peft`'s: `key_mapping`, expressions over
                the file's keys with what to put in their place; `ignore_mismatched_sizes`, to leave tensors of another
                shape alone; where the base or its device decides (`device_map`, `dtype`, ...), they have no effect.

        Raises:
            AdapterFileError: the files are missing or damaged.
            BaseMismatchError: the adapter was made for another base.
        """
        own: Any = getattr(cls, "adopted_from", None)
        if own is not None and not isinstance(model, nn.Module):
            # The model's own class method, reached through the class of an adopted model.
            return own.from_pretrained(model, **options)
        if not isinstance(model, nn.Module) or model_id is None:
            raise ConfigError(
                f"from_pretrained takes the base model and then the adapter, found {type(model).__name__} and "
                f"{model_id!r}; to load both at once use AutoPeftModelForCausalLM"
            )
        loading = ReadOptions.of(options)
        folder = adapter_folder(model_id, subfolder, **loading.hub)
        config = config or PeftConfig.from_pretrained(folder)
        attach_stored(
            model, adapter_name, config, read_adapter(folder), folder, is_trainable, autocast_adapter_dtype, loading
        )
        return model

    def load_adapter(
        self, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False,
        autocast_adapter_dtype: bool = True, subfolder: str | None = None, **options: Any,
    ) -> _IncompatibleKeys:  # fmt: skip
        """Attach an adapter from disk or the Hub, in place of one of that name; gives back missing and unexpected keys.

        Both are empty: a file that lacks a tensor or has others is an error. Arguments are those of `from_pretrained`.
        """
        loading = ReadOptions.of(options)
        folder = adapter_folder(model_id, subfolder, **loading.hub)
        config, tensors = PeftConfig.from_pretrained(folder), read_adapter(folder)
        return attach_stored(self, adapter_name, config, tensors, folder, is_trainable, autocast_adapter_dtype, loading)

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:  # fmt: skip
        """Attach another new adapter, not active yet.

        Raises:
            AdapterExistsError: the model has an adapter of that name.
            TargetError, ConfigError: as `get_peft_model`.
        """
        _attach_new(self, peft_config, adapter_name, autocast_adapter_dtype, unset=low_cpu_mem_usage)

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "svd",
        svd_rank: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Attach a weighted combination of adapters as a new one.

        Vectors, biases and whole differences have one combination, their weighted sum; "linear" and "svd" both mean it.

        Args:
            combination_type: "linear", "svd", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune", or one of
                the last four with "_svd" behind it; see `slimtune.methods.lora.combine`.
            svd_rank: of the result of an "svd"; by default the largest of the adapters'.
            options: `svd_clamp`, `svd_full_matrices`, `svd_driver`, `density`, `majority_sign_method`, as in `peft`.

        Raises:
            AdapterNotFoundError, AdapterExistsError: by the names.
            ConfigError: adapters that can't be combined so.
        """
        self.adapter_state.check_known(*adapters)
        drafted = draft_combined(self, adapters, weights, adapter_name, combination_type, svd_rank, options)
        add_drafted(self, adapter_name, drafted.config, drafted)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, the oldest of the others becomes active.

        Raises:
            AdapterNotFoundError: there is no such adapter.
            MergeError: it is merged.
        """
        self.adapter_state.check_known(adapter_name)
        self.adapter_state.check_unmerged(adapter_name, "delete")
        detach(self, adapter_name)
        del self.peft_config[adapter_name]
        active = tuple(name for name in self.active_adapters if name != adapter_name)
        self.set_adapter(active or tuple(self.peft_config)[:1])

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
            config.allocate([(site, inner_of(delta)) for site, delta in attached(self, name)], global_step)

    # -- Which adapters there are, which are in effect, and what they train.

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of each adapter by its name."""
        return self.adapter_state.configs

    @peft_config.setter
    def peft_config(self, configs: dict[str, PeftConfig]) -> None:
        self.adapter_state.configs = configs

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are in effect, or would be if they weren't disabled."""
        return list(self.adapter_state.active)

    @property
    def active_adapter(self) -> str:
        """The active adapter; the first of several. Raises: ConfigError, after the last one was deleted."""
        if not self.adapter_state.active:
            raise ConfigError("no adapter is active; attach one with add_adapter, or take the base with unload()")
        return self.adapter_state.active[0]

    @property
    def return_logits(self) -> bool:
        """Whether a causal model gives its logits in training: by default its loss is computed in chunks, without."""
        return self.adapter_state.return_logits

    @return_logits.setter
    def return_logits(self, value: bool) -> None:
        self.adapter_state.return_logits = value

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter or several the active ones; these alone are trainable, unless for inference.

        Raises:
            AdapterNotFoundError: there is no adapter of that name.
            ConfigError: two of them train the same module whole.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self.adapter_state.check_known(*names)
        path = conflict(self, names)
        if path is not None:
            what = f"train their own copy of what '{path}' has" if path else "put tokens of their own in front"
            raise ConfigError(
                f"the adapters {listing(names)} each {what} and can't be active together; activate one of them"
            )
        self.adapter_state.active = names
        for _, module in adopted_modules(self):
            for name, delta in deltas_of(module).items():
                for parameter in delta.parameters():
                    parameter.requires_grad = name in names and not inference_mode

    def disable_adapter_layers(self) -> None:
        """The base without its unmerged adapters until `enable_adapter_layers`."""
        self.adapter_state.enabled = False

    def enable_adapter_layers(self) -> None:
        """The active adapters in effect again."""
        self.adapter_state.enabled = True

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The untouched base for a while, also while adapters are merged."""
        state = self.adapter_state
        with state.unmerged(self.unmerge_adapter, self.merge_adapter), state.using(applied=()):
            yield

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(parameter_count(p) for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def coverage(self, adapter_name: str | None = None) -> Summary:
        """Which modules an adapter (the active one) trains, how many of how many; `print` it."""
        name = adapter_name or self.active_adapter
        self.adapter_state.check_known(name)
        return summary_of(self, name)

    def get_base_model(self) -> Any:
        """The model itself: it is the base, with adapters attached in place."""
        return self

    # -- Into the weights and out again, and back to a plain model.

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Write the active adapters (or these) into the weights; `unmerge_adapter` takes them out to the bit.

        Adapters that are merged already stay so, and these come beside them; if all of them are, that is warned of.

        Args:
            safe_merge: compare the outputs before and after on probe inputs.

        Raises:
            MergeError: it can't be done or strays too far; nothing is changed then.
        """
        names, merged = self._chosen(adapter_names), self.adapter_state.merged
        if merged and set(names) <= set(merged):
            said = f"All adapters are already merged, nothing to do ({listing(names)}: merged already)"
            warn(said)
            return
        merge(self, names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the weights back that were there before `merge_adapter`."""
        unmerge(self)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None,
        requantize: bool = False, drift_inputs: Mapping[str, Tensor] | None = None,
    ) -> Any:  # fmt: skip
        """The plain model with the active adapters (or these), and what is merged already, in its weights.

        It is this very object.

        A quantized base becomes a plain one of the model's dtype, also where no adapter is.

        Args:
            progressbar: taken as in `peft`; a merge takes no time to speak of and shows none.
            safe_merge: compare the outputs before and after on probe inputs.
            requantize: leave a quantized base quantized; the merged weights are quantized again, which wipes small
                updates out. What is lost is warned of and kept as the model's `merge_drift`. Of an adapter that was
                trained on a grid (`constraint`) the codes are stored, and nothing is lost.
            drift_inputs: a batch to measure that on, with labels for the loss; without it, pseudo-random inputs.

        Raises:
            MergeError: it can't be done or strays too far; nothing is changed then.
            ConfigError: the base is quantized in a way that can't be expanded.
        """
        if drift_inputs is not None and not requantize:
            raise ConfigError("drift_inputs measure what requantize=True loses; pass both or none")
        names = self._chosen(adapter_names)
        if requantize:
            drift = merge_quantized(self, names, safe_merge, drift_inputs)
            if drift is not None:
                warn(f"merged into quantized weights: {drift}{drift.advice}")
            return self
        return merge_plain(self, names, safe_merge)

    def _chosen(self, adapter_names: Sequence[str] | None) -> tuple[str, ...]:
        """These adapters, or the active ones. Raises: AdapterNotFoundError."""
        names = self.adapter_state.active if adapter_names is None else tuple(adapter_names)
        self.adapter_state.check_known(*names)
        return names

    def unload(self) -> Any:
        """The plain model without any adapter; it is this very object, with its own class and tensors."""
        unmerge(self)
        return released(self)

    # -- On disk.

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None, save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True, state_dict: Mapping[str, Tensor] | None = None, push_to_hub: bool = False,
        **hub: Any,
    ) -> None:  # fmt: skip
        """Write the adapters alone: `default` into the folder, others into subfolders of their names.

        Args:
            save_embedding_layers: whether the base's token embeddings are stored, too: True, False, or "auto" for
                those that were resized after the base was loaded and that the adapter doesn't train.
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
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self.adapter_state.check_known(*names)
        for name in names:
            # Gathering sharded tensors takes part of every process.
            tensors = adapter_tensors(self, name, state_dict)
            tensors |= saved_whole(self, attached(self, name), save_embedding_layers)
            if is_main_process:
                save_adapter(Path(save_directory, "" if name == "default" else name), self._stored(name), tensors)
        if is_main_process:
            self.create_or_update_model_card(save_directory)
        if is_main_process and is_checkpoint(save_directory) and self.active_adapter in names:
            active = self.active_adapter
            offer_to_trainer(save_directory, Path(save_directory, "" if active == "default" else active))
        if push_to_hub:
            model: Any = self
            model.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write the `README.md` that the Hub reads; of one that is there, the text stays."""
        configs = list(self.peft_config.values())
        methods = sorted({str(config.peft_type) for config in configs})
        # A module of one's own has no base on the Hub, whatever its config says.
        base = id_on_hub(configs[0].base_model_name_or_path or "") if hasattr(self, "config") else None
        in_peft = all(config.in_peft for config in configs)
        given = (getattr(config, "constraint", None) for config in configs)
        constraints = [str(constraint) for constraint in given if constraint]
        write_model_card(Path(output_dir), base, methods, configs[0].task_type, in_peft, "; ".join(constraints))

    def _stored(self, name: str) -> dict[str, Any]:
        """The config of an adapter as it is stored."""
        fields = self.peft_config[name].stored_fields() | {"inference_mode": True}
        if fields["task_type"] is None:
            own = self.adopted_from
            fields["auto_mapping"] = {"base_model_class": own.__name__, "parent_library": own.__module__}
        return fields

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As the model's own; an adapter's tensors by their names on disk go into the active adapter.

        That is how transformers' Trainer resumes. Raises: BaseMismatchError.
        """
        placed = [pair for name in self.active_adapters[:1] for pair in attached(self, name)]
        # Most begin with the prefix; what belongs to no single module (virtual tokens, VeRA's projection) doesn't.
        stored = {key(site.name, name) for site, delta in placed for name in delta.to_disk(delta.state_dict())}
        if state_dict and all(name.startswith(KEY_PREFIX) or name in stored for name in state_dict):
            fill(self, self.peft_config[self.active_adapter], placed, on_model(self, state_dict), "the state dict")
            return _IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)
