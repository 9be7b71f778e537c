"""The recipe that brings a model under a size for an engine: the first on a ladder from what loses least.

Sizes are those of files, reckoned from the shapes of the model without its weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from slimtune.bases import base_of
from slimtune.errors import ConfigError, check_choice
from slimtune.models.load import read_model_config
from slimtune.quantization.linears import quantized_linears
from slimtune.storage.source import base_of as base_of_adapter
from slimtune.storage.source import folder_of, is_adapter

ENGINES = ("cpu", "vllm", "llama.cpp")
GROUP_SIZES = (64, 32)
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
_FEWEST_LAYERS = 0.5
"""The share of the layers that is left at least; with fewer, nothing that was tried here recovers."""


@dataclass(frozen=True)
class Shapes:
    """What of a model takes how many numbers.

    Attributes:
        layers: how many there are, which can be left out.
        linear: weights of the linear layers that are quantized.
        rows: outputs of these layers, each of which may have a scale.
        ends: of the embedding and the output layer, once where they are tied; `end_rows` of them.
        rest: norms, biases and what else stays in 16 bits.
        widths: of the inputs of the quantized layers.
    """

    layers: int
    linear: int
    rows: int
    ends: int
    end_rows: int
    rest: int
    widths: frozenset[int]


def recipe_for(model: str, engine: str, under: str, output: str = "small") -> dict[str, Any]:
    """A recipe, without its data, whose result has at most so many bytes.

    Args:
        engine: cpu (slimtune), vllm, or llama.cpp, whose file stands beside the folder.
        under: as 100MB.

    Raises:
        ConfigError: the model fits as it is, or no recipe here brings it under the size.
    """
    check_choice("--for", engine, ENGINES)
    most, shapes = bytes_of(under), shapes_of(model)
    whole = 2 * (shapes.linear + shapes.ends + shapes.rest)
    if whole <= most:
        raise ConfigError(f"{model} takes {whole / 1e6:,.0f} MB in 16 bits, which is under {under} as it is")
    reached = []
    for steps, size in _ladder(shapes, engine):
        if size <= most:
            exported = {"export": "gguf"} if engine == "llama.cpp" else {}
            stop = {"task": -0.02, "perplexity": 1.5}
            return {"model": model, "output": output, "evaluation": {}, "steps": steps, "stop": stop, **exported}
        reached.append(size)
    raise ConfigError(
        f"no recipe brings {model} under {under} for {engine}: with half of its layers in 4 bits it still takes "
        f"{min(reached) / 1e6:,.0f} MB; take a smaller model"
    )


def bytes_of(size: str) -> float:
    """100MB as a number. Raises: ConfigError."""
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]B)\s*", size, re.IGNORECASE)
    if parts is None:
        raise ConfigError(f"--under takes a size such as 100MB or 1.5GB, found {size!r}")
    return float(parts[1]) * _UNITS[parts[2].upper()]


def shapes_of(source: str) -> Shapes:
    """Those of a model or of an adapter's base, from its configuration alone."""
    folder = folder_of(base_of_adapter(source) if is_adapter(source) else source)
    config = read_model_config(folder)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    modules = [model.get_submodule(name) for name in quantized_linears(model)]
    features = [base_of(module).features(module) for module in modules]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(end.weight): end.weight for end in (embedding, head) if end is not None}
    count = sum(math.prod(pair) for pair in features)
    in_ends = sum(weight.numel() for weight in ends.values())
    return Shapes(
        layers=config.get_text_config().num_hidden_layers,
        linear=count,
        rows=sum(outputs for _, outputs in features),
        ends=in_ends,
        end_rows=sum(weight.shape[0] for weight in ends.values()),
        rest=sum(parameter.numel() for parameter in model.parameters()) - count - in_ends,
        widths=frozenset(inputs for inputs, _ in features),
    )


def _ladder(shapes: Shapes, engine: str) -> Iterator[tuple[list[dict[str, Any]], float]]:
    """Steps and the bytes that they come to, from what loses least."""
    # llama.cpp's blocks are of 32 whatever the groups, so that larger ones would save nothing.
    sizes = (32,) if engine == "llama.cpp" else GROUP_SIZES
    group_size = next((size for size in sizes if not any(width % size for width in shapes.widths)), None)
    heads = ("keep",) if engine == "vllm" else ("keep", "int8")
    schemes = ["W8A16", *(["W4A16"] if group_size else [])]
    for scheme in schemes:
        for head in heads:
            yield (
                [{"quantize": _fields(scheme, head, group_size)}],
                _bytes(shapes, 1.0, scheme, head, group_size, engine),
            )
    scheme, head = schemes[-1], heads[-1]
    for layers in range(shapes.layers - 1, math.ceil(_FEWEST_LAYERS * shapes.layers) - 1, -1):
        recovery = {"beta": 0, "alpha": 0.5, "method": {"name": "lora", "r": 16}, "training": {"max_steps": 200}}
        steps = [{"prune": {"layers": layers}}, {"distill": recovery}, {"quantize": _fields(scheme, head, group_size)}]
        yield steps, _bytes(shapes, layers / shapes.layers, scheme, head, group_size, engine)


def _fields(scheme: str, head: str, group_size: int | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"scheme": scheme}
    fields |= {"group_size": group_size} if scheme == "W4A16" and group_size != GROUP_SIZES[0] else {}
    return fields | ({"head": head} if head != "keep" else {})


def _bytes(shapes: Shapes, share: float, scheme: str, head: str, group_size: int | None, engine: str) -> float:
    bits = 4 if scheme == "W4A16" else 8
    if engine == "llama.cpp":
        # A float16 scale in each block of 32.
        linear, ends = shapes.linear * (bits / 8 + 2 / 32), shapes.ends * (1 + 2 / 32)
    else:
        scales = shapes.linear / (group_size or 1) if bits == 4 else shapes.rows
        linear, ends = shapes.linear * bits / 8 + 2 * scales, shapes.ends + 2 * shapes.end_rows
    return share * (linear + 2 * shapes.rest) + (ends if head == "int8" else 2 * shapes.ends)
