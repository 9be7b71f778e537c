"""How long a training takes and what it costs: work counted in the simulated step, against what a device does.

    seconds = slack * (flops / flops_per_second + bytes / bandwidth)

The terms add up rather than overlap, for products of matrices are bound by computing and nearly everything else by
memory, and one runs after the other. Several devices divide the examples among them, and wait for what they exchange:

    seconds = slack * (...) / devices + batches * exchanged bytes / link bandwidth

which is an estimate, too high where exchange and products overlap. Counts are those of the step itself: a frozen weight
costs 4 operations a parameter and token (forward, and the gradient of its input), a trained one 6, and checkpointing
one more forward, 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimtune.data.lengths import Lengths
from slimtune.errors import check_number
from slimtune.plan.devices import HALF_PRECISIONS, Device
from slimtune.plan.memory import STEP, MemoryPlan, Work
from slimtune.plan.setting import Setting

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
    plan: MemoryPlan, lengths: Lengths, epochs: float, device: Device, rates: Rates, devices: int = 1
) -> Duration:
    """A training on examples of these lengths.

    Shorter batches than the planned one count by their tokens, padding included: attention's square and the optimizer
    make this an upper bound. For grpo the examples are prompts, each with as many answers as are drawn.

    Args:
        devices: how many share the examples, by FSDP2.

    Raises:
        ConfigError: several devices of a kind that can't share a training.
    """
    check_number("epochs", epochs, 0)
    setting = plan.setting
    drawn, longer = (setting.generations, setting.drawn_tokens) if setting.task == "grpo" else (1, 0)
    batches = math.ceil(lengths.examples * drawn * epochs / (setting.batch * devices))
    steps = max(1, math.ceil(batches / setting.accumulation))
    tokens = (lengths.padded(setting.batch) + lengths.examples * longer) * drawn * epochs
    planned = setting.batch * setting.accumulation * (setting.sequence + longer) * devices
    exchange = batches * _exchange_seconds(plan, device, devices)
    seconds = step_seconds(plan, rates) * tokens / planned + exchange
    cost = None if device.price_per_hour is None else devices * seconds / 3600 * device.price_per_hour
    return Duration(steps, seconds / steps, seconds, round(tokens), cost, rates.is_measured, exchange)


def _exchange_seconds(plan: MemoryPlan, device: Device, devices: int) -> float:
    """What several devices send in a micro-batch, over the link between them."""
    return plan.exchanged_bytes(devices) / (device.link() * USUAL_LINK) if devices > 1 else 0.0
