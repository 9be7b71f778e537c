"""Which of the processes of a run this one is, as torchrun, accelerate and MPI tell it: one of them speaks."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_COUNT = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torchrun reads why a process failed."""
_FOLLOWS = "follows_another"
_SECONDS_BEHIND = 3


@dataclass(frozen=True)
class Process:
    """One of the processes that train together.

    Attributes:
        rank: its number among all of them, from 0.
        local_rank: its number among those of its machine, which is that of its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.rank == 0


def this_process() -> Process:
    """This process; of one alone, rank 0 of 1. Raises: ConfigError, for an environment that says half of it."""
    count = _number(_COUNT)
    # Some schedulers set WORLD_SIZE=1 for whatever they start.
    if count in (None, 1):
        return Process()
    rank, local_rank = _number(_RANK), _number(_LOCAL_RANK)
    if rank is None or local_rank is None:
        raise ConfigError(
            f"WORLD_SIZE says {count} processes, and RANK and LOCAL_RANK don't say which of them this is; start them "
            f"with --launch {count} or with torchrun, or unset WORLD_SIZE"
        )
    return Process(rank, count, local_rank, _number(_LOCAL_COUNT) or 1)


def warn_of_one_process(screen: Console) -> None:
    """Say it where accelerate was to start several processes on the CPU, of which it starts one and says nothing."""
    is_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    # It sets an address for them to meet at, and no numbers.
    if is_on_cpu and "MASTER_ADDR" in os.environ and not any(name in os.environ for name in (*_COUNT, *_RANK)):
        screen.print(
            "[yellow]accelerate launch starts one process on a CPU, whatever its --num_processes says;[/] start "
            "several with --launch N, or with torchrun --nproc_per_node N -m slimtune train ..."
        )


def report_failure(sentence: str, follows: bool = False) -> bool:
    """Hand the sentence to the launcher, if there is one; whether this process is the one to print it as well.

    Args:
        follows: whether another process failed first, whose sentence is the one to read.
    """
    try:
        process = this_process()
    except ConfigError:
        return True
    file = os.environ.get(_ERROR_FILE)
    if process.count == 1 or not file:
        return True
    # In the form of torch.distributed.elastic, whose own writer takes exceptions with their tracebacks.
    reason = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time())), _FOLLOWS: follows}}
    Path(file).write_text(json.dumps({"message": reason}), encoding="utf-8")
    speaks = process.is_main and not follows
    if not speaks:
        # torchrun stops all others when it sees one end: the one that has something to say comes first.
        time.sleep(_SECONDS_BEHIND)
    return speaks


def read_failure(error_file: Any) -> tuple[str, bool]:
    """What a process reported, in torchrun's form: the sentence, and whether another process failed first."""
    reason = error_file.get("message", "") if isinstance(error_file, dict) else ""
    if isinstance(reason, dict):
        return str(reason.get("message", "")), bool(reason.get("extraInfo", {}).get(_FOLLOWS))
    return str(reason), False


def _number(names: tuple[str, ...]) -> int | None:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), None)
