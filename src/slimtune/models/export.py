"""An adapter merged into its base and written as a model folder, with the difference measured twice."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.adapters.adapter import adopted_modules
from slimtune.adapters.merge import Drift, compare_outputs, outputs, probe_inputs
from slimtune.adapters.requantize import MergeDrift
from slimtune.errors import MergeError
from slimtune.models.load import read_as_stored
from slimtune.storage.atomic import staged
from slimtune.storage.source import no_weight_bar

PROBES = (
    "Two large lattes for Maria, please, and a slice of cake.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "The capital of France is Paris. Die Hauptstadt von Deutschland ist Berlin.",
    "In 1969, 3 people flew 384,400 km; what is 17 * 23?",
)


KEEPS, MOST_LOST = 0.1, 0.5
"""Shares of the tuning: a loss below the first isn't seen, one beyond the second is refused unless a bound is given."""


@dataclass(frozen=True)
class MergeReport:
    """How far the outputs lie apart."""

    adapter: Drift
    """The base from the base with its adapter: what was learned."""
    merged: Drift
    """The base with its adapter from the merged model: what merging lost."""
    reloaded: Drift
    """The base with its adapter from the merged model as it was written and read again."""
    rounding: Drift
    """The base with its adapter from itself, each product of its layers rounded once more: what the dtype costs."""
    requantized: MergeDrift | None = None
    """What is left of the update in weights that were quantized again."""

    @property
    def lost(self) -> float:
        """The share of the change that merging loses, what rounding costs any computation taken off."""
        return _share_lost(self.adapter, self.reloaded, self.rounding)

    @property
    def is_kept(self) -> bool:
        """Whether the tuning is told from rounding, and is in the merged model."""
        return self.adapter.kl > 2 * self.rounding.kl and self.lost < KEEPS

    @property
    def verdict(self) -> str:
        """What the figures mean, as one sentence, and what to do."""
        if self.adapter.kl <= 2 * self.rounding.kl:
            return (
                f"the adapter changes the answers (KL {self.adapter.kl:.2e}) hardly more than rounding does "
                f"({self.rounding.kl:.2e}), merged or not: train longer, or merge in float32 (--dtype float32)"
            )
        if self.is_kept:
            return f"the merged model keeps the tuning: {self.lost:.1%} of the change in the answers is lost"
        verb = "blurs" if self.lost <= MOST_LOST else "loses most of"
        return (
            f"the merged model {verb} the tuning: {self.lost:.0%} of the change in the answers is lost; "
            f"{_WAY_OUT if self.requantized is None else _WAY_OUT_REQUANTIZED}, or use the adapter unmerged"
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self) | {"lost": self.lost, "verdict": self.verdict}


def merge_to_folder(
    model: Any,
    tokenizer: Any,
    output: Path,
    max_kl: float | None = None,
    overwrite: bool = False,
    requantize: bool = False,
) -> MergeReport:
    """Merge the active adapters, write the model to `output` and compare its answers with those before.

    Args:
        max_kl: how far the answers may drift; by default as far as half of the adapter's own change.
        requantize: leave a quantized base quantized; without it, a plain model is written.

    Raises MergeError past the bound (nothing is written then), OutputExistsError if the folder holds something.
    """
    with staged(output, overwrite) as folder:
        inputs = probe_batches(model, tokenizer)
        tuned = outputs_on(model, inputs)
        with _rounded_once_more(model):
            # What the same model answers when each product is off by as much as its dtype allows: the yardstick for all
            # below.
            rounding = compare_outputs(tuned, outputs_on(model, inputs))
        with model.disable_adapter():
            base = outputs_on(model, inputs)
        with warnings.catch_warnings():
            # What it warns of is in the report.
            warnings.filterwarnings("ignore", message="merged into quantized weights")
            model = model.merge_and_unload(requantize=requantize)
        # Only of what merges: a soft prompt has outputs of its own, beside which the base has none.
        adapter = compare_outputs(base, tuned)
        merged = compare_outputs(tuned, outputs_on(model, inputs))
        way_out = _WAY_OUT_REQUANTIZED if requantize else _WAY_OUT
        _refuse(max_kl, adapter, merged, rounding, "the merged model", way_out)
        with no_weight_bar():
            model.save_pretrained(folder)
            again = _read_again(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        reloaded = compare_outputs(tuned, outputs_on(again, inputs))
        _refuse(max_kl, adapter, reloaded, rounding, "the merged model, written and read again,", way_out)
        return MergeReport(adapter, merged, reloaded, rounding, getattr(model, "merge_drift", None))


_WAY_OUT = "merge in float32 with --dtype float32"
_WAY_OUT_REQUANTIZED = (
    "merge into 16 bits, without --requantize; for a model in few bits merge into the original 16-bit base and "
    "quantize what that gives"
)


def _read_again(model: Any, folder: Path) -> Any:
    config = type(model.config).from_pretrained(folder)
    options: dict[str, Any] = {"dtype": model.dtype, "use_safetensors": True}
    return read_as_stored(type(model), str(folder), config, str(model.device), **options)


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


def _share_lost(adapter: Drift, merged: Drift, rounding: Drift) -> float:
    """The KL divergence of merging by that of the adapter, from both of which that of rounding is taken off."""
    lost, change = max(0.0, merged.kl - rounding.kl), max(0.0, adapter.kl - rounding.kl)
    return lost / change if change else math.inf if lost else 0.0


def _refuse(max_kl: float | None, adapter: Drift, merged: Drift, rounding: Drift, what: str, way_out: str) -> None:
    """Raises: MergeError, for outputs that drift further than a bound, or by default than half of the tuning."""
    if max_kl is not None:
        refuse_beyond(max_kl, merged, what, way_out)
        return
    is_told_apart = merged.kl > 2 * rounding.kl
    if math.isnan(merged.kl) or (is_told_apart and _share_lost(adapter, merged, rounding) > MOST_LOST):
        raise MergeError(
            f"{what} loses most of the tuning: it strays from the unmerged one by KL {merged.kl:.2e}, of which "
            f"rounding alone takes {rounding.kl:.2e}, and the adapter changes the answers by {adapter.kl:.2e}; nothing "
            f"was written: {way_out}, or give a bound of your own with --max-kl"
        )


def refuse_beyond(max_kl: float, drift: Drift, what: str, way_out: str) -> None:
    """Raises: MergeError, for outputs that drift further than a KL divergence."""
    # Written so that a drift that is not a number is refused as well.
    if not drift.kl <= max_kl:
        raise MergeError(
            f"{what} strays from the unmerged one ({drift}), beyond the bound of KL {max_kl:g}; nothing was written: "
            f"{way_out}, or raise --max-kl"
        )


@contextmanager
def _rounded_once_more(model: Any) -> Iterator[None]:
    """Round what each adopted module gives to a neighbour in its dtype as often as a product in it is off.

    A product is off by up to half a step, with a variance of 1/12 of a squared step; a whole step with probability 1/12
    has the same. So the answers move about as far as those in this dtype lie from those of exact arithmetic.
    """
    generator = torch.Generator().manual_seed(0)

    def rounded(module: Any, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        draw = torch.rand(output.shape, generator=generator).to(output.device)
        # +1 with probability 1/24, -1 with 1/24: variance 1/12 of a squared step, like rounding's own.
        steps = (draw < 1 / 24).to(output.dtype) - (draw > 23 / 24).to(output.dtype)
        # frexp's mantissa lies in [0.5, 1): one less gives the exponent of [1, 2), whose step is eps times 2^exponent.
        exponent = torch.frexp(output.float()).exponent - 1
        return (
            output
            + steps
            * torch.ldexp(torch.ones_like(output, dtype=torch.float32), exponent).to(output.dtype)
            * torch.finfo(output.dtype).eps
        )

    handles = [module.register_forward_hook(rounded) for _, module in adopted_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
