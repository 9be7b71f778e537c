"""What serving a model takes: its weights, adapters, and slots times the keys and values of a context; and how fast.

    needed = weights + adapters * bytes of each + slots * bytes of a slot, and the runtime

A slot is counted by the function that the engine takes its memory by. Tokens a second are the planner's roofline over
one step: all weights are read once for a token of each answer.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers.initialization import no_init_weights

from slimtune.engine.model import LONGEST, SLOTS, slot_bytes
from slimtune.errors import ConfigError, check_whole
from slimtune.plan.build import build, positions_of
from slimtune.plan.devices import HALF_PRECISIONS, Device
from slimtune.plan.memory import Setting, Work
from slimtune.plan.memory_tracker import FakeMemoryTracker, taken_for_real
from slimtune.plan.quantize import quantize, tensors_of
from slimtune.plan.simulate import as_stored, quiet
from slimtune.plan.step import layers_of, prefill
from slimtune.plan.time import Rates

PROBED = 8
READS_CODES = 8
"""Up to so many answers a step multiplies with the codes of integers; beyond, weights are expanded for it."""


@dataclass(frozen=True)
class ServingPlan:
    """A model as the engine would hold it.

    Attributes:
        weights_bytes: of the base, as it is stored in memory.
        adapter_bytes: of one adapter, in float32.
        slot_bytes: keys and values of a whole context, and a step's logits.
        key_value_bytes: of them, keys and values.
        parameters: of the base.
        notes: what to know of it, a sentence each.
    """

    device: Device
    weights_bytes: int
    adapters: int
    adapter_bytes: int
    slots: int
    context: int
    slot_bytes: int
    key_value_bytes: int
    parameters: int
    is_quantized: bool
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def live_bytes(self) -> int:
        """All that the process holds."""
        return self.weights_bytes + self.adapters * self.adapter_bytes + self.slots * self.slot_bytes

    @property
    def needed_bytes(self) -> int:
        """Of the device's memory, the runtime included."""
        return self.device.needed_bytes(self.live_bytes)

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return self.device.takes(self.live_bytes)

    @property
    def most_slots(self) -> int:
        """As many as leave the device's margin free; 0 where not even one does."""
        rest = self.device.advised_bytes - self.weights_bytes - self.adapters * self.adapter_bytes
        return max(0, rest // self.slot_bytes)

    def tokens_per_second(self, rates: Rates, answers: int) -> float:
        """Of so many answers together, each half a context long: an estimate."""
        read = self.weights_bytes + self.adapters * self.adapter_bytes + answers * self.key_value_bytes // 2
        if self.is_quantized and answers > READS_CODES:
            # The dense weights are written and read in addition to the codes.
            read += 2 * self.parameters * (2 if self.dtype in HALF_PRECISIONS else 4)
        work = Work(flops=2 * self.parameters * answers, bytes_moved=read)
        return answers / rates.seconds(work, is_half=self.dtype in HALF_PRECISIONS)

    def to_dict(self, rates: Rates) -> dict[str, Any]:
        """All of it in plain types, for JSON."""
        return asdict(self) | {
            "device": asdict(self.device), "needed_bytes": self.needed_bytes, "fits": self.fits,
            "most_slots": self.most_slots, "rates": asdict(rates),
            "tokens_per_second": {str(n): self.tokens_per_second(rates, n) for n in sorted({1, self.slots})},
        }  # fmt: skip


def plan_serving(
    config: Any,
    device: Device,
    slots: int | None = None,
    context: int | None = None,
    adapters: int = 0,
    adapter_numbers: int = 0,
    setting: Setting = Setting(),  # noqa: B008 - it is frozen
) -> ServingPlan:
    """What the engine takes for a model of this configuration; no weights are read.

    Args:
        slots: answers written at once; None for the engine's default, or as many as fit.
        context: tokens of a prompt with its answer; None as in the engine.
        adapters: loaded at once, each of `adapter_numbers` parameters.
        setting: `base` and `dtype`, as what the weights are held.

    Raises:
        ConfigError: a context beyond the model's positions, or a model that has no keys and values.
    """
    own = positions_of(config)
    length = min(own or LONGEST, LONGEST) if context is None else context
    check_whole("context", length, least=2)
    if own and length > own:
        raise ConfigError(f"a context of {length} is beyond the {own} positions of this model; choose less")
    config = copy.deepcopy(config)
    resolved, notes = as_stored(config, setting)
    with quiet():
        weights, shapes, parameters, vocabulary = _held(config, resolved)
    itemsize = 2 if resolved.dtype in HALF_PRECISIONS else 4
    each = slot_bytes(shapes, length, itemsize, vocabulary)
    planned = ServingPlan(
        device=device, weights_bytes=weights, adapters=adapters, adapter_bytes=4 * adapter_numbers,
        slots=slots or SLOTS, context=length, slot_bytes=each,
        key_value_bytes=slot_bytes(shapes, length, itemsize, 0), parameters=parameters,
        is_quantized=resolved.is_quantized, dtype=resolved.dtype, notes=notes,
    )  # fmt: skip
    if slots is None:
        return replace(planned, slots=max(1, min(SLOTS, planned.most_slots)))
    return planned


def _held(config: Any, setting: Setting) -> tuple[int, list[tuple[int, int, int]], int, int]:
    """Bytes of the weights, heads and widths of each layer's keys and values, parameters, and the vocabulary."""
    tracker = FakeMemoryTracker()
    tracker.phase = "load"
    with taken_for_real(), tracker.fake, tracker, no_init_weights():
        model = build(config, setting, "CAUSAL_LM")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if setting.is_quantized:
            quantize(model, setting, tracker)
        model.eval()
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(model)}
        try:
            layers = layers_of(prefill(model, 1, PROBED))
            shapes = [(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in layers]
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(
                f"a {type(model).__name__} keeps no keys and values of all tokens, which the engine writes into slots"
            ) from error
    return sum(held.values()), shapes, parameters, vocabulary
