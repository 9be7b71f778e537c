"""Each rule of the recommendation: what it says in the cases that it is for, and that it names its evidence."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from slimtune.data.lengths import Lengths
from slimtune.errors import ConfigError
from slimtune.plan import rules
from slimtune.plan.data import uniform
from slimtune.plan.rules import RULES, Case

TASK = Case("task", uniform(100, 1000), numbers_per_rank=300_000)
LABELS = Lengths((5, 6), learned=2, labels=("a", "b"))


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_each_rule_is_a_sentence_with_its_evidence(rule: rules.Rule) -> None:
    assert rule.text.endswith(".")
    assert re.search(r"20\d\d|measured here", rule.evidence)


def test_the_rules_that_the_library_stands_for() -> None:
    assert set(RULES) == {
        "in-context-first", "all-linear", "alpha", "learning-rate", "rank", "effective-batch", "dora", "qlora",
        "soft-prompt", "full-for-domains", "plenty", "not-enough", "tight-inference",
    }  # fmt: skip


def test_conflicting_evidence_is_told() -> None:
    assert {name for name, rule in RULES.items() if rule.against} >= {"rank", "alpha", "dora", "qlora", "soft-prompt"}


def test_in_context_learning_comes_first_where_text_is_written() -> None:
    assert rules.in_context_first(TASK)
    assert rules.in_context_first(Case("task"))
    assert rules.in_context_first(replace(TASK, lengths=LABELS)) is None
    assert rules.in_context_first(replace(TASK, goal="domain")) is None


def test_all_linear_layers() -> None:
    assert rules.all_linear(TASK) == "all-linear"


@pytest.mark.parametrize("rank", [8, 16, 256])
def test_alpha_is_twice_the_rank_and_the_rate_does_not_follow_it(rank: int) -> None:
    case = replace(TASK, rank=rank)
    assert rules.alpha(case) == 2 * rank
    assert rules.learning_rate(case) == pytest.approx(2e-4)


def test_the_rate_is_ten_times_that_of_full_tuning_and_the_commands_own() -> None:
    from slimtune.recipe.method import find

    assert rules.learning_rate(TASK) == pytest.approx(10 * find("full").config.learning_rate)
    assert rules.learning_rate(TASK) == pytest.approx(find("lora").config.learning_rate)


@pytest.mark.parametrize(
    ("goal", "learned", "rank"),
    [
        ("task", 0, 16),
        ("task", 9_600_000, 16),
        ("task", 9_600_001, 32),
        ("task", 10**12, 256),
        ("domain", 1000, 64),
        ("domain", 50_000_000, 128),
        ("tiny", 1000, 8),
    ],
)
def test_the_rank_follows_the_supervised_tokens(goal: str, learned: int, rank: int) -> None:
    assert rules.rank(Case(goal, Lengths((10,), learned), numbers_per_rank=300_000)) == rank


def test_the_usual_rank_without_data() -> None:
    assert rules.rank(Case("task", None, numbers_per_rank=300_000)) == 16


@pytest.mark.parametrize(("examples", "batch"), [(100_000, 16), (267, 16), (266, 8), (10, 4), (None, 16)])
def test_the_batch_stays_below_32_and_leaves_steps_to_take(examples: int | None, batch: int) -> None:
    lengths = None if examples is None else uniform(10, examples)
    assert rules.effective_batch(replace(TASK, lengths=lengths)) == batch


def test_dora_when_quality_counts_more_than_time() -> None:
    assert rules.dora(replace(TASK, goal="quality")) == "dora"
    assert rules.dora(TASK) is None


def test_qlora_when_the_16_bit_base_does_not_fit() -> None:
    assert rules.qlora(replace(TASK, dense_fits=False)) == "nf4"
    assert rules.qlora(TASK) is None


def test_soft_prompts_when_the_adapter_must_be_tiny() -> None:
    assert rules.soft_prompt(replace(TASK, goal="tiny")) == "prompt-tuning"
    assert rules.soft_prompt(TASK) is None


def test_full_tuning_or_a_high_rank_for_a_new_domain() -> None:
    domain = replace(TASK, goal="domain")
    assert rules.full_for_domains(replace(domain, full_fits=True)) == "full"
    assert rules.full_for_domains(domain) == "lora"
    assert rules.full_for_domains(replace(TASK, full_fits=True)) is None


def test_the_three_classic_cases() -> None:
    assert rules.plenty(replace(TASK, full_fits=True))
    assert rules.plenty(TASK) is None
    assert rules.not_enough(replace(TASK, dense_fits=False))
    assert rules.not_enough(TASK) is None
    assert rules.tight_inference(replace(TASK, is_served_tight=True)) == "nf4"
    assert rules.tight_inference(TASK) is None


def test_an_unknown_goal_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quality'"):
        Case("qualty")
