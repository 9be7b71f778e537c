"""The processes of a run: one, or several that share each step, as torchrun and accelerate start them.

The batch of a step is the recipe's however many processes there are: each takes its share of it. All of them compute
the same; the one of rank 0 prints and writes. With one process every function here returns at once.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from slimtune.console.process import Process, this_process
from slimtune.errors import ConfigError, TrainingError
from slimtune.recipe.optimizers import OFFLOADED
from slimtune.recipe.training import TrainSettings

_PATIENCE = timedelta(hours=6)
"""How long the others wait for the one that reads, plans or writes; a process that died ends them before that."""


def check_processes(device: str, settings: TrainSettings) -> None:
    """See that the processes of the run can train together on this kind of device. Raises: ConfigError."""
    process = this_process()
    if process.count == 1:
        if shards():
            raise ConfigError(REFUSED["FSDP alone"])
        return
    share_of(settings)
    if settings.optim == OFFLOADED:
        raise ConfigError(
            f"training.optim={OFFLOADED} keeps its state in main memory for one GPU; for several, offload with FSDP2 "
            "(--launch fsdp2-offload) and leave optim out"
        )
    for variable, why in REFUSED.items():
        if os.environ.get(variable, "").lower() not in ("", "false", "0", "1", "no"):
            raise ConfigError(why)
    if shards() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(REFUSED["FSDP1"])
    if shards() and device == "cpu":
        raise ConfigError(REFUSED["FSDP on a CPU"])
    if device == "mps":
        raise ConfigError("Apple's GPU trains in one process; start it without a launcher, or pass model.device=cpu")
    if device == "cuda" and process.local_count > torch.cuda.device_count():
        raise ConfigError(
            f"there are {process.local_count} processes on this machine, and {torch.cuda.device_count()} GPUs are "
            "visible; start one process for each GPU"
        )


REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed keeps weights and optimizer in a form that the checkpoints of a run "
    "can't hold; shard with FSDP2 (--launch fsdp2), or offload with it (--launch fsdp2-offload)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM replaces the model, so that no adapter can be attached to it; shard "
    "with FSDP2 (--launch fsdp2)",
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism splits the layers that the adapters are attached to; shard with "
    "FSDP2 (--launch fsdp2)",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism splits the texts whose tokens are counted here; shard with "
    "FSDP2 (--launch fsdp2)",
    "ACCELERATE_MIXED_PRECISION": "accelerate's file sets mixed_precision, and a recipe sets the precision by "
    "model.dtype; write mixed_precision: 'no'",
    "FSDP1": "FSDP 1 flattens weights of one type together, and adapters are of another type than their base; set "
    "fsdp_version: 2",
    "FSDP alone": "FSDP divides a model among several processes, and there is one; leave it out, or for one GPU keep "
    f"the optimizer's state in main memory with training.optim={OFFLOADED}",
    "FSDP on a CPU": "FSDP shards a model over GPUs, and the run is on the CPU, where accelerate would copy it to each "
    "process without a word; leave FSDP out, or pass model.device=cuda",
}
"""What a run isn't made for, by the variable in which accelerate says that it is set, with what to do."""


def shards() -> bool:
    """Whether accelerate was told to divide the model among the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def offloads() -> bool:
    """Whether accelerate was told to keep what it divides in main memory."""
    return os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"


def share_of(settings: TrainSettings) -> TrainSettings:
    """The settings with this process's share of a step: fewer batches, or where those don't divide, smaller ones.

    Raises: ConfigError, where the examples of a step don't divide among the processes.
    """
    count = this_process().count
    batches = next(n for n in range(count, 0, -1) if count % n == 0 and settings.gradient_accumulation % n == 0)
    rows = count // batches
    if settings.batch_size % rows:
        examples = settings.batch_size * settings.gradient_accumulation
        raise ConfigError(
            f"the {examples} examples of a step (batch_size x gradient_accumulation) don't divide among {count} "
            f"processes; set them to a multiple of {count}, such as training.batch_size={settings.batch_size} "
            f"training.gradient_accumulation={count}"
        )
    return replace(
        settings,
        batch_size=settings.batch_size // rows,
        gradient_accumulation=settings.gradient_accumulation // batches,
    )


def place_of(model: Any) -> str:
    """The device that a model is trained on: that of its weights, but where they wait on the CPU to be sharded."""
    if shards() and this_process().count > 1:
        from accelerate import PartialState

        state: Any = PartialState()
        return state.device.type
    return str(model.device)


def start(device: str) -> Process:
    """Join the other processes, each on the GPU of its number; what was started before stays."""
    process = this_process()
    if process.count > 1:
        # Sets the device, too, where somebody else has joined them already, as Ray does.
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")
        _host_group()
    return process


def wait() -> None:
    """Wait until all processes are here."""
    if this_process().count > 1:
        _or_sentence(lambda: dist.barrier(_host_group()))


def from_main(value: Any) -> Any:
    """The value that the process of rank 0 has, in all of them."""
    if this_process().count == 1:
        return value
    values = [value]
    _or_sentence(lambda: dist.broadcast_object_list(values, 0, _host_group()))
    return values[0]


def of_all(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    process = this_process()
    if process.count == 1:
        return [value]
    values: list[Any] = [None] * process.count
    _or_sentence(lambda: dist.all_gather_object(values, value, _host_group()))
    return values


def largest(number: int) -> int:
    """The largest of a number that each process has."""
    if this_process().count == 1:
        return number
    tensor = torch.tensor(number)
    _or_sentence(lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, _host_group()))
    return int(tensor)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a process that waited for another one failed because that one is gone."""
    if not isinstance(error, RuntimeError) or this_process().count == 1:
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))


def local(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds: its shard, where it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Any) -> Tensor:
    """A tensor that may be sharded, gathered for the process that writes; all processes call it alike."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    # The others have no use for it, and main memory holds more than one of them would.
    return full.cpu() if this_process().is_main else full.new_empty(0)


def shard_like(full: Tensor, like: Any) -> Any:
    """A whole tensor, divided among the processes as another one of its shape is."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class LostProcessError(TrainingError):
    """Another process of the run has ended, and has said why, or could not."""

    follows_another = True


def lost() -> LostProcessError:
    """The error of a process whose run has lost another one."""
    return LostProcessError(
        f"another one of the {this_process().count} processes has ended, and this one can't go on alone; go on from "
        "the last checkpoint with --resume"
    )


def _or_sentence(collective: Any) -> None:
    try:
        collective()
    except RuntimeError as error:
        if is_lost_connection(error):
            raise lost() from error
        raise


@functools.cache
def _host_group() -> Any:
    """A group over gloo: what is agreed on between steps stays out of the GPUs' queues."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
