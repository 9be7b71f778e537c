"""Devices that a model is tuned on: how much memory they have, how fast they are, what an hour of them costs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError, PlanError, check_number, did_you_mean, listing
from slimtune.models.device import is_emulated, native_dtype, ram

GIB = 2**30
AUTO, CPU = "auto", "cpu"
TABLE = Path(__file__).with_name("devices.yaml")
HALF_PRECISIONS = ("bfloat16", "float16")

CPU_LIBRARIES_BYTES = int(0.5 * GIB)
"""What Python, torch and transformers take in memory before a model is loaded; measured on Linux."""
_CPU_WORKSPACE_BYTES = 120_000_000
"""Workspaces of kernels, the graph, and what glibc keeps of them: `python -m benchmarks.plan_accuracy --rss`."""
_CPU_FRAGMENTATION = 0.14
"""The share of its memory that glibc leaves unused, as it is set by default: as above."""
_CPU_FLOPS_PER_CORE = 1e11
"""Sixteen float32 lanes, two operations each, at 3 GHz: a guess that a calibration replaces."""
_CPU_16BIT_GAIN = 4
"""How much faster products in bfloat16 are where a processor has them; the README's steps differ by 2.7 in all."""
_CPU_EMULATED = 1 / 10
"""The same where it only emulates them, see `slimtune.models.device.is_emulated`: a guess, as above."""
_CPU_BANDWIDTH = 4e10
"""Two channels of DDR5, of which a process gets about half: a guess, as above."""
GPU_MARGIN = 0.1
"""The share of a GPU's memory that advice leaves free, until plans were held against a GPU."""


@dataclass(frozen=True)
class Device:
    """One device, in bytes, operations and seconds.

    A training needs its live tensors and the *runtime*: the context, and what fragmentation leaves unused. What is
    needed is held against the whole memory, so that the runtime is counted once, on the side of the need.

    Attributes:
        memory_bytes: what programs can use of it.
        sold_gb: the size that it is sold under, in the GiB that makers call GB; None for a processor's memory.
        context_bytes: what a process takes beside its tensors: the CUDA context, libraries' workspaces, on a CPU Python
            and its libraries.
        fragmentation: the share of the allocator's memory that stays unused.
        flops_16bit, flops_32bit: dense products by second, at their peak.
        link_bandwidth: bytes by second to another device of the kind, one way; None where they can't share a training.
        price_per_hour: US dollars, None where it isn't rented out.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops_16bit: float
    flops_32bit: float
    context_bytes: int
    fragmentation: float
    source: str
    has_bf16: bool = True
    link_bandwidth: float | None = None
    price_per_hour: float | None = None
    price_date: str = ""
    sold_gb: float | None = None

    @property
    def margin(self) -> float:
        """The share of the memory that advice leaves free; none on a processor, whose plans were measured."""
        return 0.0 if self.is_cpu else GPU_MARGIN

    @property
    def sold_as(self) -> str:
        """` (sold as 24 GB)`, for sentences; empty for a memory that is not on a label."""
        return f" (sold as {self.sold_gb:g} GB)" if self.sold_gb else ""

    @property
    def room_bytes(self) -> int:
        """The largest peak of live tensors that goes in: the memory less the context and what fragmentation takes."""
        # The caching allocator keeps blocks that fit no request: a share of what is live is lost to gaps.
        return int((self.memory_bytes - self.context_bytes) * (1 - self.fragmentation))

    @property
    def is_cpu(self) -> bool:
        """Whether it is a processor with main memory."""
        return self.name == CPU

    @property
    def is_cuda(self) -> bool:
        """Whether it is one of NVIDIA's."""
        return not self.is_cpu and not self.name.startswith("Apple")

    @property
    def half_precision(self) -> str:
        """The 16-bit type that it computes in by itself; float32 where there is none."""
        if self.is_cpu:
            return native_dtype(CPU)
        return "bfloat16" if self.has_bf16 else "float16"

    def flops(self, dtype: str) -> float:
        """Operations by second in this type of number."""
        return self.flops_16bit if dtype in HALF_PRECISIONS else self.flops_32bit

    def needed_bytes(self, peak_bytes: int) -> int:
        """What of the memory a peak of live tensors takes up, the runtime included."""
        return int(peak_bytes / (1 - self.fragmentation)) + self.context_bytes

    def runtime_bytes(self, peak_bytes: int) -> int:
        """What is needed beside a peak of live tensors: context and fragmentation."""
        return self.needed_bytes(peak_bytes) - peak_bytes

    def takes(self, peak_bytes: int) -> bool:
        """Whether a peak of live tensors fits."""
        return peak_bytes <= self.room_bytes

    @property
    def advised_bytes(self) -> int:
        """The largest peak of live tensors that leaves the margin free."""
        return replace(self, memory_bytes=int(self.memory_bytes * (1 - self.margin))).room_bytes

    def link(self) -> float:
        """Bytes by second to another such device; raises ConfigError where several can't share a training."""
        if self.link_bandwidth is None:
            raise ConfigError(f"{self.name} can't share a training with others of its kind; plan for one, or for GPUs")
        return self.link_bandwidth

    def changed(self, memory_gb: float | None = None, price_per_hour: float | None = None) -> Device:
        """The device with another memory (in GB of 10^9 bytes) or price; raises ConfigError for what can't be."""
        device = self
        if memory_gb is not None:
            check_number("memory", memory_gb, 0.1, 1e6)
            device = replace(device, memory_bytes=int(memory_gb * 1e9), sold_gb=None)
        if price_per_hour is not None:
            check_number("price", price_per_hour, 0, 1e6)
            device = replace(device, price_per_hour=float(price_per_hour), price_date="given")
        return device


@cache
def devices() -> dict[str, Device]:
    """All devices of the table by name."""
    import yaml

    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    shared = {"fragmentation": table["fragmentation"], "price_date": str(table["prices_of"])}
    return {device.name: device for device in (_read(entry, shared) for entry in table["devices"])}


def find(name: str) -> Device:
    """The device of that name, in whatever spelling; `auto` is this machine's, `cpu` its processor.

    Raises:
        ConfigError: no such device; with the nearest.
    """
    if name == AUTO:
        return this_device()
    if name == CPU:
        return this_cpu()
    wanted = _normalized(name)
    matching = [device for device in devices().values() if wanted in (_normalized(device.name), _kind(device.name))]
    if len(matching) > 1:
        raise ConfigError(f"the device '{name}' comes in sizes; name one: {listing(d.name for d in matching)}")
    if matching:
        return matching[0]
    near = did_you_mean(name.lower(), [*(known.lower() for known in devices()), CPU, AUTO])
    raise ConfigError(f"no device '{name}'{near or f'; there are auto, cpu, {listing(devices(), 50)}'}")


def this_device() -> Device:
    """The device that training would take here: CUDA's first, then Apple's, then the processor."""
    import torch

    if torch.cuda.is_available():
        return _this_gpu()
    if torch.backends.mps.is_available():
        model = next((d for d in devices().values() if d.name == _apple_name()), devices()["Apple M1"])
        return replace(model, memory_bytes=int(torch.mps.recommended_max_memory()), source="this machine")
    return this_cpu()


def this_cpu() -> Device:
    """This machine's processor and main memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device(
        name=CPU,
        memory_bytes=min(_memory_sources()),
        bandwidth=_CPU_BANDWIDTH,
        flops_16bit=cores * _CPU_FLOPS_PER_CORE * (_CPU_EMULATED if is_emulated("bfloat16", CPU) else _CPU_16BIT_GAIN),
        flops_32bit=cores * _CPU_FLOPS_PER_CORE,
        context_bytes=CPU_LIBRARIES_BYTES + _CPU_WORKSPACE_BYTES,
        fragmentation=_CPU_FRAGMENTATION,
        source=f"this machine, {cores} cores",
    )


def _this_gpu() -> Device:
    """The first GPU by its name, with the memory that its driver reports."""
    import torch

    facts = torch.cuda.get_device_properties(0)
    # One name, several sizes (A100 40 and 80 GB): the row whose memory is nearest.
    sizes = {abs(device.memory_bytes - facts.total_memory): device for device in _named_like(facts.name)}
    if not sizes:
        raise PlanError(
            f"the device '{facts.name}' of this machine is in no table; name one that is like it with --device, and "
            f"pass --memory {facts.total_memory / 1e9:.0f}"
        )
    return replace(sizes[min(sizes)], memory_bytes=facts.total_memory, source="this machine")


def _named_like(name: str) -> Iterator[Device]:
    """Devices whose name is part of what the driver says ("NVIDIA A100-SXM4-80GB"), the longest only."""
    driver_name = _normalized(name)
    fitting = {_kind(device.name): device for device in devices().values() if _kind(device.name) in driver_name}
    longest = max(fitting, key=len, default=None)
    return (device for device in devices().values() if _kind(device.name) == longest)


def _kind(name: str) -> str:
    return _normalized(re.sub(r"\s\d+GB$", "", name))


def _normalized(name: str) -> str:
    """Letters and digits of a name, without the maker's: people write 4090, rtx4090 and GeForce RTX 4090."""
    return re.sub(r"nvidia|geforce|tesla|rtx|apple|[^a-z0-9]", "", name.lower())


def _apple_name() -> str:
    import subprocess

    result = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _memory_sources() -> list[int]:
    """What the system says is available, and the limits that a container sets."""
    memory = ram()
    limits = [memory.available] if memory else []
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(name).read_text().strip() if Path(name).is_file() else ""
        if limit.isdecimal():
            limits.append(int(limit))
    return limits


def _read(entry: dict[str, Any], shared: dict[str, Any]) -> Device:
    return Device(
        name=entry["name"],
        memory_bytes=int(entry["memory_gib"] * GIB),
        bandwidth=entry["bandwidth_gb"] * 1e9,
        flops_16bit=entry["tflops_16bit"] * 1e12,
        flops_32bit=entry["tflops_32bit"] * 1e12,
        context_bytes=int(entry["context_gib"] * GIB),
        source=entry["source"],
        has_bf16=entry.get("has_bf16", True),
        link_bandwidth=entry["link_gb"] * 1e9 if "link_gb" in entry else None,
        price_per_hour=entry.get("price"),
        sold_gb=entry["sold_gb"],
        **shared,
    )
