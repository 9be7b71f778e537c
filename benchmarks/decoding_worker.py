"""One side's times for few tokens, in a process of its own: takes the side and the device, prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.bases import base_model
from benchmarks.cases import Work
from benchmarks.prepare import model_folder
from benchmarks.worker import timed

SHAPES = ((576, 1536), (2048, 2048), (4096, 4096))
TOKENS = (1, 2, 4, 8, 16)
ROWS = (1, 16)
REPEATS = 20
PROMPT, STEPS = 32, 16


def finished(device: str, action: Callable[[], Any]) -> Any:
    result = action()
    if device == "cuda":
        torch.cuda.synchronize()
    return result


def seconds_of(device: str, action: Callable[[], Any]) -> float:
    """The median over repeats, after a few to warm up."""
    spent = [timed(lambda: finished(device, action))[0] for _ in range(REPEATS + 3)]
    return median(spent[3:])


def layer(side: str, inputs: int, outputs: int, device: str) -> nn.Module:
    """A linear layer without bias as a side has it."""
    with torch.inference_mode(False):
        return _layer(side, inputs, outputs, device)


def _layer(side: str, inputs: int, outputs: int, device: str) -> nn.Module:
    dense = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    if side == "bf16":
        return dense.to(device).eval()
    import bitsandbytes

    packed = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    packed.weight.data = dense.weight.data
    holder = nn.Sequential(packed).to(device).eval()
    if side == "slimtune":
        from slimtune.bases import claim

        claim(holder)
    return holder[0]


def layer_seconds(side: str, device: str) -> dict[str, float]:
    found = {}
    for inputs, outputs in SHAPES:
        module = layer(side, inputs, outputs, device)
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=device)
            found[f"{inputs} x {outputs} x {tokens}"] = seconds_of(device, lambda m=module, x=x: m(x))
    return found


def model_of(side: str, device: str) -> Any:
    """SmolLM2 in bf16, or in NF4 as slimtune or transformers loads it."""
    with torch.inference_mode(False):
        return _model_of(side, device)


def _model_of(side: str, device: str) -> Any:
    if side == "bf16":
        return base_model(Work(), model_folder()).to(device).eval()
    library = None
    if side == "slimtune":
        import slimtune as library
    return base_model(Work(quantize="nf4-dq", device=device), model_folder(), library).eval()


def step_seconds(model: Any, rows: int, device: str) -> float:
    """The median of a decoding step behind a short prompt."""
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.randint(0, model.config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    ids = model(input_ids=ids.to(device), past_key_values=cache).logits[:, -1:].argmax(-1)
    spent = []
    for _ in range(STEPS):
        step = lambda ids=ids: model(input_ids=ids, past_key_values=cache)  # noqa: E731
        seconds, outputs = timed(lambda step=step: finished(device, step))
        ids = outputs.logits[:, -1:].argmax(-1)
        spent.append(seconds)
    return median(spent[3:])


@torch.inference_mode()
def measure(side: str, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    seconds = layer_seconds(side, device)
    model = model_of(side, device)
    seconds |= {f"a step of SmolLM2 x {rows}": step_seconds(model, rows, device) for rows in ROWS}
    settings = {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    return {"seconds": seconds, "torch": settings}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    print(json.dumps(measure(*sys.argv[1:])))
