"""Which method and settings to choose: every candidate is fitted into the device, and the goal orders them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from slimtune.data.lengths import Lengths
from slimtune.errors import ConfigError, check_choice, listing
from slimtune.models.compatibility import Verdict, verdicts
from slimtune.plan import rules
from slimtune.plan.beginnings import Beginnings
from slimtune.plan.devices import Device
from slimtune.plan.memory import FSDP2, PRECISIONS, MemoryBreakdown, MemoryPlan, Precision, Setting, Sharing
from slimtune.plan.rules import Case, Rule
from slimtune.plan.time import Duration, Rates, duration
from slimtune.recipe.optimizers import DEFAULT
from slimtune.recipe.preference import PREFERENCE_TASKS, SHARE_OF_RATE

FULL = "full"
LOW_RANK = ("lora", "dora")

BASES: tuple[Precision, ...] = ("dense", "nf4", "int8")
"""The bases that are tried where none is given."""

_LORA: tuple[tuple[str, Precision], ...] = (("lora", "dense"), ("lora", "nf4"), ("lora", "int8"))
_OTHERS: tuple[tuple[str, Precision], ...] = ((FULL, "dense"), ("ia3", "nf4"))
ORDER: dict[str, tuple[tuple[str, Precision], ...]] = {
    "task": (("lora", "dense"), ("dora", "dense"), ("lora", "nf4"), ("lora", "int8"), *_OTHERS),
    "quality": (("dora", "dense"), ("lora", "dense"), ("dora", "nf4"), ("lora", "nf4"), *_OTHERS),
    "fast": (*_LORA, ("ia3", "dense"), *_OTHERS),
    "domain": ((FULL, "dense"), *_LORA),
    "tiny": (("prompt-tuning", "dense"), ("ia3", "dense"), ("prompt-tuning", "nf4"), *_LORA),
}
"""What is tried for each goal, the best first: the order is that of the rules and of what they name as evidence."""


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is made for: device, data, and the settings to choose among.

    Attributes:
        methods: to choose among, by the names of `slimtune methods`; None for those of the goal.
        bases: precisions of the base to choose among; None for all.
        rank, batch: as wanted; None for what the rules say.
        sequence: the longest example, in tokens.
        dtype: of what isn't quantized.
        task: as a recipe names it; `task_type` as an adapter's config does.
        answer, generations: as in a `Setting`.
        optim, attention: by name.
        devices: GPUs that share the training, by `sharing`.
        is_stored_quantized: whether the base is stored in few bits, and so has no other precision to choose.
        parameters: of the base, 0 if they weren't counted.
        beginnings: of the examples, where training shares what rows begin with alike.
        share_prefixes, group_prefixes: as given.
        served_on: the device that the result has to run on, where that is another one.
    """

    device: Device
    lengths: Lengths
    sequence: int
    goal: str = "task"
    has_data: bool = True
    epochs: float = 3.0
    methods: Sequence[str] | None = None
    bases: Sequence[Precision] | None = None
    rank: int | None = None
    batch: int | None = None
    accumulation: int | None = None
    checkpointing: bool | None = None
    dtype: str = "bfloat16"
    task: str = "text"
    task_type: str | None = "CAUSAL_LM"
    answer: int | None = None
    generations: int = 8
    optim: str = DEFAULT
    attention: str | None = None
    devices: int = 1
    sharing: Sharing = FSDP2
    is_stored_quantized: bool = False
    parameters: int = 0
    beginnings: Beginnings | None = None
    share_prefixes: bool | None = None
    group_prefixes: bool = False
    served_on: Device | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Choice:
    """One way to train, with what it takes and why.

    Attributes:
        fits: whether the device holds it.
        is_tight: whether it fits, but into the margin that advice leaves free.
        needed_bytes: of each device's memory, the runtime (context and fragmentation) included.
        adapter_bytes: what is written at the end.
        reasons: the rules that speak for it and for its settings.
    """

    method: str
    base: Precision
    plan: MemoryPlan
    parts: MemoryBreakdown
    fits: bool
    is_tight: bool
    needed_bytes: int
    adapter_bytes: int
    learning_rate: float
    rank: int | None
    duration: Duration
    reasons: tuple[Rule, ...]
    engines: tuple[Verdict, ...]

    @property
    def setting(self) -> Setting:
        """Batch, precision, checkpointing."""
        return self.plan.setting

    @property
    def runtime_bytes(self) -> int:
        """What is needed beside the live tensors."""
        return self.needed_bytes - self.parts.total

    @property
    def merge_bytes(self) -> int | None:
        """The most that merging takes, None where it wasn't simulated or can't be done."""
        return next((snapshot.total for snapshot in self.plan.snapshots if snapshot.phase == "merge"), None)

    @property
    def label(self) -> str:
        """The method with its base, as people call it."""
        stored = {"nf4": "NF4", "fp4": "FP4"}.get(self.base, self.base)
        return self.method if self.base == "dense" else f"{self.method} on {stored}"


Simulate = Callable[[Setting], MemoryPlan]


def recommend(
    request: PlanRequest, simulate: Simulate, rates: Rates, numbers_per_rank: int = 0
) -> tuple[Case, list[Choice]]:
    """All candidates of a goal: those that fit in its order, then the others by what they need.

    Raises:
        ConfigError: a method, a goal or a setting that can't be.
    """
    case = Case(
        goal=request.goal,
        lengths=request.lengths if request.has_data else None,
        epochs=request.epochs,
        devices=request.devices,
        numbers_per_rank=numbers_per_rank,
    )
    choices = [_choice(method, base, request, case, simulate, rates) for method, base in _candidates(request)]
    case = _judged(case, choices, request)
    reasoned = [replace(choice, reasons=tuple(_reasons(choice, case))) for choice in choices]
    order = _order_with_room(reasoned, _preferred(case, request))
    return case, sorted(
        reasoned,
        key=lambda choice: (False, order[choice.method, choice.base]) if choice.fits else (True, choice.needed_bytes),
    )


def _order_with_room(
    choices: Sequence[Choice], preferred: Sequence[tuple[str, Precision]]
) -> dict[tuple[str, Precision], float]:
    """The order of preference, in which what is tight comes behind the same kind of method with room, if there is any.

    It doesn't come behind other kinds: LoRA that fills a card is still more than IA3 that doesn't.
    """
    order = {candidate: float(number) for number, candidate in enumerate(preferred)}
    with_room: dict[str, float] = {}
    for choice in choices:
        if choice.fits and not choice.is_tight:
            kind = _kind(choice.method)
            with_room[kind] = max(order[choice.method, choice.base], with_room.get(kind, 0.0))
    behind: dict[tuple[str, Precision], float] = {
        (c.method, c.base): with_room[_kind(c.method)] + 0.5
        for c in choices
        if c.is_tight and _kind(c.method) in with_room
    }
    return order | behind


def _kind(method: str) -> str:
    return LOW_RANK[0] if method in LOW_RANK else method


def _candidates(request: PlanRequest) -> list[tuple[str, Precision]]:
    from slimtune.recipe.method import FEATURES, find

    for base in request.bases or ():
        check_choice("base", base, PRECISIONS)
    for method in request.methods or ():
        if find(method).name == FEATURES:
            raise ConfigError("--method features trains nothing of the model; plan another method")
    # All weights of a quantized base can't be trained in place.
    order = _as_it_is(request) if request.is_stored_quantized else _order(request)
    candidates: list[tuple[str, Precision]] = [one for one in order if one[0] != FULL or one[1] == "dense"]
    if not candidates:
        raise ConfigError(f"full tuning needs a dense base, found {listing(request.bases or ())}; plan it on dense")
    return candidates


def _as_it_is(request: PlanRequest) -> list[tuple[str, Precision]]:
    """The methods of the request on a base that is stored in few bits: each on that. Raises: ConfigError."""
    if request.bases is not None:
        raise ConfigError(
            "the model is stored in few bits already, so that no other base can be planned; leave --base out"
        )
    methods = dict.fromkeys(method for method, _ in _order(replace(request, bases=None)))
    if list(methods) == [FULL]:
        raise ConfigError("full tuning needs a dense base, and the model is stored in few bits; plan its dense form")
    return [(method, "dense") for method in methods if method != FULL]


def _order(request: PlanRequest) -> list[tuple[str, Precision]]:
    """Methods and bases of the request, or what the goal suggests within it; on a base that no goal suggests, LoRA."""
    if request.methods is not None:
        bases: Sequence[Precision] = request.bases or BASES
        combinations: list[tuple[str, Precision]] = [(method, base) for method in request.methods for base in bases]
        return combinations
    goal: tuple[tuple[str, Precision], ...] = ORDER[request.goal]
    if request.task in PREFERENCE_TASKS:
        # TRL reads a model's layers past what is put around the whole model.
        goal = tuple(candidate for candidate in goal if candidate[0] != "prompt-tuning")
    if request.bases is None:
        return list(goal)
    others: list[tuple[str, Precision]] = [("lora", base) for base in request.bases if base not in {b for _, b in goal}]
    return [*(candidate for candidate in goal if candidate[1] in request.bases), *others]


def _preferred(case: Case, request: PlanRequest) -> list[tuple[str, Precision]]:
    """The candidates in the order of preference: what will be served in 4 bits is tuned in 4 bits."""
    candidates = _candidates(request)
    wanted = rules.tight_inference(case)
    return candidates if wanted is None else sorted(candidates, key=lambda candidate: candidate[1] != wanted)


def _judged(case: Case, choices: Sequence[Choice], request: PlanRequest) -> Case:
    """The case with what the simulations have shown."""
    fits = {(choice.method, choice.base): choice.fits and not choice.is_tight for choice in choices}
    dense = [choice for choice in choices if choice.base == "dense" and choice.method != FULL]
    served = request.served_on
    return replace(
        case,
        dense_fits=any(fits[choice.method, choice.base] for choice in dense) if dense else True,
        full_fits=fits.get((FULL, "dense"), False),
        is_served_tight=bool(served and dense and not served.takes(dense[0].plan.peak.parts.weights)),
    )


def _choice(method: str, base: Precision, request: PlanRequest, case: Case, simulate: Simulate, rates: Rates) -> Choice:
    from slimtune.recipe.method import configure, find

    known = find(method)
    size = (request.rank or rules.rank(case)) if method in LOW_RANK else None
    config = None if method == FULL else configure(known, {"r": size} if size else {})
    if config is not None and request.task_type is not None:
        config.task_type = request.task_type
    plan = _fitted(_first_setting(method, base, config, request), request, case, simulate)
    parts = plan.sharded(request.devices, request.sharing)
    # Preferences are learned at a share of the rate that suits supervised tuning.
    share = SHARE_OF_RATE if request.task in PREFERENCE_TASKS else 1
    return Choice(
        method=method,
        base=base,
        plan=plan,
        parts=parts,
        fits=request.device.takes(parts.total),
        is_tight=request.device.advised_bytes < parts.total <= request.device.room_bytes,
        needed_bytes=request.device.needed_bytes(parts.total),
        adapter_bytes=plan.peak.parts.weights if method == FULL else plan.adapter_bytes,
        learning_rate=known.config.learning_rate * share,
        rank=size,
        duration=duration(
            plan, request.lengths, request.epochs, request.device, rates, request.devices, request.sharing
        ),
        reasons=(),
        engines=tuple(verdicts(config.to_dict(), [])) if config is not None else (),
    )


def _first_setting(method: str, base: Precision, config: Any, request: PlanRequest) -> Setting:
    """What a method is tried with, before batch and checkpoints are fitted."""
    is_full = method == FULL
    return Setting(
        method=config,
        base=base,
        dtype="float32" if is_full else request.dtype,
        autocast=is_full and request.dtype == "bfloat16",
        sequence=request.sequence,
        padded=request.lengths.tokens[0] != request.lengths.longest,
        optimizer=request.optim,
        attention=request.attention,
        task_type=request.task_type,
        task=request.task if request.task in PREFERENCE_TASKS else None,  # type: ignore[arg-type]
        answer=request.answer,
        generations=request.generations,
        device="cpu" if request.device.is_cpu else "cuda",
        trust_remote_code=request.trust_remote_code,
    )


def _fitted(first: Setting, request: PlanRequest, case: Case, simulate: Simulate) -> MemoryPlan:
    """The plan of the largest micro-batch that leaves the margin free, without checkpointing if any does.

    Where none does, the margin is given up; where nothing fits, it is the smallest micro-batch. What is accumulated
    makes up for a smaller one.
    """
    # Each device has a micro-batch of its own.
    # Examples a step as wanted, divided by the devices and rounded up.
    effective = (
        request.batch * (request.accumulation or 1)
        if request.batch
        else -(-rules.effective_batch(case) // request.devices)
    )

    @cache
    def planned(batch: int, checkpointing: bool) -> MemoryPlan:
        accumulation = request.accumulation or _accumulation(batch, effective, first)
        setting = replace(first, batch=batch, accumulation=accumulation, gradient_checkpointing=checkpointing)
        return simulate(setting if request.beginnings is None else request.beginnings.shared_in(setting))

    options = (False, True) if request.checkpointing is None else (request.checkpointing,)
    is_hopeless = _is_hopeless(first, request)
    # One room on a processor, which has no margin.
    rooms = dict.fromkeys((request.device.advised_bytes, request.device.room_bytes))
    for room, checkpointing in product(rooms, options):
        # Halving: powers of two are what batches are, and each simulation costs seconds.
        batch = 0 if is_hopeless else request.batch or effective
        while batch:
            plan = planned(batch, checkpointing)
            if plan.sharded(request.devices, request.sharing).total <= room:
                return plan
            batch = 0 if request.batch else _smaller(plan, request, room)
    return planned(request.batch or 1, options[-1])


def _accumulation(batch: int, effective: int, setting: Setting) -> int:
    """How many micro-batches make a step; for grpo as many as hold whole groups of answers to one prompt."""
    accumulation = max(1, effective // batch)
    while setting.task == "grpo" and accumulation * batch % setting.generations:
        accumulation += 1
    return accumulation


def _is_hopeless(setting: Setting, request: PlanRequest) -> bool:
    """Whether the parameters alone are too many, so that no batch has to be tried."""
    # Bytes a parameter: 4 or 2 dense, 0.5 for 4-bit codes without their scales, 1 for int8: a lower bound of all.
    dense = 4 if setting.dtype == "float32" else 2
    stored = {"dense": dense, "nf4": 0.5, "fp4": 0.5}.get(setting.base, 1)
    if request.is_stored_quantized:
        stored = 0.5
    if setting.method is None:
        # The gradients, and Adam's two moments; the state of other optimizers may be smaller, or lie elsewhere.
        # Weights, gradients and Adam's two moments of the same type: four times the weights.
        stored *= 4 if setting.optimizer == DEFAULT else 2
    if request.sharing.offloads:
        return False
    return request.parameters * stored > request.device.room_bytes * (request.devices if request.sharing.shards else 1)


def _smaller(plan: MemoryPlan, request: PlanRequest, room: int) -> int:
    """The largest half of a half of a plan's micro-batch that may fit; 0 if not even a single example can."""
    parts = plan.sharded(request.devices, request.sharing)
    # Activations are linear in the micro-batch, all else does not depend on it.
    lasting = parts.weights + parts.adapter + parts.gradients + parts.optimizer
    batch = plan.setting.batch // 2
    while batch and lasting + parts.activations * batch / plan.setting.batch > room:
        batch //= 2
    return batch


def _reasons(choice: Choice, case: Case) -> Iterator[Rule]:
    """The rules that led to a choice, those on the method first."""
    case = replace(case, rank=choice.rank or case.rank)
    if rules.in_context_first(case):
        yield rules.in_context_first
    on_method: dict[str, Any] = {
        "dora": rules.dora,
        "prompt-tuning": rules.soft_prompt,
        FULL: rules.full_for_domains,
        "lora": rules.full_for_domains,
    }
    rule = on_method.get(choice.method)
    if rule and rule(case) == choice.method:
        yield rule
    if choice.base == "nf4" and rules.qlora(case):
        yield rules.qlora
    if rules.tight_inference(case):
        yield rules.tight_inference
    if rules.plenty(case):
        yield rules.plenty
    elif rules.not_enough(case):
        yield rules.not_enough
    if choice.method in LOW_RANK:
        yield from (rules.all_linear, rules.rank, rules.alpha, rules.learning_rate)
    yield rules.effective_batch
