"""How long a training takes and what it costs: work counted in the simulated step, against the rates of a device.

Rates come from the data sheet, or from a calibration: products, copies and one small training step, measured on this
machine and kept for later plans.

    seconds = slack * (flops / flops_per_second + bytes / bandwidth)

The terms add up rather than overlap, for products of matrices are bound by computing and nearly everything else by
memory, and one runs after the other. Several devices divide the examples among them, and wait for what they exchange:

    seconds = slack * (...) / devices + batches * exchanged bytes / link bandwidth

which is an estimate, too high where exchange and products overlap. Counts are those of the step itself: a frozen weight
costs 4 operations a parameter and token (forward, and the gradient of its input), a trained one 6, and checkpointing
one more forward, 2.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slimtune.data.lengths import Lengths
from slimtune.errors import check_number
from slimtune.models.device import pick_device
from slimtune.plan.devices import HALF_PRECISIONS, Device
from slimtune.plan.memory import FSDP2, STEP, MemoryPlan, Setting, Sharing, Work
from slimtune.plan.memory_tracker import MemoryTracker
from slimtune.storage.atomic import write_file
from slimtune.storage.source import cache_dir

USUAL_EFFICIENCY = 0.6
"""Of large products against the data sheet; a whole training reaches 30% to 60% (PaLM, arXiv:2204.02311, app. B)."""
USUAL_BANDWIDTH = 0.8
USUAL_SLACK = 1.2
"""Launches, Python and the loader; all three are rules of thumb that a calibration replaces."""
USUAL_LINK = 0.8
"""Of a link's bandwidth for large messages: a rule of thumb."""


@dataclass(frozen=True)
class Rates:
    """What a device really does in a second.

    Attributes:
        slack: how much longer a step takes than its parts; launches, the Python around them, the loader.
        is_measured: by a calibration, rather than taken from the data sheet with a usual efficiency.
    """

    flops_16bit: float
    flops_32bit: float
    bandwidth: float
    slack: float
    is_measured: bool

    def seconds(self, work: Work, is_half: bool) -> float:
        """How long this work takes with products in 16 or 32 bits."""
        # Seconds = flops / (flops/s) + bytes / (bytes/s): a roofline whose two sides add up instead of max().
        flops = self.flops_16bit if is_half else self.flops_32bit
        return self.slack * (work.flops / flops + work.bytes_moved / self.bandwidth)


def usual(device: Device) -> Rates:
    """Rates where nothing was measured."""
    return Rates(
        flops_16bit=device.flops_16bit * USUAL_EFFICIENCY,
        flops_32bit=device.flops_32bit * USUAL_EFFICIENCY,
        bandwidth=device.bandwidth * USUAL_BANDWIDTH,
        slack=USUAL_SLACK,
        is_measured=False,
    )


@dataclass(frozen=True)
class Duration:
    """A whole training.

    Attributes:
        steps: of the optimizer.
        exchange_seconds: of all seconds, those in which several devices exchange parameters and gradients.
        tokens: of all examples, padding included.
        cost: in US dollars for all devices, None without a price.
        is_measured: whether the rates come from a calibration.
    """

    steps: int
    step_seconds: float
    seconds: float
    tokens: int
    cost: float | None
    is_measured: bool
    exchange_seconds: float = 0.0


def is_half(setting: Setting) -> bool:
    """Whether products run in 16 bits."""
    return setting.autocast or setting.dtype in HALF_PRECISIONS


def step_seconds(plan: MemoryPlan, rates: Rates) -> float:
    """One optimizer step on batches of the planned size, all as long as the planned sequence."""
    work = [plan.work[phase] for phase in STEP if phase in plan.work]
    total = Work(sum(part.flops for part in work), sum(part.bytes_moved for part in work))
    return rates.seconds(total, is_half(plan.setting))


def duration(
    plan: MemoryPlan,
    lengths: Lengths,
    epochs: float,
    device: Device,
    rates: Rates,
    devices: int = 1,
    sharing: Sharing = FSDP2,
) -> Duration:
    """A training on examples of these lengths.

    Shorter batches than the planned one count by their tokens, padding included: attention's square and the optimizer
    make this an upper bound. For grpo the examples are prompts, each with as many answers as are drawn.

    Args:
        devices: how many share the examples, by `sharing`.

    Raises:
        ConfigError: several devices of a kind that can't share a training.
    """
    check_number("epochs", epochs, 0)
    setting = plan.setting
    drawn, longer = (setting.generations, setting.drawn_tokens) if setting.task == "grpo" else (1, 0)
    # Micro-batches of `batch` examples on each of `devices`; a last one that is not full counts as one.
    batches = math.ceil(lengths.examples * drawn * epochs / (setting.batch * devices))
    steps = max(1, math.ceil(batches / setting.accumulation))
    # Rows are padded to the longest of their batch; each drawn answer of grpo is as long as it may be.
    tokens = (lengths.padded(setting.batch) + lengths.examples * longer) * drawn * epochs
    computed = tokens * (setting.shared.share if setting.shared else 1)
    # Tokens of one simulated step, by which its seconds are scaled to all tokens of the data.
    rows = setting.shared.tokens if setting.shared else setting.batch * (setting.sequence + longer)
    planned = rows * setting.accumulation * devices
    exchange = batches * _exchange_seconds(plan, device, devices, sharing)
    seconds = step_seconds(plan, rates) * computed / planned + exchange
    # US dollars: every device is rented for the whole time.
    cost = None if device.price_per_hour is None else devices * seconds / 3600 * device.price_per_hour
    return Duration(steps, seconds / steps, seconds, round(tokens), cost, rates.is_measured, exchange)


def _exchange_seconds(plan: MemoryPlan, device: Device, devices: int, sharing: Sharing) -> float:
    """What several devices send in a micro-batch, over the link between them."""
    return plan.exchanged_bytes(devices, sharing) / (device.link() * USUAL_LINK) if devices > 1 else 0.0


# (1024, 2048) @ (2048, 2048), 8.6 GFLOP: large enough to reach the rate of a training, small enough for a CPU. 256 MB
# copied are more than any cache holds.
ROWS, WIDTH = 1024, 2048
COPIED_BYTES = 2**28
# Sequences x tokens of the training step that is measured.
STEP_BATCH = (4, 256)
SECONDS_EACH = 5.0


def calibrate(device: Device, log: Callable[[str], None] = lambda line: None) -> Rates:
    """Measure the device of this machine, within about a minute, and keep the result for later plans.

    Args:
        log: gets a line for each figure that is measured.
    """
    device_type = pick_device("auto")
    # Products in 16 bits are measured even where the device has none of its own: a plan may ask for them.
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(device.half_precision, torch.float32)
    rates = Rates(
        flops_16bit=_product_flops(device_type, torch.bfloat16 if half is torch.float32 else half),
        flops_32bit=_product_flops(device_type, torch.float32),
        bandwidth=_bandwidth(device_type),
        slack=1.0,
        is_measured=True,
    )
    log(
        f"products: {rates.flops_16bit / 1e12:.3g} TFLOPS in 16 bits, {rates.flops_32bit / 1e12:.3g} in 32; "
        f"memory: {rates.bandwidth / 1e9:.3g} GB/s"
    )
    measured, work = _step(device_type, half)
    # What the step takes beyond products and copies: launches, and the Python around them.
    slack = measured / rates.seconds(work, is_half=half is not torch.float32)
    log(f"a small training step: {measured:.3g} s, {slack:.2f} times what its parts take")
    rates = replace(rates, slack=slack)
    _store(device, rates)
    return rates


def rates_of(device: Device) -> Rates:
    """The measured rates of a device where there are any, else the usual ones."""
    stored = _read().get(_key(device))
    return Rates(**stored) if stored else usual(device)


def calibration_file() -> Path:
    """The file of measured rates."""
    return cache_dir().with_name("calibration.json")


def _key(device: Device) -> str:
    # More threads make another machine of a processor.
    return f"{device.name}, {torch.get_num_threads()} threads" if device.is_cpu else device.name


def _store(device: Device, rates: Rates) -> None:
    path = calibration_file()
    everything = _read() | {_key(device): asdict(rates)}
    write_file(path, json.dumps(everything, indent=2) + "\n")


def _read() -> dict[str, Any]:
    try:
        rates_by_device = json.loads(calibration_file().read_text(encoding="utf-8"))
        return {key: rates for key, rates in rates_by_device.items() if set(rates) == set(Rates.__dataclass_fields__)}
    except (OSError, ValueError, AttributeError, TypeError):
        # None yet, or a damaged one: the next calibration writes it anew.
        return {}


def _seconds(run: Callable[[], Any], device_type: str) -> float:
    """The median of as many runs as fit into some seconds, after one to warm up."""
    run()
    # A median over seconds: the first runs are slower (caches, clocks), and other processes take their share.
    seconds, end = [], time.perf_counter() + SECONDS_EACH
    while len(seconds) < 3 or time.perf_counter() < end:
        _synchronise(device_type)
        began = time.perf_counter()
        run()
        _synchronise(device_type)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _synchronise(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()
    elif device_type == "mps":
        torch.mps.synchronize()


def _product_flops(device_type: str, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, device=device_type).to(dtype) for size in ((ROWS, WIDTH), (WIDTH, WIDTH)))
    # A multiplication and its addition count as two operations.
    return 2 * ROWS * WIDTH * WIDTH / _seconds(lambda: left @ right, device_type)


def _bandwidth(device_type: str) -> float:
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device_type)
    target = torch.empty_like(source)
    # Each byte is read once and written once.
    return 2 * COPIED_BYTES / _seconds(lambda: target.copy_(source), device_type)


def _step(device_type: str, dtype: torch.dtype) -> tuple[float, Work]:
    """The median seconds of a LoRA step on a small Llama with random weights, and what it computes and moves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from slimtune.adapters.model import get_peft_model
    from slimtune.methods.lora.config import LoraConfig

    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12
    )
    model: Any = LlamaForCausalLM(config)
    model = get_peft_model(model.to(device_type, dtype).train(), LoraConfig(task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(8192, STEP_BATCH, device=device_type)

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = _seconds(run, device_type)
    tracker = MemoryTracker()
    with tracker:
        run()
    return seconds, Work(
        sum(work.flops for work in tracker.work.values()), sum(work.bytes_moved for work in tracker.work.values())
    )
