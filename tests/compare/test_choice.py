"""What is advised on results made so that the right advice is known; every figure in it is a measured one."""

from __future__ import annotations

import re

import pytest

from compare.constructed import (
    BASE,
    DORA,
    FOUR_SHOT,
    FULL,
    LORA,
    ONE_SHOT,
    QLORA,
    RANDOM,
    done,
    everything,
    failed,
    summary,
    training,
)
from slimtune.compare import format as figures
from slimtune.compare.choice import Recommendation, choose
from slimtune.compare.results import Result
from slimtune.compare.summary import Summary, summarize


def advice(*parts: tuple, seeds: int = 3) -> Recommendation:
    return choose(summary(parts, seeds))


def test_a_clear_winner_is_chosen() -> None:
    found = advice(
        (BASE, done(BASE, [0.2])), (FULL, done(FULL, [0.6, 0.62, 0.61])), (LORA, done(LORA, [0.9, 0.92, 0.91]))
    )
    assert found.candidate == "lora"
    assert "shown to be better than everything else" in found.headline
    assert "shown to differ from each of the others" in found.paragraph
    assert found.warnings == ()


def test_of_a_tie_the_one_of_least_memory_is_chosen_and_the_tie_is_said() -> None:
    found = advice(
        (BASE, done(BASE, [0.1])),
        (LORA, done(LORA, [0.93, 0.94, 0.95], training(1.65))),
        (QLORA, done(QLORA, [0.92, 0.93, 0.94], training(1.2))),
        (FULL, done(FULL, [0.93, 0.94, 0.93], training(3.4))),
    )
    assert found.candidate == "qlora"
    assert "no difference is shown between it and" in found.paragraph
    assert (
        "1.20 GB against 3.40 GB (full) and 1.65 GB (lora)" in found.paragraph or "1.20 GB against" in found.paragraph
    )
    assert "does not make them equal" in found.paragraph


@pytest.mark.parametrize(
    ("lora", "dora", "why"),
    [
        (training(1.5, 60), training(1.52, 90), "time to train: 60 s against 90 s (dora)"),
        (training(1.5, 60, 20), training(1.5, 61, 30), "room on disk: 20.0 MB against 30.0 MB (dora)"),
    ],
)
def test_where_memory_is_alike_time_decides_and_then_size(lora: object, dora: object, why: str) -> None:
    found = advice((LORA, done(LORA, [0.9, 0.91, 0.92], lora)), (DORA, done(DORA, [0.91, 0.9, 0.93], dora)))  # type: ignore[arg-type]
    assert found.candidate == "lora"
    assert why in found.paragraph


def test_where_nothing_tells_them_apart_the_score_decides() -> None:
    found = advice((LORA, done(LORA, [0.9, 0.91, 0.9])), (DORA, done(DORA, [0.92, 0.91, 0.93])))
    assert found.candidate == "dora"
    assert "the score decides" in found.paragraph


def test_examples_in_the_prompt_that_win_are_chosen() -> None:
    found = advice(
        (BASE, done(BASE, [0.5])),
        (FOUR_SHOT, done(FOUR_SHOT, [0.9, 0.92, 0.91])),
        (LORA, done(LORA, [0.7, 0.72, 0.71])),
    )
    assert found.candidate == "4-shot"
    assert (
        "Examples in the prompt suffice: 4-shot beats the best tuned model, lora (0.910 against 0.710)"
        in found.paragraph
    )


def test_examples_in_the_prompt_that_are_not_shown_to_be_worse_save_the_training() -> None:
    found = advice(
        (BASE, done(BASE, [0.2])),
        (FOUR_SHOT, done(FOUR_SHOT, [0.9, 0.88, 0.91])),
        (LORA, done(LORA, [0.91, 0.9, 0.92])),
    )
    assert found.candidate == "4-shot"
    assert "needs no training" in found.paragraph
    assert "may suffice" in found.paragraph


def test_examples_in_the_prompt_that_do_not_suffice() -> None:
    found = advice((ONE_SHOT, done(ONE_SHOT, [0.3, 0.32, 0.31])), (LORA, done(LORA, [0.9, 0.91, 0.92])))
    assert "do not suffice: 1-shot" in found.paragraph


def test_nothing_that_beats_the_base_is_worth_a_training() -> None:
    found = advice(
        (BASE, done(BASE, [0.5])), (LORA, done(LORA, [0.5, 0.52, 0.51])), (FULL, done(FULL, [0.49, 0.5, 0.5]))
    )
    assert found.candidate == "base"
    assert found.headline.startswith("Keep the model as it comes")


def test_one_seed_is_warned_of() -> None:
    found = advice((BASE, done(BASE, [0.1])), (LORA, done(LORA, [0.9])), seeds=1)
    assert found.candidate == "lora"
    assert any("Fewer than 3 seeds (1)" in warning for warning in found.warnings)


def test_the_base_alone_needs_no_seeds() -> None:
    found = advice((BASE, done(BASE, [0.4])), seeds=1)
    assert found.headline == "Only the model as it comes has a score"
    assert found.warnings == ()


def test_failed_runs_are_named_with_their_reason() -> None:
    found = advice((LORA, done(LORA, [0.9, 0.9, 0.91])), (DORA, [*done(DORA, [0.9, 0.9]), failed(DORA, 2)]))
    assert "dora failed with seed 2: the device has not enough memory." in found.warnings


def test_when_every_run_failed_nothing_is_chosen() -> None:
    found = advice((LORA, [failed(LORA, seed) for seed in range(3)]))
    assert found.candidate is None
    assert found.warnings == ("lora failed with seeds 0, 1 and 2: the device has not enough memory.",)


def test_that_nothing_was_right_points_to_the_scorer() -> None:
    found = advice((BASE, done(BASE, [0.0])), (ONE_SHOT, done(ONE_SHOT, [0.0] * 3)), (LORA, done(LORA, [0.0] * 3)))
    assert found.candidate == "base"
    assert "the scorer (exact match) may not fit" in found.warnings[0]
    assert "suffice" not in found.paragraph


def test_what_is_unfinished_is_said() -> None:
    found = advice((LORA, done(LORA, [0.9])), (FULL, []))
    assert "5 runs are still to be done" in found.warnings[0]


def test_arms_without_a_seed_in_common_are_not_compared() -> None:
    lora = [failed(LORA, 0), *done(LORA, [0.0, 0.9])[1:]]
    found = advice((LORA, lora), (FULL, done(FULL, [0.5])), seeds=2)
    assert "can't be compared" in found.paragraph


@pytest.mark.parametrize(
    ("right", "random", "said"),
    [
        ([0.6, 0.62, 0.61], [0.1, 0.12, 0.1], "teach more than the format: 0.610 with right answers, 0.107"),
        ([0.6, 0.62, 0.61], [0.6, 0.6, 0.61], "teach more than the format is not shown"),
        ([0.2, 0.22, 0.21], [0.6, 0.6, 0.61], "does better with random answers"),
    ],
)
def test_the_control_says_what_examples_teach(right: list[float], random: list[float], said: str) -> None:
    found = advice((FOUR_SHOT, done(FOUR_SHOT, right)), (RANDOM, done(RANDOM, random)))
    assert said in found.paragraph
    assert found.candidate == "4-shot"


def test_what_was_forgotten_is_told_with_the_domain_and_who_forgot_least() -> None:
    found = advice(
        (BASE, done(BASE, [0.1])),
        (FULL, done(FULL, [0.95, 0.96, 0.97], rise=0.3)),
        (LORA, done(LORA, [0.6, 0.61, 0.6], rise=0.05)),
    )
    assert "full forgot: loss on other text rose by +0.300 nats per token, most in encyclopedia (3.000 to 3.310)" in (
        found.paragraph
    )
    assert "lora changed it least (+0.050)" in found.paragraph


def test_less_can_be_better() -> None:
    def loss_of(result: Result) -> Result:
        assert result.score
        values = [1.2 - value + number / 1e3 for number, value in enumerate(result.score.per_question)]
        score = result.score.model_copy(update={"higher_is_better": False, "per_question": values})
        return result.model_copy(update={"score": score})

    results = [*done(BASE, [0.1]), *done(LORA, [0.9, 0.91, 0.9])]
    found = summarize([BASE, LORA], [loss_of(result) for result in results], 3)
    assert [row.name for row in found.scored] == ["lora", "base"]
    assert choose(found).candidate == "lora"


def measured(of: Summary) -> set[str]:
    """Every figure that the table, the tests and the domains hold, as it is written."""
    said: list[str] = []
    for row in of.rows:
        if row.score:
            said += [figures.score(value) for value in (row.mean, row.score.low, row.score.high)]
            said += [str(row.score.questions), str(row.score.seeds)]
        said += [figures.size(row.peak_bytes), figures.duration(row.train_seconds), figures.size(row.size_bytes)]
        said += [figures.change(row.forgotten), figures.duration(row.answer_seconds)]
        said += [figures.score(value) for domain in row.domains for value in (domain.before, domain.after)]
        said += [result.reason for result in row.failed] + [str(result.seed) for result in row.failed]
        said += [figures.score(abs(row.mean - other.mean)) for other in of.scored]
    for pair in of.pairs:
        said += [figures.p_value(pair.adjusted), figures.score(pair.detectable)]
    return set(re.findall(r"\d+(?:\.\d+)?", " ".join(said)))


def test_every_figure_of_the_advice_was_measured() -> None:
    candidates, results = everything()
    of = summarize(candidates, results, 3)
    text = choose(of).paragraph.replace("4-shot", "").replace("95% interval", "").replace("3 or more", "")
    told = set(re.findall(r"\d+(?:\.\d+)?", text.replace("Fewer than 3 seeds", "")))
    assert len(told) > 15
    assert told <= measured(of), told - measured(of)
