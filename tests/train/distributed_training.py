"""Run by torchrun in `test_distributed`: a few steps of each mode on two processes, and what came of them in files.

torchrun --nproc_per_node 2 distributed_training.py OUTPUT MODE...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

import slimtune
from slimtune.data.batches import Encoded, Objective, PadRight
from slimtune.errors import ConfigError
from slimtune.train.checks import LastGood
from slimtune.train.trainer import supervised
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
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def wrapped(kind: str, model: Any) -> Any:
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        return sharded(model)
    return Accelerator(cpu=True).prepare(model)


def waiting_for_eva() -> Any:
    config = slimtune.LoraConfig(r=4, init_lora_weights="eva", **LLAMA.options())
    return slimtune.get_peft_model(LLAMA.model(), config)


def start_by_eva(rank: int, output: Path) -> None:
    """What each process has then, and what it is told where that can't be done."""
    torch.manual_seed(rank)
    model = waiting_for_eva()
    slimtune.initialize_lora_eva_weights(model, eva_batches(rank))
    torch.save(adapter_tensors(slimtune, model), output / f"tensors-{rank}.pt")
    mistakes = {"empty": (waiting_for_eva(), eva_batches(rank) if rank else []),
                "sharded": (sharded(waiting_for_eva()), eva_batches(rank))}  # fmt: skip
    for mistake, (model, batches) in mistakes.items():
        try:
            slimtune.initialize_lora_eva_weights(model, batches)
        except ConfigError as error:
            (output / f"{mistake}-{rank}.txt").write_text(str(error))


def eva_batches(rank: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(10 + rank)
    return [{"input_ids": torch.randint(4, VOCABULARY, (8, 16), generator=generator)}]


def evaluate(output: Path) -> None:
    """Seven examples of uneven lengths in batches of two: the last ones are filled up with some that were seen."""
    rows = [Encoded([5, 6, 7, 8, 9, 10, 11, 12][: 2 + n], [-100, 6, 7, 8, 9, 10, 11, 12][: 2 + n]) for n in range(7)]
    model = tuned(torch.float32)
    arguments = TrainingArguments(
        output_dir=str(output), per_device_eval_batch_size=2, use_cpu=True, report_to="none", prediction_loss_only=True,
        label_names=["labels"], remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    collate = PadRight(0)
    trainer = supervised(Objective(collate)).trainer(
        model=model, args=arguments, eval_dataset=rows, last_good=LastGood(model, False), checkpointer=None
    )
    found = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        alone = [float(model(**collate([row])).loss) * row.learned for row in rows]
    if dist.get_rank() == 0:
        (output / "losses.json").write_text(json.dumps([found, sum(alone) / sum(row.learned for row in rows)]))


def run(mode: str, output: Path) -> None:
    """One mode; the process of rank 0 writes the losses and the tensors, and the adapter as users save it."""
    kind, _, precision = mode.partition("-")
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "eva":
        start_by_eva(rank, output)
        return
    if kind == "evaluation":
        evaluate(output)
        return
    model = tuned(torch.bfloat16 if precision == "bf16" else torch.float32)
    losses = train(model, 0, 1) if kind == "single" else train(wrapped(kind, model), rank, world)
    tensors = adapter_tensors(slimtune, model)
    model.save_pretrained(output / "adapter", is_main_process=rank == 0)
    if rank == 0:
        torch.save(tensors, output / "tensors.pt")
        (output / "losses.json").write_text(json.dumps(losses))
    dist.barrier()


def main(output: Path, modes: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for mode in modes:
        (output / mode).mkdir(exist_ok=True)
        run(mode, output / mode)
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may outlive the interpreter's teardown, which aborts the process after its work is done.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
