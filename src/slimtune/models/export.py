"""An adapter merged into its base and written as a model folder, with the difference measured twice."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.adapters.merge import Drift, compare_outputs, outputs, probe_inputs
from slimtune.adapters.requantize import MergeDrift
from slimtune.errors import MergeError
from slimtune.storage.atomic import staged
from slimtune.storage.source import no_weight_bar

PROBES = (
    "Two large lattes for Maria, please, and a slice of cake.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "The capital of France is Paris. Die Hauptstadt von Deutschland ist Berlin.",
    "In 1969, 3 people flew 384,400 km; what is 17 * 23?",
)


@dataclass(frozen=True)
class MergeReport:
    """How far the outputs lie apart."""

    adapter: Drift
    """The base from the base with its adapter: what was learned."""
    merged: Drift
    """The base with its adapter from the merged model: what merging lost."""
    reloaded: Drift
    """The base with its adapter from the merged model as it was written and read again."""
    requantized: MergeDrift | None = None
    """What is left of the update in weights that were quantized again."""

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self)


def merge_to_folder(
    model: Any,
    tokenizer: Any,
    output: Path,
    max_kl: float = 0.01,
    overwrite: bool = False,
    requantize: bool = False,
) -> MergeReport:
    """Merge the active adapters, write the model to `output` and compare its answers with those before.

    Args:
        max_kl: how far the answers may drift.
        requantize: leave a quantized base quantized; without it, a plain model is written.

    Raises MergeError past `max_kl` (nothing is written then), OutputExistsError if the folder holds something.
    """
    with staged(output, overwrite) as folder:
        inputs = probe_batches(model, tokenizer)
        tuned = outputs_on(model, inputs)
        with model.disable_adapter():
            base = outputs_on(model, inputs)
        with warnings.catch_warnings():
            # What it warns of is in the report.
            warnings.filterwarnings("ignore", message="merged into quantized weights")
            model = model.merge_and_unload(requantize=requantize)
        merged = compare_outputs(tuned, outputs_on(model, inputs))
        way_out = _WAY_OUT_REQUANTIZED if requantize else _WAY_OUT
        refuse_beyond(max_kl, merged, "the merged model", way_out)
        with no_weight_bar():
            model.save_pretrained(folder)
            again = _read_again(model, folder, requantize)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        reloaded = compare_outputs(tuned, outputs_on(again, inputs))
        refuse_beyond(max_kl, reloaded, "the merged model, written and read again,", way_out)
        return MergeReport(compare_outputs(base, tuned), merged, reloaded, getattr(model, "merge_drift", None))


_WAY_OUT = "merge in float32 with --dtype float32"
_WAY_OUT_REQUANTIZED = (
    "merge into 16 bits, without --requantize; for a model in few bits merge into the original 16-bit base and "
    "quantize what that gives"
)


def _read_again(model: Any, folder: Path, is_quantized: bool) -> Any:
    options: dict[str, Any] = {"dtype": model.dtype, "use_safetensors": True}
    if not is_quantized:
        return type(model).from_pretrained(folder, **options).to(model.device)
    from slimtune.quantization.load import load_as_stored

    return load_as_stored(type(model), str(folder), str(model.device), **options)


def probe_batches(model: Any, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Inputs on which a model is compared with what is made of it. Raises: MergeError, where none are known."""
    if tokenizer is not None and model.main_input_name == "input_ids" and not model.config.is_encoder_decoder:
        return [dict(tokenizer(text, return_tensors="pt").to(model.device)) for text in PROBES]
    inputs = probe_inputs(model)
    if inputs is None:
        raise MergeError(
            f"no probe inputs are known for {type(model).__name__}, so the merge can't be checked; merge in Python "
            f"with merge_and_unload and compare the outputs on inputs of your own"
        )
    return [inputs]


def outputs_on(model: Any, inputs: list[dict[str, Tensor]]) -> Tensor:
    """The outputs on all probes, a row for each position."""
    return torch.cat([outputs(model, probe).flatten(0, -2) for probe in inputs])


def refuse_beyond(max_kl: float, drift: Drift, what: str, way_out: str) -> None:
    """Raises: MergeError, for outputs that drift further than a KL divergence."""
    # Written so that a drift that is not a number is refused as well.
    if not drift.kl <= max_kl:
        raise MergeError(
            f"{what} strays from the unmerged one ({drift}), beyond the bound of KL {max_kl:g}; nothing was written: "
            f"{way_out}, or raise --max-kl"
        )
