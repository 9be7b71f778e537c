"""The adopted root: a model that carries adapters, under the names of `peft.PeftModel`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune import merge as merging
from slimtune.adopt import BASE, Adopted, Switch, adopt, release
from slimtune.bases import base_of
from slimtune.delta import Delta, PeftConfig, Site
from slimtune.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    BaseMismatchError,
    ConfigError,
    MergeError,
    did_you_mean,
    listing,
)
from slimtune.ops.lazy_logits import LazyLogits
from slimtune.storage import peft_format
from slimtune.targets import resolve


def get_peft_model(
    model: Any, peft_config: PeftConfig, adapter_name: str = "default", autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> Any:  # fmt: skip
    """Attach a new adapter to the model, in place, and freeze everything else; gives back the same object.

    Args:
        autocast_adapter_dtype: keep the adapter in float32 where the base is in 16 bits.
        low_cpu_mem_usage: create the adapter on the meta device, for code that fills it afterwards.

    Raises:
        TargetError: a pattern matches nothing, or a module can't be adapted.
        ConfigError: a config that doesn't fit the model.
        AdapterExistsError: the model has an adapter of that name.
    """
    plan = _plan(model, adapter_name, peft_config, autocast_adapter_dtype, strict=True, meta=low_cpu_mem_usage)
    for _, delta in plan:
        delta.initialise(peft_config)
    _attach(model, adapter_name, peft_config, plan)
    if len(model.peft_config) == 1:
        model.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return model


Plan = list[tuple[Site, Delta]]


def _plan(
    model: Any, adapter_name: str, config: PeftConfig, autocast: bool, strict: bool, meta: bool = False
) -> Plan:
    """All deltas of a new adapter, none attached yet: an error leaves the model as it was."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"an adapter attaches to a torch.nn.Module, found a {type(model).__name__}")
    peft_format.check_adapter_name(adapter_name)
    if adapter_name in getattr(model, "peft_config", {}):
        raise AdapterExistsError(f"the model already has an adapter '{adapter_name}'; choose another name or delete it "
                                 "with delete_adapter")
    targets = resolve(model, config, strict)
    with torch.device("meta") if meta else nullcontext():
        plan = {id(site.module): (site, config.delta_for(site, autocast)) for site in targets.sites}
    for site in targets.whole:
        plan[id(site.module)] = (site, Delta())
        plan[id(site.module)][1].hold_all(site.module)
    for site in targets.biases:
        plan.setdefault(id(site.module), (site, Delta()))[1].hold(site.module, "bias")
    return list(plan.values())


def _attach(model: Any, adapter_name: str, config: PeftConfig, plan: Plan) -> None:
    if not isinstance(model, PeftModel):
        switch = Switch()
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.requires_grad_(False)
        adopt(model, switch, PeftModel)
        model.peft_config, model.return_logits, model.kept = {}, False, []
        model.trained_before = trainable
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None and base_of(type(head)).kind == "linear":
            adopt(head, switch)
    for site, delta in plan:
        delta.train(site.module.training).requires_grad_(False)
        adopt(site.module, model.adapter_switch).deltas[adapter_name] = delta
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    model.peft_config[adapter_name] = config


@dataclass(frozen=True)
class Coverage:
    """What an adapter trains, by the last component of the modules' paths."""

    adapter: str
    rows: dict[str, tuple[int, int, int]]
    """By module name: how many of them are trained, how many there are, trainable parameters."""
    trainable: int
    total: int

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        lines = [f"  {name:<{width}}  {hit:>4} of {there:<4} {parameters:>12,} parameters"
                 for name, (hit, there, parameters) in self.rows.items()]
        share = f"{self.trainable:,} of {self.total:,} parameters are trained ({self.trainable / self.total:.2%})"
        return "\n".join([f"adapter '{self.adapter}':", *lines, share])


class PeftModel:
    """Mixed in front of the class of a model that carries adapters; the model keeps its own class beside.

    `return_logits` (False): in training, a causal model's loss is computed in chunks and its `logits` are None; set it
    to get them.
    """

    adopted_from: ClassVar[type[nn.Module]]
    adapter_switch: Switch
    peft_config: dict[str, PeftConfig]
    return_logits: bool
    kept: merging.Kept
    trained_before: set[str]

    @staticmethod
    def members(model_type: type[nn.Module]) -> dict[str, Any]:
        """The methods that wrap this model type's own; their signatures stay its own."""

        def wrapped(name: str) -> Callable[..., Any]:
            own = getattr(model_type, name)

            @functools.wraps(own)
            def call(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
                function = functools.partial(own, self)
                if name == "forward":
                    function = functools.partial(_forward, self, self.__dict__.get("instance_forward") or function)
                with self._rows(adapter_names):
                    return function(*args, **kwargs)

            return call

        return {name: wrapped(name) for name in ("forward", "generate") if hasattr(model_type, name)}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Adopted.__reduce_ex__(self, protocol)  # type: ignore[arg-type]

    # ---------------------------------------------------------------- which adapters are in effect

    @property
    def active_adapters(self) -> list[str]:
        return list(self.adapter_switch.active)

    @property
    def active_adapter(self) -> str:
        """The active adapter; the first of several."""
        return self.adapter_switch.active[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter or several the active ones; these alone are trainable, unless for inference.

        Raises:
            AdapterNotFoundError: there is no adapter of that name.
            ConfigError: two of them train the same module whole.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        for name in names:
            self._check_known(name)
        deltas = self._deltas()
        for path, _, by_name in deltas:
            if sum(by_name[name].holds for name in names if name in by_name) > 1:
                raise ConfigError(f"the adapters {listing(names)} each train their own copy of '{path}' and can't be "
                                  "active together; activate one of them")
        self.adapter_switch.active = names
        for _, _, by_name in deltas:
            for name, delta in by_name.items():
                for parameter in delta.parameters():
                    parameter.requires_grad = name in names and not inference_mode

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The untouched base for a while, also while adapters are merged."""
        names, merged = self.adapter_switch.merged, bool(self.kept)
        if merged:
            self.unmerge_adapter()
        try:
            with self.adapter_switch.using(enabled=False):
                yield
        finally:
            if merged:
                self.merge_adapter(list(names))

    def disable_adapter_layers(self) -> None:
        """The untouched base until `enable_adapter_layers`."""
        self.adapter_switch.enabled = False

    def enable_adapter_layers(self) -> None:
        self.adapter_switch.enabled = True

    @contextmanager
    def _rows(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        for name in set(adapter_names) - {BASE}:
            self._check_known(name)
        if self.training or self.kept:  # type: ignore[attr-defined]
            raise ConfigError("adapter_names is for inference with unmerged adapters; call model.eval() and "
                              "unmerge_adapter() first")
        with self.adapter_switch.using(rows=tuple(adapter_names)):
            yield

    # ---------------------------------------------------------------- adding, loading, removing

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:  # fmt: skip
        """Attach another new adapter, not active yet. Raises: as `get_peft_model`."""
        get_peft_model(self, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def load_adapter(
        self, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False,
        autocast_adapter_dtype: bool = True, subfolder: str | None = None, **hub: Any,
    ) -> None:  # fmt: skip
        """Attach an adapter from disk or the Hub; one of that name takes the stored weights over.

        Raises:
            AdapterFileError: the files are missing or damaged.
            BaseMismatchError: the adapter was made for another base.
        """
        config = PeftConfig.from_pretrained(model_id, subfolder, **hub)
        _load(self, adapter_name, config, model_id, is_trainable, autocast_adapter_dtype, subfolder, **hub)

    @classmethod
    def from_pretrained(
        cls, model: Any, model_id: Any = None, *args: Any, adapter_name: str = "default", is_trainable: bool = False,
        config: PeftConfig | None = None, autocast_adapter_dtype: bool = True, subfolder: str | None = None,
        low_cpu_mem_usage: bool = False, **hub: Any,
    ) -> Any:  # fmt: skip
        """The base model with an adapter from disk or the Hub attached, for inference unless `is_trainable`.

        Args:
            low_cpu_mem_usage: taken as in `peft`; an adapter is always loaded without being initialised first.

        Raises:
            AdapterFileError: the files are missing or damaged.
            BaseMismatchError: the adapter was made for another base.
        """
        if not isinstance(model, nn.Module):
            # A model's own class method, called on the class of an adopted model.
            own: Any = getattr(cls, "adopted_from", None)
            if own is None:
                raise ConfigError(f"from_pretrained takes the base model first and the adapter second, found a "
                                  f"{type(model).__name__} first; to load both at once use AutoPeftModelForCausalLM")
            return own.from_pretrained(model, *([] if model_id is None else [model_id]), *args, **hub)
        if args:
            adapter_name, *rest = args
            is_trainable = rest[0] if rest else is_trainable
        config = config or PeftConfig.from_pretrained(model_id, subfolder, **hub)
        _load(model, adapter_name, config, model_id, is_trainable, autocast_adapter_dtype, subfolder, **hub)
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. Raises: AdapterNotFoundError; MergeError, while it is merged."""
        self._check_known(adapter_name)
        if adapter_name in self.adapter_switch.merged:
            raise MergeError(f"the adapter '{adapter_name}' is merged into the weights; call unmerge_adapter() first")
        for _, module, by_name in self._deltas():
            if adapter_name in by_name:
                del module.deltas[adapter_name]
        del self.peft_config[adapter_name]
        active = tuple(name for name in self.active_adapters if name != adapter_name)
        self.set_adapter(active or tuple(self.peft_config)[:1])

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "svd",
        svd_rank: int | None = None, svd_clamp: float | None = None,
    ) -> None:  # fmt: skip
        """Attach a weighted combination of adapters as a new one: "linear", "svd" or "cat".

        Raises:
            AdapterNotFoundError, AdapterExistsError: by the names.
            ConfigError: adapters that can't be combined so.
        """
        for name in adapters:
            self._check_known(name)
        if len(adapters) != len(weights) or not adapters:
            raise ConfigError(f"each adapter needs a weight, found {len(adapters)} adapters and {len(weights)} weights")
        how = "linear" if len(adapters) == 1 else combination_type
        options = {"svd_clamp": svd_clamp} if how == "svd" else {}
        sources = {id(module): [(by_name[name], weight) for name, weight in zip(adapters, weights, strict=True)
                                if name in by_name] for _, module, by_name in self._deltas()}
        if any(delta.holds for group in sources.values() for delta, _ in group):
            raise ConfigError("adapters that train whole modules or biases can't be combined; leave out modules_to_save "
                              "and bias")
        config = self._combined_config(adapters, how, svd_rank)
        plan = [(site, delta) for site, delta in _plan(self, adapter_name, config, True, strict=False)
                if sources.get(id(site.module))]
        for site, delta in plan:
            deltas, factors = zip(*sources[id(site.module)], strict=True)
            type(deltas[0]).combine(list(deltas), list(factors), how, delta, **options)
        _attach(self, adapter_name, config, plan)

    def _combined_config(self, adapters: Sequence[str], how: str, svd_rank: int | None) -> Any:
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        if any(type(config) is not type(configs[0]) or not hasattr(config, "rank_pattern") for config in configs):
            raise ConfigError("only adapters of one low-rank method can be combined, found "
                              + listing(str(config.peft_type) for config in configs))
        if len({type(config.target_modules) for config in configs}) > 1:
            raise ConfigError("adapters whose target_modules are names can't be combined with ones that have an "
                              "expression; give all of them names")
        ranks = [max([config.r, *config.rank_pattern.values()]) for config in configs]
        if isinstance(configs[0].target_modules, str):
            targets: Any = "|".join(f"({config.target_modules})" for config in configs)
        else:
            targets = set().union(*(config.target_modules for config in configs))
        rank = sum(ranks) if how == "cat" else (svd_rank or max(ranks))
        # alpha = r and no rsLoRA: the scales are inside the factors now.
        return replace(configs[0], r=rank, lora_alpha=rank, target_modules=targets, rank_pattern={}, alpha_pattern={},
                       use_rslora=False)

    # ---------------------------------------------------------------- merging and leaving

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Write the active adapters (or these) into the weights; `unmerge_adapter` takes them out to the bit.

        Args:
            safe_merge: compare the outputs before and after on probe inputs.

        Raises:
            MergeError: it can't be done or strays too far; nothing is changed then.
        """
        names = self._mergeable(adapter_names)
        self.kept = self._merged(names, safe_merge)

    def _mergeable(self, adapter_names: Sequence[str] | None) -> tuple[str, ...]:
        if self.kept:
            raise MergeError(f"adapters are merged already: {listing(self.adapter_switch.merged)}; call unmerge_adapter() "
                             "first")
        names = self.adapter_switch.active if adapter_names is None else tuple(adapter_names)
        for name in names:
            self._check_known(name)
        return names

    def _merged(self, names: tuple[str, ...], safe: bool) -> merging.Kept:
        def change() -> merging.Kept:
            kept = merging.merge(merging.adopted_modules(self), names)  # type: ignore[arg-type]
            self.adapter_switch.merged = names
            return kept

        before = self.adapter_switch.active
        self.adapter_switch.active = names
        try:
            return merging.safely(self, change)[0] if safe else change()
        except MergeError:
            self.adapter_switch.merged = ()
            raise
        finally:
            self.adapter_switch.active = before

    def unmerge_adapter(self) -> None:
        """Put the weights back that were there before `merge_adapter`."""
        merging.restore(self.kept)
        self.kept, self.adapter_switch.merged = [], ()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> Any:
        """The plain model with the active adapters (or these) in its weights; it is this very object.

        Args:
            progressbar: taken as in `peft`; a merge takes no time to speak of and shows none.
            safe_merge: compare the outputs before and after on probe inputs.

        Raises:
            MergeError: it can't be done or strays too far; nothing is changed then.
        """
        if not self.kept:
            self.merge_adapter(adapter_names, safe_merge)
        merging.untie_if_changed(self)
        self.kept = []
        return self._released()

    def unload(self) -> Any:
        """The plain model without any adapter; it is this very object, with its own class and tensors."""
        if self.kept:
            self.unmerge_adapter()
        return self._released()

    def _released(self) -> Any:
        for _, module in merging.adopted_modules(self):  # type: ignore[arg-type]
            release(module)
        model: Any = self
        trained_before = self.trained_before
        for name in ("peft_config", "return_logits", "kept", "trained_before"):
            delattr(model, name)
        release(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained_before)
        return model

    def get_base_model(self) -> Any:
        """The model itself: it is the base, with adapters attached in place."""
        return self

    # ---------------------------------------------------------------- saving

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None, save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True, state_dict: Mapping[str, Tensor] | None = None, push_to_hub: bool = False,
        **hub: Any,
    ) -> None:  # fmt: skip
        """Write the adapters alone: `default` into the folder, others into subfolders of their names.

        Args:
            state_dict: the model's gathered tensors, where they are sharded.

        Raises:
            AdapterFileError: the disk didn't take it; what was there is unharmed.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle, which can run code when it is read; "
                              "adapters are always written as safetensors")
        if save_embedding_layers not in ("auto", False):
            raise ConfigError("save_embedding_layers=True is not supported: put the embedding into modules_to_save to "
                              "train and save it whole")
        for name in selected_adapters or self.peft_config:
            self._check_known(name)
            # Gathering sharded tensors takes part of every process.
            tensors = adapter_tensors(self, name, state_dict)
            if is_main_process:
                folder = Path(save_directory, "" if name == "default" else name)
                peft_format.save_adapter(folder, self._stored_config(name), tensors)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)  # type: ignore[attr-defined]

    def _stored_config(self, name: str) -> dict[str, Any]:
        fields = self.peft_config[name].to_dict() | {"inference_mode": True}
        if fields["task_type"] is None:
            own = self.adopted_from
            fields["auto_mapping"] = {"base_model_class": own.__name__, "parent_library": own.__module__}
        if any(type(base_of(type(module))).__name__ == "DenseConv1D" and name in by_name
               for _, module, by_name in self._deltas()):
            fields["fan_in_fan_out"] = True
        return fields

    # ---------------------------------------------------------------- looking at it

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        parameters = list(self.parameters())  # type: ignore[attr-defined]
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def coverage(self, adapter_name: str | None = None) -> Coverage:
        """Which modules an adapter (the active one) trains, how many of how many; `print` it."""
        from slimtune.targets import walk

        adapter = adapter_name or self.active_adapter
        self._check_known(adapter)
        rows: dict[str, tuple[int, int, int]] = {}
        for path, _, by_name in self._deltas():
            if adapter in by_name:
                last = path.rpartition(".")[2]
                hit, _, parameters = rows.get(last, (0, 0, 0))
                there = sum(name.rpartition(".")[2] == last for name, _ in walk(self))  # type: ignore[arg-type]
                rows[last] = hit + 1, there, parameters + sum(p.numel() for p in by_name[adapter].parameters())
        return Coverage(adapter, rows, sum(row[2] for row in rows.values()), self.get_nb_trainable_parameters()[1])

    def _deltas(self) -> list[tuple[str, Any, dict[str, Any]]]:
        """All sites that have deltas: (path, module, deltas by adapter)."""
        adopted = merging.adopted_modules(self)  # type: ignore[arg-type]
        return [(path, module, dict(module.deltas.items())) for path, module in adopted if len(module.deltas) > 0]

    def _check_known(self, name: str) -> None:
        if name not in self.peft_config:
            raise AdapterNotFoundError(f"there is no adapter '{name}'; there are {listing(self.peft_config) or 'none'}"
                                       f"{did_you_mean(name, self.peft_config)}")

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the model's own; the inputs are made to need gradients, without which a frozen base would give none."""
        super().gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[misc]
        self.enable_input_require_grads()  # type: ignore[attr-defined]


def _forward(model: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's forward; in training, the loss is computed without the logits of the whole batch."""
    head = _lazy_head(model) if kwargs.get("labels") is not None else None
    if head is None:
        return function(*args, **kwargs)
    with model.adapter_switch.using(lazy_head=head):
        return _without_lazy(function(*args, **kwargs))


def _lazy_head(model: Any) -> nn.Module | None:
    ready = model.training and torch.is_grad_enabled() and not model.return_logits
    if not ready or torch.compiler.is_compiling() or not hasattr(model, "get_output_embeddings"):
        return None
    head = model.get_output_embeddings()
    # A head that is moved or gathered around its call has its weight at hand only during that call.
    usable = isinstance(head, Adopted) and "instance_forward" not in head.__dict__ and not hasattr(head, "unshard")
    return head if usable else None


def _without_lazy(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(value.tensor() if isinstance(value, LazyLogits) else value for value in outputs)
    if not any(isinstance(value, LazyLogits) for value in outputs.values()):
        return outputs
    return type(outputs)(**{key: value for key, value in outputs.items() if not isinstance(value, LazyLogits)})


def _load(
    model: Any, adapter_name: str, config: PeftConfig, model_id: str | Path, is_trainable: bool, autocast: bool,
    subfolder: str | None, **hub: Any,
) -> None:  # fmt: skip
    tensors = peft_format.read_adapter(peft_format.adapter_folder(model_id, subfolder, **hub))
    config.inference_mode = not is_trainable
    if adapter_name in getattr(model, "peft_config", {}):
        plan = [(Site(path, module, base_of(type(module))), by_name[adapter_name])
                for path, module, by_name in model._deltas() if adapter_name in by_name]
        fill(plan, tensors, str(model_id))
    else:
        plan = _plan(model, adapter_name, config, autocast, strict=False)
        fill(plan, tensors, str(model_id))
        _attach(model, adapter_name, config, plan)
    if len(model.peft_config) == 1:
        model.set_adapter(adapter_name, inference_mode=not is_trainable)
    if not is_trainable:
        model.eval()


def _stored(plan: Plan) -> dict[str, Tensor]:
    """The tensors of an adapter by their names on disk."""
    return {f"{peft_format.KEY_PREFIX}{site.name}.{delta.disk_name(name)}": tensor
            for site, delta in plan for name, tensor in (*delta.named_parameters(), *delta.named_buffers())}


def fill(plan: Plan, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy stored tensors into an adapter's deltas, each into its own.

    Raises:
        BaseMismatchError: a tensor is missing, left over or of another shape; nothing is copied then.
    """
    own = _stored(plan)
    missing, strange = own.keys() - tensors.keys(), _strangers(plan, tensors)
    if missing or strange:
        what = f"it lacks {listing(missing, 3)}" if missing else f"it holds {listing(strange, 3)} besides"
        raise BaseMismatchError(f"'{source}' was made for another base or other targets: {what}; "
                                f"{len(own.keys() & tensors.keys())} of {len(own)} tensors match")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise BaseMismatchError(f"'{source}' was made for another base: '{name}' is {tuple(tensors[name].shape)} in "
                                    f"the file and {tuple(tensor.shape)} on this model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _strangers(plan: Plan, tensors: Mapping[str, Tensor]) -> set[str]:
    """Stored tensors that no delta takes; copies of the base's own embeddings, which `peft` may add, are none."""
    strange = tensors.keys() - _stored(plan).keys()
    bases = {f"{peft_format.KEY_PREFIX}{site.name}.base_layer.weight": site.module for site, _ in plan}
    return {name for name in strange
            if name not in bases or not torch.equal(bases[name].get_parameter("weight").cpu(), tensors[name])}


def adapter_tensors(model: Any, adapter_name: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of one adapter by their names on disk, gathered where they are sharded.

    Args:
        state_dict: the model's tensors by name, where its own are not at hand.
    """
    plan: dict[str, Tensor] = {}
    for path, _, by_name in model._deltas():
        if adapter_name in by_name:
            delta = by_name[adapter_name]
            for name, own in (*delta.named_parameters(), *delta.named_buffers()):
                full = state_dict.get(f"{path}.deltas.{adapter_name}.{name}", own) if state_dict else own
                gather = getattr(full, "full_tensor", None)
                plan[f"{peft_format.KEY_PREFIX}{path}.{delta.disk_name(name)}"] = (gather() if gather else full).detach()
    return plan


def get_peft_model_state_dict(
    model: Any, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default",
    unwrap_compiled: bool = False, save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of one adapter by their names on disk, never the base's own embeddings.

    Args:
        unwrap_compiled: the model may be what `torch.compile` gave back.
        save_embedding_layers: taken as in `peft`; embeddings that are trained whole are part of the adapter anyway.

    Raises:
        AdapterNotFoundError: there is no adapter of that name.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    model._check_known(adapter_name)
    return adapter_tensors(model, adapter_name, state_dict)


def set_peft_model_state_dict(
    model: Any, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Copy tensors, by their names on disk, into an adapter. Raises: AdapterNotFoundError, BaseMismatchError."""
    model._check_known(adapter_name)
    plan = [(Site(path, module, base_of(type(module))), by_name[adapter_name])
            for path, module, by_name in model._deltas() if adapter_name in by_name]
    fill(plan, peft_model_state_dict, "the state dict")
