"""An adapter merged into its base and written as a plain model folder, with the difference measured twice."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.drift import Drift, compare_outputs
from slimtune.errors import MergeError
from slimtune.loading import no_weight_bar
from slimtune.merge import outputs, probe_inputs
from slimtune.staging import staged

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

    def to_dict(self) -> dict[str, dict[str, float]]:
        """All numbers, for JSON."""
        return asdict(self)


def merge_to_folder(
    model: Any, tokenizer: Any, output: Path, max_kl: float = 0.01, overwrite: bool = False
) -> MergeReport:
    """Merge the active adapters, write the plain model to `output` and compare its answers with those before.

    Raises MergeError past `max_kl` (nothing is written then), OutputExistsError if the folder holds something.
    """
    with staged(output, overwrite) as folder:
        inputs = _probes(model, tokenizer)
        tuned = _outputs(model, inputs)
        with model.disable_adapter():
            base = _outputs(model, inputs)
        model = model.merge_and_unload()
        merged = compare_outputs(tuned, _outputs(model, inputs))
        _refuse_beyond(max_kl, merged, "the merged model")
        with no_weight_bar():
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).to(model.device)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        reloaded = compare_outputs(tuned, _outputs(again, inputs))
        _refuse_beyond(max_kl, reloaded, "the merged model, written and read again,")
        return MergeReport(compare_outputs(base, tuned), merged, reloaded)


def _probes(model: Any, tokenizer: Any) -> list[dict[str, Tensor]]:
    if tokenizer is not None and model.main_input_name == "input_ids" and not model.config.is_encoder_decoder:
        return [dict(tokenizer(text, return_tensors="pt").to(model.device)) for text in PROBES]
    inputs = probe_inputs(model)
    if inputs is None:
        raise MergeError(
            f"no probe inputs are known for {type(model).__name__}, so the merge can't be checked; merge in Python "
            f"with merge_and_unload and compare the outputs on inputs of your own"
        )
    return [inputs]


def _outputs(model: Any, inputs: list[dict[str, Tensor]]) -> Tensor:
    """The outputs on all probes, a row for each position."""
    return torch.cat([outputs(model, probe).flatten(0, -2) for probe in inputs])


def _refuse_beyond(max_kl: float, drift: Drift, what: str) -> None:
    # Written so that a drift that is not a number is refused as well.
    if not drift.kl <= max_kl:
        raise MergeError(
            f"{what} strays from the unmerged one ({drift}), beyond the bound of KL {max_kl:g}; nothing was written: "
            f"merge in float32 with --dtype float32, or raise --max-kl"
        )
