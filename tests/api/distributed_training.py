"""Run by torchrun in `test_distributed`: a few steps on every process, and what came of them in a file.

torchrun --nproc_per_node 2 distributed_training.py MODE OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import slimtune
from tensors import adapter_tensors, randomize, trainable
from zoo import LLAMA, VOCABULARY

STEPS, ROWS = 3, 4


def tuned(dtype: torch.dtype) -> Any:
    config = slimtune.LoraConfig(r=4, **LLAMA.options())
    return randomize(slimtune, slimtune.get_peft_model(LLAMA.model().to(dtype), config)).train()


def batches() -> list[torch.Tensor]:
    """The whole batch of each step; a process takes its share of the rows."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, VOCABULARY, (ROWS, 8), generator=generator) for _ in range(STEPS)]


def train(model: Any, rank: int, world: int) -> list[float]:
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    losses = []
    for ids in batches():
        share = ids[rank::world]
        optimizer.zero_grad()
        loss = model(input_ids=share, labels=share).loss
        loss.backward()
        optimizer.step()
        mean = loss.detach().float()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def main(mode: str, output: Path) -> None:
    kind, _, precision = mode.partition("-")
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if kind == "single":
        model = tuned(dtype)
        losses, rank = train(model, 0, 1), 0
    elif kind == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model = tuned(dtype)
        rank = accelerator.process_index
        losses = train(accelerator.prepare(model), rank, accelerator.num_processes)
    else:
        dist.init_process_group("gloo")
        rank, model = dist.get_rank(), tuned(dtype)
        wrapped = sharded(model) if kind == "fsdp" else torch.nn.parallel.DistributedDataParallel(model)
        losses = train(wrapped, rank, dist.get_world_size())
    tensors = adapter_tensors(slimtune, model)
    model.save_pretrained(output / "adapter", is_main_process=rank == 0)
    if rank == 0:
        torch.save(tensors, output / "tensors.pt")
        (output / "losses.json").write_text(json.dumps(losses))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
