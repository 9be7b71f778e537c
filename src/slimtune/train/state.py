"""What a training run is made of at the end of a step, taken out and put back to the bit."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from slimtune.adapter import adopted_modules
from slimtune.delta import Delta, deltas_of
from slimtune.errors import BaseMismatchError, listing

_SAMPLED_EXAMPLES = 10_000
_SAMPLED_NUMBERS = 64


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, by their names in the model: parameters, and what deltas and norms keep.

    The frozen start of a delta is among them, so that a run goes on from the very numbers with which it began.
    """
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, Delta | _NormBase):
            found |= dict(module.named_buffers(prefix=path))
    return found


def weights_of(model: Any) -> dict[str, Any]:
    """What has been learned, with what the methods go by: AdaLoRA's ranks and their importance."""
    return {
        "tensors": {name: tensor.detach() for name, tensor in learned(model).items()},
        "progress": {path: delta.progress() for path, delta in _deltas(model)},
        "configs": {name: config.to_dict() for name, config in _configs(model).items()},
    }


@torch.no_grad()
def restore_weights(model: Any, stored: Mapping[str, Any]) -> None:
    """Put back what `weights_of` gave. Raises: BaseMismatchError, where the model has other tensors."""
    own, tensors = learned(model), stored["tensors"]
    differing = {n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape} | own.keys() ^ tensors
    if differing:
        raise BaseMismatchError(
            f"the checkpoint is of another model: {listing(differing, 3)} differ; resume with the recipe that began it"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    for path, delta in _deltas(model):
        delta.restore_progress(stored["progress"].get(path, {}))
    for name, config in _configs(model).items():
        now = config.to_dict()
        for field, value in stored["configs"].get(name, {}).items():
            # What training itself wrote there: the ranks that AdaLoRA left.
            if now.get(field) != value and hasattr(config, field):
                setattr(config, field, value)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators that training draws from."""
    kind, keys, *rest = np.random.get_state()
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        found[device.type] = torch.get_device_module(device).get_rng_state(device)
    return found


def restore_random_state(stored: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    kind, keys, *rest = stored["numpy"]
    random.setstate(stored["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(stored["cpu"])
    if device.type in stored and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(stored[device.type], device)


def fingerprint_of_base(model: nn.Module) -> str:
    """A checksum over names, shapes and some numbers of all that stays frozen."""
    changing = set(learned(model))
    digest = hashlib.sha256()
    frozen = [pair for pair in [*model.named_parameters(), *model.named_buffers()] if pair[0] not in changing]
    for name, tensor in (part for pair in frozen for part in _plain(*pair)):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _SAMPLED_NUMBERS)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that it is made of, as torchao's are of codes and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{inner}", getattr(tensor, inner))


def fingerprint_of_examples(examples: Any) -> str | None:
    """A checksum over the examples, or as many of them as take no time; None for a stream, which can't be counted."""
    if not isinstance(examples, Sequence) and not hasattr(examples, "__len__"):
        return None
    digest = hashlib.sha256(str(len(examples)).encode())
    for index in range(0, len(examples), max(1, len(examples) // _SAMPLED_EXAMPLES)):
        digest.update(repr(examples[index]).encode())
    return digest.hexdigest()


def _deltas(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in adopted_modules(model):
        for name, delta in deltas_of(module).items():
            yield f"{path}:{name}", delta


def _configs(model: Any) -> dict[str, Any]:
    return getattr(model, "peft_config", {})
