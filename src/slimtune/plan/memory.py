"""A training to plan, and what it takes: a `Setting` in, a `MemoryPlan` out.

Bytes are split by what they are for (`MemoryBreakdown`), at the peak of each phase of a training (`Snapshot`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from slimtune.core.config import PeftConfig
from slimtune.errors import check_choice, check_whole
from slimtune.quantization.config import KINDS, TORCHAO_KINDS
from slimtune.recipe.optimizers import DEFAULT, check_name
from slimtune.recipe.preference import PREFERENCE_TASKS
from slimtune.storage.compressed import WeightScheme

Precision = Literal["dense", "nf4", "fp4", "int8", "int4", "int8-torchao", "int4-torchao"]
Preference = Literal["dpo", "kto", "orpo", "grpo"]

PRECISIONS = ("dense", *KINDS, *TORCHAO_KINDS)
DTYPES = ("bfloat16", "float16", "float32")
ATTENTION = (None, "sdpa", "eager")
DRAWN_TOKENS = 512
"""The longest answer that grpo draws by default."""


@dataclass(frozen=True)
class StoredIntegers:
    """Weights as compressed-tensors stores them: schemes, and the modules that are left as they are."""

    schemes: tuple[WeightScheme, ...]
    ignore: tuple[str, ...]

    @property
    def name(self) -> str:
        """As people call it: W4A16 in groups of 64, and what else there is."""
        return ", ".join(dict.fromkeys(scheme.name for scheme in self.schemes))


@dataclass(frozen=True)
class SharedRows:
    """A micro-batch whose rows begin alike, which training computes as a tree.

    Attributes:
        rows: token ids of each row.
        tokens: of the tree.
        share: of all tokens of batches, padding included, those that are computed, a mean over batches.
    """

    rows: tuple[tuple[int, ...], ...]
    tokens: int
    share: float


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids_BT and mask_BT of rows of different length, padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


@dataclass(frozen=True)
class Sharing:
    """How several devices share a training.

    Attributes:
        shards: whether they divide the model among them (FSDP2), rather than hold a copy each (DDP).
        offloads: whether what is divided waits in main memory.
        regathers: whether a block is gathered anew for the backward pass, and not held until then.
    """

    shards: bool = True
    offloads: bool = False
    regathers: bool = True

    @property
    def label(self) -> str:
        """As people call it."""
        return f"FSDP2{' with offloading' * self.offloads}" if self.shards else "DDP"


FSDP2 = Sharing()


@dataclass(frozen=True)
class Setting:
    """One way to train a model.

    Attributes:
        method: the adapter's config, or None for tuning all weights themselves.
        base: how the linear layers of the base are stored.
        double_quantization: whether the block maxima of a 4-bit base are quantized too.
        stored: how a model that is stored in integers holds its weights; `base` says nothing of those then.
        dtype: of the weights that aren't quantized, and of the products.
        autocast: whether products are computed in bfloat16 over float32 weights.
        batch: examples in a micro-batch.
        sequence: tokens in an example; images have their own size.
        padded: whether examples are of different lengths, so that attention takes a mask.
        accumulation: micro-batches in a step.
        optimizer: by its name in `training.optim`.
        task_type: as in a config's; None for what the method or the model's own config says.
        task: how preferences are learned, or answers by a reward; None for examples with their labels.
        answer: tokens of an answer that is apart from the example: what a decoder writes (None: as many as are read),
            and what grpo draws to a prompt of `sequence` tokens (None: 512). A pair of answers is two examples.
        generations: answers that grpo draws to each prompt.
        shared: the micro-batch itself, where its rows begin alike and that is computed once.
        device: whose kernels are meant: attention and the loss take other memory on a CPU.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ConfigError: a value that can't be.
    """

    method: PeftConfig | None = None
    base: Precision = "dense"
    double_quantization: bool = True
    stored: StoredIntegers | None = None
    dtype: str = "bfloat16"
    autocast: bool = False
    batch: int = 1
    sequence: int = 512
    padded: bool = True
    gradient_checkpointing: bool = False
    accumulation: int = 1
    optimizer: str = DEFAULT
    attention: str | None = None
    task_type: str | None = None
    task: Preference | None = None
    answer: int | None = None
    generations: int = 8
    shared: SharedRows | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_choice("base", self.base, PRECISIONS)
        check_choice("dtype", self.dtype, DTYPES)
        check_name(self.optimizer)
        check_choice("attention", self.attention, ATTENTION)
        check_choice("device", self.device, ("cuda", "cpu"))
        check_choice("task", self.task, (None, *PREFERENCE_TASKS))
        for name in ("batch", "sequence", "accumulation"):
            check_whole(name, getattr(self, name))
        check_whole("generations", self.generations, 2)
        if self.answer is not None:
            check_whole("answer", self.answer)

    @property
    def is_quantized(self) -> bool:
        """Whether weights are held in few bits."""
        return self.base != "dense" or self.stored is not None

    @property
    def drawn_tokens(self) -> int:
        """Of an answer that grpo draws."""
        return self.answer or DRAWN_TOKENS


Phase = Literal["load", "attach", "generation", "forward", "backward", "update", "evaluation", "merge"]

# One optimizer step in the order in which it happens; `generation` is there for grpo alone.
STEP: tuple[Phase, ...] = ("generation", "forward", "backward", "update")
TRAINING: tuple[Phase, ...] = ("load", "attach", *STEP, "evaluation")


@dataclass(frozen=True)
class MemoryBreakdown:
    """Live bytes at one time by what they are for, each storage in one part.

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
        # Not by `astuple`, which copies: a simulation asks a thousand times.
        return sum(vars(self).values())

    def named(self) -> dict[str, int]:
        """The bytes by the part's name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True)
class Snapshot:
    """The peak of a phase: its bytes, and the module and the operation at which it is reached."""

    phase: Phase
    module: str
    operation: str
    parts: MemoryBreakdown

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
        snapshots: the peak of each phase that was simulated, in their order.
        trainable_bytes: of what is trained.
        activations: bytes kept for the backward pass by module; a number of `*` stands for all blocks together.
        block_bytes: the parameters of the largest block: what sharded training holds whole at a time.
        paged_bytes: optimizer state that lies in the memory of the machine, not of the device.
        work: of one training step, by phase; all micro-batches of an accumulation.
        notes: what is estimated and not simulated, a sentence each.
    """

    setting: Setting
    snapshots: tuple[Snapshot, ...]
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
    def peak(self) -> Snapshot:
        """The peak of loading, attaching and training, evaluations in between included if simulated."""
        return fullest(snapshot for snapshot in self.snapshots if snapshot.phase in TRAINING)

    @property
    def peak_bytes(self) -> int:
        return self.peak.total

    def at(self, phase: Phase) -> Snapshot:
        """The peak of one phase. Raises: KeyError, where it wasn't simulated."""
        matching = [snapshot for snapshot in self.snapshots if snapshot.phase == phase]
        if not matching:
            raise KeyError(phase)
        return matching[0]

    @property
    def adapter_bytes(self) -> int:
        """What the method adds, without the copy that training keeps of what it trains."""
        # The part `adapter` holds trained factors and the copy of them that training goes back to: as many bytes again.
        return self.peak.parts.adapter - (self.trainable_bytes if self.setting.method is not None else 0)

    def sharded(self, devices: int, sharing: Sharing = FSDP2) -> MemoryBreakdown:
        """An estimate of what each of several devices holds at most, each with a micro-batch of its own.

        Under FSDP2 parameters, gradients and the optimizer's state are divided. Two blocks are whole at a time, for the
        next one is gathered while this one computes; so are the gradients of one block until they are scattered. Under
        DDP each device holds all of it, and the gradients a second time, on their way to the others.
        """
        if devices == 1 and not sharing.offloads:
            return self.peak.parts
        # What is fullest on one device, as an update of all weights, need not be once it is divided.
        return max((self._share(m.parts, devices, sharing) for m in self.snapshots if m.phase in TRAINING), key=_total)

    def _share(self, parts: MemoryBreakdown, devices: int, sharing: Sharing) -> MemoryBreakdown:
        if not sharing.shards:
            return replace(parts, workspace=parts.workspace + self.trainable_bytes)
        # FSDP2 gathers the parameters of block i + 1 while block i computes: two blocks, and one block of gradients on
        # its way to be reduced and scattered.
        whole = 2 * self.block_bytes + self.trainable_block_bytes
        shares = {
            # Rounded up: shards are padded to equal sizes. What is offloaded comes block by block.
            name: 0 if sharing.offloads else -(-getattr(parts, name) // devices)
            for name in ("weights", "adapter", "gradients", "optimizer")
        }
        if not sharing.regathers:
            # Blocks that were gathered for the forward pass stay whole until backward is through them.
            whole = max(whole, parts.weights)
        return replace(parts, **shares, workspace=parts.workspace + whole)

    def exchanged_bytes(self, devices: int, sharing: Sharing = FSDP2) -> int:
        """What each of several devices sends in a micro-batch; as much comes in. Under DDP, the gradients.

        Under FSDP2:

        All parameters are gathered for the forward pass and again for the backward pass, gradients are reduced and
        scattered once: 3 (N-1)/N of what is held where all of it is trained. Rajbhandari et al. 2020,
        arXiv:1910.02054, section 7.
        """
        parts = self.peak.parts
        # All-gather twice (forward, and again in backward after the parameters were freed) and reduce-scatter once; in
        # a ring each device sends (N - 1) / N of all bytes per collective.
        gathered = parts.weights + (self.trainable_bytes if self.setting.method is not None else 0)
        times = 1 + sharing.regathers
        # An all-reduce is a reduce-scatter and an all-gather.
        total = times * gathered + self.trainable_bytes if sharing.shards else 2 * self.trainable_bytes
        return total * (devices - 1) // devices


def _total(parts: MemoryBreakdown) -> int:
    return parts.total


def fullest(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The snapshot with most bytes, the first of several."""
    return max(snapshots, key=lambda snapshot: snapshot.total)
