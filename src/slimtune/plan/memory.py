"""What a simulated training takes: bytes by what they are for, at the fullest moment of each phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Literal

from slimtune.plan.setting import Setting

Phase = Literal["load", "attach", "generation", "forward", "backward", "update", "evaluation", "merge"]

STEP: tuple[Phase, ...] = ("generation", "forward", "backward", "update")
TRAINING: tuple[Phase, ...] = ("load", "attach", *STEP, "evaluation")


@dataclass(frozen=True)
class Parts:
    """Bytes that are live at one moment, each storage in one part.

    Attributes:
        weights: the base: weights as they are stored, codes and scales of a quantized one, buffers.
        adapter: what the method adds and keeps between steps, and the copy of it that training can go back to.
        gradients: of what is trained.
        optimizer: the optimizer's state.
        activations: what the forward pass keeps for the backward pass, the batch included.
        loss: the logits, or the chunk of them that is there, and what the loss makes of them.
        workspace: everything else, gone within its operation's module.
    """

    weights: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    loss: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def named(self) -> dict[str, int]:
        """The bytes by the part's name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a phase: in which module it comes, and at which operation."""

    phase: Phase
    module: str
    operation: str
    parts: Parts

    @property
    def total(self) -> int:
        return self.parts.total


@dataclass(frozen=True)
class Work:
    """What a phase computes and moves: floating-point operations, and bytes read and written by them."""

    flops: int = 0
    bytes_moved: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """What one training step takes in its steady state: the optimizer's state is there from the step before.

    Attributes:
        moments: the fullest moment of each phase that was simulated, in their order.
        trainable_bytes: of what is trained.
        activations: bytes kept for the backward pass by module; a number of `*` stands for all blocks together.
        block_bytes: the parameters of the largest block: what sharded training holds whole at a time.
        paged_bytes: optimizer state that lies in the memory of the machine, not of the device.
        work: of one training step, by phase; all micro-batches of an accumulation.
        notes: what is estimated and not simulated, a sentence each.
    """

    setting: Setting
    moments: tuple[Moment, ...]
    activations: Mapping[str, int]
    parameters: int
    trainable: int
    trainable_bytes: int
    block_bytes: int
    trainable_block_bytes: int
    paged_bytes: int = 0
    work: Mapping[Phase, Work] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> Moment:
        """The fullest moment of loading, attaching and training, evaluations in between included if simulated."""
        return fullest(moment for moment in self.moments if moment.phase in TRAINING)

    @property
    def peak_bytes(self) -> int:
        return self.peak.total

    def at(self, phase: Phase) -> Moment:
        """The fullest moment of one phase. Raises: KeyError, where it wasn't simulated."""
        found = [moment for moment in self.moments if moment.phase == phase]
        if not found:
            raise KeyError(phase)
        return found[0]

    @property
    def adapter_bytes(self) -> int:
        """What the method adds, without the copy that training keeps of what it trains."""
        return self.peak.parts.adapter - (self.trainable_bytes if self.setting.method is not None else 0)

    def sharded(self, devices: int) -> Parts:
        """An estimate of what each of several devices holds under FSDP2 at most, each with a micro-batch of its own.

        Parameters, gradients and the optimizer's state are divided. Two blocks are whole at a time, for the next one
        is gathered while this one computes; so are the gradients of one block until they are scattered.
        """
        if devices == 1:
            return self.peak.parts
        # What is fullest on one device, as an update of all weights, need not be once it is divided.
        return max((self._share(m.parts, devices) for m in self.moments if m.phase in TRAINING), key=_total)

    def _share(self, parts: Parts, devices: int) -> Parts:
        whole = 2 * self.block_bytes + self.trainable_block_bytes
        shares = {
            name: -(-getattr(parts, name) // devices) for name in ("weights", "adapter", "gradients", "optimizer")
        }
        return replace(parts, **shares, workspace=parts.workspace + whole)

    def exchanged_bytes(self, devices: int) -> int:
        """What each of several devices sends in a micro-batch under FSDP2; as much comes in.

        All parameters are gathered for the forward pass and again for the backward pass, gradients are reduced and
        scattered once: 3 (N-1)/N of what is held where all of it is trained. Rajbhandari et al. 2020,
        arXiv:1910.02054, section 7.
        """
        parts = self.peak.parts
        gathered = parts.weights + (self.trainable_bytes if self.setting.method is not None else 0)
        return (2 * gathered + self.trainable_bytes) * (devices - 1) // devices


def _total(parts: Parts) -> int:
    return parts.total


def fullest(moments: Iterable[Moment]) -> Moment:
    """The moment with most bytes, the first of several."""
    return max(moments, key=lambda moment: moment.total)
