"""Starts a command in several processes, by torchrun or `accelerate launch`: what `slimtune train --launch` names.

--launch 4                          four processes on this machine, a copy of the model in each
--launch fsdp2                      as one of the files in `launches/` says, on all GPUs of this machine
--launch "fsdp2 --num_processes 4"  on four of them; other options of accelerate launch may follow, too
--launch accelerate.yaml            as a file of accelerate says
--launch "torchrun --nnodes 2 ..."  as torchrun's own options say, or those of "accelerate launch ..."
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimtune.console.process import read_failure, this_process
from slimtune.console.screen import one_line, say
from slimtune.errors import ConfigError, did_you_mean, first_line, listing
from slimtune.storage.text_files import is_yaml, read_mapping
from slimtune.train.processes import REFUSED

TORCHRUN, ACCELERATE = "torchrun", "accelerate launch"
FOLDER = Path(__file__).with_name("launches")
SHIPPED = tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))
"""The files of accelerate that ship, by name."""
_PROCESSES = "--num_processes"
_SECONDS_TO_STOP = 120
"""How long torchrun waits for the processes to finish a step and write a checkpoint before it kills them."""


@dataclass(frozen=True)
class Launch:
    """What a way to start processes comes to.

    Attributes:
        program: torchrun or accelerate launch.
        options: of that program.
        processes: of all machines; None where torchrun's options say it, or the GPUs of this machine do.
        shards: whether they divide the model among them (FSDP2), rather than hold a copy each (DDP).
        offloads: whether what is sharded waits in main memory.
        regathers: whether a sharded block is gathered anew for the backward pass, and not held until then.
    """

    program: str
    options: tuple[str, ...]
    processes: int | None = None
    machines: int = 1
    shards: bool = False
    offloads: bool = False
    regathers: bool = True


def read_launch(how: str) -> Launch:
    """Read what `--launch` names. Raises: ConfigError, for what can't start a training here."""
    words = shlex.split(how)
    if how.isdecimal() and int(how) > 0:
        return Launch(TORCHRUN, ("--standalone", "--nproc_per_node", how), int(how))
    if words and words[0] in SHIPPED:
        return _of_shipped(words[0], words[1:])
    if is_yaml(how):
        return _of_file(Path(how))
    if words[:1] == [TORCHRUN]:
        return Launch(TORCHRUN, tuple(words[1:]))
    if words[:2] == ACCELERATE.split():
        return Launch(ACCELERATE, tuple(words[2:]))
    near = did_you_mean(how.partition(" ")[0], [TORCHRUN, "accelerate", *SHIPPED])
    raise ConfigError(
        f"--launch takes a number of processes, {listing(SHIPPED)}, a file of accelerate (.yaml), or the beginning "
        f'of a command such as "torchrun --nproc_per_node 4", found {how!r}{near}'
    )


def with_processes(how: str, processes: int) -> str:
    """What `--launch` names, with another number of processes."""
    chosen = read_launch(how)
    if chosen.processes == processes:
        return how
    words = shlex.split(how)
    if words[0] in SHIPPED:
        return f"{words[0]} {_PROCESSES} {processes}"
    return f"{ACCELERATE} --config_file {how} {_PROCESSES} {processes}" if is_yaml(how) else how


def _of_shipped(name: str, options: list[str]) -> Launch:
    """One of the files that ship, with options of accelerate launch behind. Raises: ConfigError."""
    file = FOLDER / f"{name}.yaml"
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(_PROCESSES, dest="processes")
    given = parser.parse_known_args(options)[0].processes
    if given is not None and not (given.isdecimal() and int(given) > 1):
        raise ConfigError(f"--launch {name} divides a model: {_PROCESSES} must be at least 2, found {given!r}")
    of_file = _of_file(file, ships=True)
    return replace(of_file, options=(*of_file.options, *options), processes=None if given is None else int(given))


def _of_file(file: Path, ships: bool = False) -> Launch:
    """What a file of accelerate says; one that ships leaves the number of processes open. Raises: ConfigError."""
    if not file.is_file():
        raise ConfigError(
            f"accelerate's file {file} is not there; accelerate config writes one, and {listing(SHIPPED)} ship"
        )
    settings = read_mapping(file)
    if _KEYS.isdisjoint(settings):
        raise ConfigError(
            f"{file} is no file of accelerate (it has {listing(settings, 3) or 'nothing'}, and none of "
            f"{listing(sorted(_KEYS), 5)}); accelerate config writes one, and {listing(SHIPPED)} ship"
        )
    kind, processes = str(settings.get("distributed_type", "NO")).upper(), _whole(file, settings, "num_processes")
    for key, variable in _KINDS.items():
        if kind == key:
            raise ConfigError(f"{file}: {REFUSED[variable]}")
    parallel = settings.get("parallelism_config") or {}
    for key, variable in _PARALLEL.items():
        if _whole(file, parallel, key) > 1:
            raise ConfigError(f"{file}: {REFUSED[variable]}")
    if str(settings.get("mixed_precision", "no")).lower() not in ("no", "false"):
        raise ConfigError(f"{file}: {REFUSED['ACCELERATE_MIXED_PRECISION']}")
    fsdp = {key.removeprefix("fsdp_"): value for key, value in (settings.get("fsdp_config") or {}).items()}
    # A file without the key is of version 1, as accelerate reads it.
    if kind == "FSDP" and _whole(file, fsdp, "version") != 2:
        raise ConfigError(f"{file}: {REFUSED['FSDP1']}")
    if kind == "FSDP" and processes < 2 and not ships:
        raise ConfigError(f"{file}: {REFUSED['FSDP alone']}")
    return Launch(
        ACCELERATE,
        ("--config_file", str(file)),
        processes,
        machines=_whole(file, settings, "num_machines"),
        shards=kind == "FSDP",
        offloads=_is_true(fsdp.get("offload_params", False)),
        regathers=_is_true(fsdp.get("reshard_after_forward", True)),
    )


_KEYS = {"compute_environment", "distributed_type", "num_processes", "mixed_precision", "parallelism_config"}
_KINDS = {"DEEPSPEED": "ACCELERATE_USE_DEEPSPEED", "MEGATRON_LM": "ACCELERATE_USE_MEGATRON_LM"}
_PARALLEL = {
    "parallelism_config_tp_size": "PARALLELISM_CONFIG_TP_SIZE",
    "parallelism_config_cp_size": "PARALLELISM_CONFIG_CP_SIZE",
}


def launch(how: str, arguments: list[str], device: str) -> int:
    """Run `slimtune ARGUMENTS` in the processes that `how` names, to their end; the exit code.

    Args:
        device: kind of device of the run, such as "cuda" or "cpu".

    Raises: ConfigError, for more processes than devices, or sharding on a CPU.
    """
    if this_process().count > 1:
        raise ConfigError(
            f"--launch starts processes, and this is one of {this_process().count} already; leave --launch out"
        )
    chosen = _on_all_devices(read_launch(how), device)
    check_devices(chosen, device)
    if chosen.program == ACCELERATE and device == "cpu" and (chosen.processes or 0) > 1:
        # On a CPU accelerate starts one process whatever the number says.
        chosen = Launch(TORCHRUN, ("--standalone", "--nproc_per_node", str(chosen.processes)), chosen.processes)
    _prepare_environment(chosen)
    return start(chosen, ["-m", "slimtune", *arguments])


def _on_all_devices(chosen: Launch, device: str) -> Launch:
    """The same with as many processes as there are devices here, where a file that ships leaves it open."""
    if chosen.program != ACCELERATE or chosen.processes is not None or device == "cpu":
        return chosen
    import torch

    visible = torch.get_device_module(device).device_count()
    if visible < 2:
        raise ConfigError(REFUSED["FSDP alone"])
    return replace(chosen, options=(*chosen.options, _PROCESSES, str(visible)), processes=visible)


def check_devices(chosen: Launch, device: str) -> None:
    """See that this machine has a device for each process. Raises: ConfigError."""
    if device == "cpu":
        if chosen.shards:
            raise ConfigError(REFUSED["FSDP on a CPU"])
        return
    if chosen.processes is None:
        return
    import torch

    here, visible = chosen.processes // chosen.machines, torch.get_device_module(device).device_count()
    # Here and not by torchrun, whose processes would each fail on their own with a CUDA error.
    if here > visible:
        raise ConfigError(
            f"--launch asks for {here} processes on this machine, and {visible} GPUs are visible; pass --launch "
            f"{visible}"
        )


def _prepare_environment(chosen: Launch) -> None:
    """Set what the processes inherit, but for what the user has set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = max(1, (chosen.processes or 1) // chosen.machines)
    # torchrun sets 1 where nothing is set, which leaves most cores idle; all of them for each would be far too many.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // here)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SECONDS_TO_STOP))
    # What torchrun logs of signals and of processes that failed is said in a sentence here.
    logging.disable(logging.ERROR)


def start(chosen: Launch, command: list[str]) -> int:
    """Start a Python command in the processes and wait for them; the exit code.

    Where one of them failed and could not say why, a sentence says so.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        if chosen.program == TORCHRUN:
            from torch.distributed import run as torchrun

            torchrun.run(_parsed(chosen, torchrun.parse_args, command))
        else:
            from accelerate.commands.launch import launch_command, launch_command_parser

            launch_command(_parsed(chosen, launch_command_parser().parse_args, command))
    except ChildFailedError as error:
        return _explain(error)
    except SignalException as error:
        # As shells have it: 130 for Ctrl-C, 143 for SIGTERM.
        return 128 + int(error.sigval)
    except subprocess.CalledProcessError as error:
        # The one process of accelerate's simple launcher, which has said why.
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{chosen.program} refuses these options: {first_line(error)}") from error
    return 0


def _parsed(chosen: Launch, parse: Callable[[list[str]], Any], command: list[str]) -> Any:
    """The options as the program reads them. Raises: ConfigError, with what it says of wrong ones."""
    said = io.StringIO()
    try:
        # argparse prints its usage and ends the process; of that one sentence is kept.
        with redirect_stderr(said):
            return parse([*chosen.options, *command])
    except SystemExit as error:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise ConfigError(f"{chosen.program} refuses these options: {reason or 'see its --help'}") from error


def _explain(error: Any) -> int:
    """Say why the processes ended, unless the first of them has said it; the exit code."""
    rank, failure = min(error.failures.items(), key=_order)
    sentence, follows = read_failure(failure.error_file_data)
    if failure.exitcode < 0 or not sentence:
        ended = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
        say(
            f"slimtune: process {rank} of the run {ended}, and the others were stopped; what it was at is above, and a "
            "kill is often for want of memory; go on from the last checkpoint with --resume",
            to_errors=True,
        )
    elif rank != 0 or follows:
        say(f"slimtune: process {rank}: {one_line(sentence)}", to_errors=True)
    return failure.exitcode if failure.exitcode > 0 else 1


def _order(ended: tuple[int, Any]) -> tuple[bool, bool, int]:
    """Sort first what tells most: a sentence, a kill, then what came of another process's end."""
    rank, failure = ended
    # torchrun ends the others by SIGTERM once one has failed: theirs is no cause.
    is_stopped = read_failure(failure.error_file_data)[1] or failure.exitcode == -signal.SIGTERM
    return is_stopped, failure.exitcode < 0, rank


def _whole(file: Path, settings: Mapping[str, Any], key: str) -> int:
    """A whole number above 0 of accelerate's file, 1 where there is none. Raises: ConfigError."""
    text = str(settings.get(key) or 1)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{file}: {key} must be a whole number of at least 1, found {text!r}")
    return int(text)


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")
