"""What is known about choosing a method and its settings: each rule a function, with its evidence for and against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slimtune.data.lengths import Lengths
from slimtune.errors import check_choice

GOALS = {
    "task": "answer in a way, a format or a domain that the data shows",
    "quality": "the same, and the last bit of quality counts more than time",
    "fast": "the same, as soon as possible",
    "domain": "continued pre-training, or a shift to a language or field that the base hardly knows",
    "tiny": "the smallest adapter, for very many tasks on one base",
}

RANKS = (8, 16, 32, 64, 128, 256)
USUAL_RANK = 16
DOMAIN_RANK = 64
FULL_RATE = 2e-5
LARGEST_BATCH = 16
FEWEST_STEPS = 50
BITS_PER_PARAMETER = 2

LORA = "Hu et al. 2021, arXiv:2106.09685"
QLORA = "Dettmers et al. 2023, arXiv:2305.14314"
LEARNS_LESS = "Biderman et al. 2024, arXiv:2405.09673"
WITHOUT_REGRET = "Schulman et al. 2025, LoRA Without Regret"
MEASURED = "measured here: docs/methods.md"


@dataclass(frozen=True)
class Case:
    """What rules look at.

    Attributes:
        lengths: of the user's data, None where none was given.
        numbers_per_rank: parameters of an adapter of rank 1 on all linear layers.
        dense_fits: whether LoRA on the 16-bit base goes into the device's memory.
        full_fits: whether full tuning does.
        is_served_tight: whether the device that the result is for can't hold the 16-bit base.
        rank: of the choice that is judged.
    """

    goal: str
    lengths: Lengths | None = None
    epochs: float = 3.0
    devices: int = 1
    numbers_per_rank: int = 0
    dense_fits: bool = True
    full_fits: bool = False
    is_served_tight: bool = False
    rank: int = USUAL_RANK

    def __post_init__(self) -> None:
        check_choice("goal", self.goal, tuple(GOALS))

    @property
    def learned(self) -> int | None:
        """Tokens of one epoch that are learned from."""
        return None if self.lengths is None else self.lengths.learned


@dataclass(frozen=True)
class Rule:
    """One piece of advice.

    Attributes:
        text: one sentence.
        evidence: who found it.
        against: what others found, where they disagree.
        decide: its value in a case; None where it doesn't apply.
    """

    name: str
    text: str
    evidence: str
    against: str
    decide: Callable[[Case], Any]

    def __call__(self, case: Case) -> Any:
        return self.decide(case)


RULES: dict[str, Rule] = {}


def _rule(text: str, evidence: str, against: str = "") -> Callable[[Callable[[Case], Any]], Rule]:
    def enrol(decide: Callable[[Case], Any]) -> Rule:
        rule = Rule(decide.__name__.replace("_", "-"), text, evidence, against, decide)
        RULES[rule.name] = rule
        return rule

    return enrol


@_rule(
    "Before tuning anything, put a few of your examples into the prompt: that costs minutes, and is the bar to beat.",
    "Brown et al. 2020, arXiv:2005.14165",
    "Liu et al. 2022, arXiv:2205.05638: tuning a few parameters is both better and cheaper in use than many examples "
    "in each prompt; Mosbach et al. 2023, arXiv:2305.16938: level with tuning at the same model size.",
)
def in_context_first(case: Case) -> bool | None:
    """Whether examples in the prompt are worth a try: a classifier's head and a new domain don't come that way."""
    is_classifier = case.lengths is not None and bool(case.lengths.labels)
    return None if is_classifier or case.goal == "domain" else True


@_rule(
    "Adapt all linear layers: which layers are adapted matters more than the rank.",
    f"{QLORA} (figure 2); {WITHOUT_REGRET}: attention alone falls behind, even with as many parameters",
    f"{LORA} adapted query and value alone, and found that enough on GPT-3.",
)
def all_linear(case: Case) -> str:
    """The targets."""
    return "all-linear"


@_rule(
    "alpha = 2 * rank: a scale of 2 at every rank.",
    LEARNS_LESS,
    f"Kalajdzievski 2023, arXiv:2312.03732: alpha / sqrt(rank) learns better at ranks above 64; {WITHOUT_REGRET} keeps "
    "alpha at 32 for all ranks.",
)
def alpha(case: Case) -> int:
    """Alpha of the case's rank."""
    return 2 * case.rank


@_rule(
    "A learning rate of about ten times that of full tuning, and the same for nearly every rank.",
    f"{WITHOUT_REGRET}; {LEARNS_LESS}",
    f"{LEARNS_LESS} also finds LoRA more sensitive to the rate than full tuning: try half and twice of it.",
)
def learning_rate(case: Case) -> float:
    """LoRA's rate."""
    return 10 * FULL_RATE


@_rule(
    "The rank follows the supervised tokens: an adapter keeps about 2 bits a parameter, a token brings one at most.",
    f"Allen-Zhu & Li 2024, arXiv:2404.05405 (2 bits a parameter); {WITHOUT_REGRET} (LoRA falls behind once the data "
    "exceeds its capacity)",
    f"{QLORA} and {LORA} see no gain from larger ranks on instruction data.",
)
def rank(case: Case) -> int:
    """The smallest usual rank whose capacity holds the data, no less than 16, or 64 for a domain."""
    least = DOMAIN_RANK if case.goal == "domain" else RANKS[0] if case.goal == "tiny" else USUAL_RANK
    # Capacity in bits = 2 * parameters, parameters = rank * (those of rank 1): rank >= tokens / (2 * those of rank 1).
    bits = BITS_PER_PARAMETER * case.numbers_per_rank
    fitting = [size for size in RANKS if size >= least and size * bits >= (case.learned or 0)]
    return fitting[0] if fitting else RANKS[-1]


@_rule(
    "An effective batch below 32: LoRA loses more by large batches than full tuning does, at any rank.",
    WITHOUT_REGRET,
)
def effective_batch(case: Case) -> int:
    """16, and less where the data would give fewer than 50 steps."""
    size = LARGEST_BATCH
    # Steps = examples * epochs / batch: with fewer than 50 the schedule of the rate has hardly a middle.
    while case.lengths is not None and size > 4 and case.lengths.examples * case.epochs / size < FEWEST_STEPS:
        size //= 2
    return size


@_rule(
    "DoRA where quality counts more than time: it mostly closes part of the gap between LoRA and full tuning.",
    "Liu et al. 2024, arXiv:2402.09353",
    f"{MEASURED}: level with LoRA within the interval on two small tasks, and a quarter slower a step.",
)
def dora(case: Case) -> str | None:
    """DoRA ahead of LoRA."""
    return "dora" if case.goal == "quality" else None


@_rule(
    "A 4-bit base (QLoRA: NF4 with double quantization) where the 16-bit one does not fit.",
    f"{QLORA}: no loss against 16 bits on instruction tuning, up to 65B",
    "Li et al. 2023, arXiv:2310.08659 (LoftQ): a gap to 16 bits remains on harder tasks; each weight is expanded twice "
    "a step, three times with checkpointing, which the times above count: little where a micro-batch has a thousand "
    "tokens (1.05 times a step in bf16 on a CPU, docs/quantized.md), half as much again where it has a hundred.",
)
def qlora(case: Case) -> str | None:
    """The base's precision."""
    return None if case.dense_fits else "nf4"


@_rule(
    "A soft prompt where the adapter has to be tiny: kilobytes a task, one base for all tasks in a batch.",
    "Lester et al. 2021, arXiv:2104.08691: level with full tuning at 10B parameters",
    f"the same paper: far behind on small models; {MEASURED}: the lowest scores of all methods that reach into the "
    "model, and no less memory in training than LoRA.",
)
def soft_prompt(case: Case) -> str | None:
    """Prompt tuning ahead of all others."""
    return "prompt-tuning" if case.goal == "tiny" else None


@_rule(
    "Full tuning, or LoRA of a high rank, for continued pre-training and large shifts of domain.",
    f"{LEARNS_LESS}: LoRA stays behind full tuning on 20B tokens of code and mathematics; {WITHOUT_REGRET}",
    f"{LEARNS_LESS} also: what is tuned fully forgets more; Shuttleworth et al. 2024, arXiv:2410.21228: LoRA of low "
    "rank brings in directions of its own that forget too. Measure it on your own old tasks.",
)
def full_for_domains(case: Case) -> str | None:
    """Full tuning ahead of LoRA, a high rank where it doesn't fit."""
    if case.goal != "domain":
        return None
    return "full" if case.full_fits else "lora"


@_rule(
    "Plenty of memory: keep the base in 16 bits and skip checkpointing; full tuning is open to you, but try LoRA "
    "first, which is as good on data of ordinary size and leaves one file of megabytes.",
    f"{WITHOUT_REGRET}; {LEARNS_LESS}",
)
def plenty(case: Case) -> bool | None:
    """Whether full tuning fits."""
    return True if case.full_fits else None


@_rule(
    "Not enough memory for the 16-bit base: quantize it, then checkpoint, then shorten the batch and accumulate; each "
    "costs time rather than quality.",
    f"{QLORA}; Chen et al. 2016, arXiv:1604.06174 (checkpointing)",
)
def not_enough(case: Case) -> bool | None:
    """Whether LoRA on the 16-bit base doesn't fit."""
    return None if case.dense_fits else True


@_rule(
    "A target that is tight at inference: tune on the very base that will be served, quantized the same way, and keep "
    "the adapter apart; or merge into 16 bits, quantize the result and score it again.",
    "Xu et al. 2023, arXiv:2309.14717 (QA-LoRA): merging an adapter and quantizing afterwards loses accuracy",
)
def tight_inference(case: Case) -> str | None:
    """The precision to tune in."""
    return "nf4" if case.is_served_tight else None
