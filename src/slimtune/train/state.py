"""The state of a training: trained tensors, random generators, and fingerprints of the base and the examples.

All of it is plain trees of tensors and numbers, as `slimtune.storage.tensor_tree` writes them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map_only

from slimtune.adapters.adapter import adopted_modules
from slimtune.console.process import this_process
from slimtune.core.delta import Delta
from slimtune.core.frozen import deltas_of
from slimtune.errors import BaseMismatchError, listing
from slimtune.train.processes import of_all, shard_like, whole

_SAMPLED_EXAMPLES = 10_000
_SAMPLED_NUMBERS = 64


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, by their names in the model: parameters, and buffers of deltas and norms.

    The frozen start of a delta is among them, so that a run goes on from the very numbers with which it began.
    """
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, Delta | _NormBase):
            tensors |= dict(module.named_buffers(prefix=path))
    return tensors


def trained_state(model: Any) -> dict[str, Any]:
    """The trained tensors, with the methods' own progress, such as AdaLoRA's ranks and their importance."""
    return {
        "tensors": {name: whole(tensor.detach()) for name, tensor in trained_tensors(model).items()},
        "progress": {path: delta.progress() for path, delta in _deltas(model)},
        "configs": {name: config.to_dict() for name, config in _configs(model).items()},
    }


@torch.no_grad()
def load_trained_state(model: Any, state: Mapping[str, Any]) -> None:
    """Restore what `trained_state` returned. Raises: BaseMismatchError, where the model has other tensors."""
    own, tensors = trained_tensors(model), state["tensors"]
    differing = {n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape} | own.keys() ^ tensors
    if differing:
        raise BaseMismatchError(
            f"the checkpoint is of another model: {listing(differing, 3)} differ; resume with the recipe that began it"
        )
    for name, tensor in own.items():
        tensor.copy_(shard_like(tensors[name], tensor))
    for path, delta in _deltas(model):
        delta.restore_progress(state["progress"].get(path, {}))
    for name, config in _configs(model).items():
        now = config.to_dict()
        for field, value in state["configs"].get(name, {}).items():
            # What training itself wrote there: the ranks that AdaLoRA left.
            if now.get(field) != value and hasattr(config, field):
                setattr(config, field, value)


def training_state(trainer: Any) -> dict[str, Any]:
    """The state of a Trainer besides the weights: optimizer, scheduler, random generators of all processes."""
    own, *others = of_all(rng_state(trainer.args.device))
    state = {
        "optimizer": tree_map_only(Tensor, whole, trainer.optimizer.state_dict()),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "random": own,
    }
    return state | ({"random_of_others": others} if others else {})


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Restore an optimizer's state, divided among the processes as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: shard_like(value, parameters[index]) if shape_of(value) == parameters[index].shape else value
            for name, value in own.items()
        }
        for index, own in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})


def shape_of(value: Any) -> torch.Size | None:
    """The shape of a tensor; None for anything else."""
    return value.shape if isinstance(value, Tensor) else None


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators that training draws from."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        # numpy's keys are uint32, of which torch supports little; int64 holds them too.
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def load_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type], device)


def environment() -> dict[str, Any]:
    """Versions and hardware that may change the last digits of a run's numbers."""
    versions: dict[str, Any] = {name: version(name) for name in ("slimtune", "torch", "transformers")}
    versions |= {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    return versions | {"processes": this_process().count}


def fingerprint_of_base(model: nn.Module) -> str:
    """A checksum over names, shapes and sampled numbers of all frozen tensors."""
    changing = set(trained_tensors(model))
    digest = hashlib.sha256()
    frozen = [pair for pair in [*model.named_parameters(), *model.named_buffers()] if pair[0] not in changing]
    for name, tensor in (part for pair in frozen for part in _unwrapped(*pair)):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # Every n-th number: a base of gigabytes takes no longer than a small one.
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLED_NUMBERS)].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of_examples(examples: Any) -> str | None:
    """A checksum over the examples, or an even sample of many; None for a stream."""
    if not isinstance(examples, Sequence) and not hasattr(examples, "__len__"):
        return None
    digest = hashlib.sha256(str(len(examples)).encode())
    for index in range(0, len(examples), max(1, len(examples) // _SAMPLED_EXAMPLES)):
        digest.update(repr(examples[index]).encode())
    return digest.hexdigest()


def _unwrapped(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that it is made of, as torchao's are of codes and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _unwrapped(f"{name}.{inner}", getattr(tensor, inner))


def _deltas(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in adopted_modules(model):
        for name, delta in deltas_of(module).items():
            yield f"{path}:{name}", delta


def _configs(model: Any) -> dict[str, Any]:
    return getattr(model, "peft_config", {})
