"""What this machine really does in a second: products, copies and one small training step, measured and kept."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from slimtune.models.device import pick_device
from slimtune.plan.devices import Device
from slimtune.plan.memory import Work
from slimtune.plan.memory_tracker import MemoryTracker
from slimtune.plan.time import Rates, usual
from slimtune.storage.atomic import staged_file
from slimtune.storage.source import cache_dir

ROWS, WIDTH = 1024, 2048
COPIED_BYTES = 2**28
SECONDS_EACH = 5.0
STEPS = 5


def calibrate(device: Device, said: Callable[[str], None] = lambda line: None) -> Rates:
    """Measure the device of this machine, within about a minute, and keep the result for later plans.

    Args:
        said: is told what is measured, a line each.
    """
    place = pick_device("auto")
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(device.half_precision, torch.float32)
    rates = Rates(
        flops_16bit=_product_flops(place, torch.bfloat16 if half is torch.float32 else half),
        flops_32bit=_product_flops(place, torch.float32),
        bandwidth=_bandwidth(place),
        slack=1.0,
        is_measured=True,
    )
    said(
        f"products: {rates.flops_16bit / 1e12:.3g} TFLOPS in 16 bits, {rates.flops_32bit / 1e12:.3g} in 32; "
        f"memory: {rates.bandwidth / 1e9:.3g} GB/s"
    )
    measured, work = _step(place, half)
    slack = measured / rates.seconds(work, is_half=half is not torch.float32)
    said(f"a small training step: {measured:.3g} s, {slack:.2f} times what its parts take")
    rates = replace(rates, slack=slack)
    _keep(device, rates)
    return rates


def rates_of(device: Device) -> Rates:
    """The measured rates of a device where there are any, else the usual ones."""
    kept = _read().get(_key(device))
    return Rates(**kept) if kept else usual(device)


def calibration_file() -> Path:
    """Where measured rates are kept."""
    return cache_dir().with_name("calibration.json")


def _key(device: Device) -> str:
    # More threads make another machine of a processor.
    return f"{device.name}, {torch.get_num_threads()} threads" if device.is_cpu else device.name


def _keep(device: Device, rates: Rates) -> None:
    path = calibration_file()
    everything = _read() | {_key(device): asdict(rates)}
    with staged_file(path) as scratch:
        scratch.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")


def _read() -> dict[str, Any]:
    try:
        found = json.loads(calibration_file().read_text(encoding="utf-8"))
        return {key: rates for key, rates in found.items() if set(rates) == set(Rates.__dataclass_fields__)}
    except (OSError, ValueError, AttributeError, TypeError):
        # None yet, or a damaged one: the next calibration writes it anew.
        return {}


def _seconds(run: Callable[[], Any], place: str) -> float:
    """The median of as many runs as fit into some seconds, after one to warm up."""
    run()
    found, end = [], time.perf_counter() + SECONDS_EACH
    while len(found) < 3 or time.perf_counter() < end:
        _synchronise(place)
        began = time.perf_counter()
        run()
        _synchronise(place)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _synchronise(place: str) -> None:
    if place == "cuda":
        torch.cuda.synchronize()
    elif place == "mps":
        torch.mps.synchronize()


def _product_flops(place: str, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, device=place).to(dtype) for size in ((ROWS, WIDTH), (WIDTH, WIDTH)))
    return 2 * ROWS * WIDTH * WIDTH / _seconds(lambda: left @ right, place)


def _bandwidth(place: str) -> float:
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _seconds(lambda: target.copy_(source), place)


def _step(place: str, dtype: torch.dtype) -> tuple[float, Work]:
    """The median seconds of a LoRA step on a small Llama with random weights, and what it computes and moves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from slimtune.adapters.model import get_peft_model
    from slimtune.methods.lora.config import LoraConfig

    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12
    )
    model: Any = LlamaForCausalLM(config)
    model = get_peft_model(model.to(place, dtype).train(), LoraConfig(task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(8192, (4, 256), device=place)

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = _seconds(run, place)
    tracker = MemoryTracker()
    with tracker:
        run()
    return seconds, Work(
        sum(work.flops for work in tracker.work.values()), sum(work.bytes_moved for work in tracker.work.values())
    )
