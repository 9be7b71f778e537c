"""What the literature found, and whether it showed here: told either way, and where the runs can't tell, why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from slimtune.compare import format as figures
from slimtune.compare.choice import ENOUGH_SEEDS
from slimtune.compare.record import Constant, Facts
from slimtune.compare.results import Training
from slimtune.compare.statistics import Pair
from slimtune.compare.summary import Row, Summary
from slimtune.compare.task import Task
from slimtune.data.reading import read_labelled

Verdict = Literal["seen here", "not seen here", "can't be told"]


@dataclass(frozen=True)
class Finding:
    """A claim, where it comes from, and what these runs say to it."""

    claim: str
    source: str
    verdict: Verdict
    evidence: str


def findings(summary: Summary) -> list[Finding]:
    """Every known finding for which the candidates are there."""
    made = [rule(summary) for rule in RULES]
    return [finding for finding in made if finding is not None]


def _qlora(summary: Summary) -> Finding | None:
    def judge(lora: Row, qlora: Row, pair: Pair) -> tuple[Verdict, str]:
        assert lora.score
        low, high = lora.score.low, lora.score.high
        inside = low <= qlora.mean <= high
        return (
            "not seen here" if pair.is_shown else "seen here" if inside else "can't be told",
            f"qlora {figures.score(qlora.mean)} is {'inside' if inside else 'outside'} of lora's interval "
            f"({figures.score(low)} to {figures.score(high)})",
        )

    claim, source = "LoRA on a base in 4 bits scores as on one in 16", "Dettmers et al. 2023"
    return _tested(summary, claim, source, (summary.row("lora"), summary.row("qlora")), judge)


def _lora_against_full(summary: Summary) -> Finding | None:
    def judge(lora: Row, full: Row, pair: Pair) -> tuple[Verdict, str]:
        worse = summary.sign * (full.mean - lora.mean) > 0
        return (
            ("seen here" if worse else "not seen here") if pair.is_shown else "can't be told",
            f"lora {figures.score(lora.mean)} after {_steps(lora)}, full {figures.score(full.mean)} after "
            f"{_steps(full)}",
        )

    claim, source = "LoRA learns less than full tuning", "Biderman et al. 2024"
    return _tested(summary, claim, source, (summary.row("lora"), summary.row("full")), judge)


def _forgetting(summary: Summary) -> Finding | None:
    lora, full = summary.row("lora"), summary.row("full")
    return _lower(
        "LoRA forgets less than full tuning", "Biderman et al. 2024", lora, full, lambda row: row.forgotten,
        lambda value: f"{figures.change(value)} nats per token on other text",
    )  # fmt: skip


def _intruders(summary: Summary) -> Finding | None:
    lora, full = summary.row("lora"), summary.row("full")
    return _lower(
        "Full tuning has fewer intruder dimensions than LoRA", "Shuttleworth et al. 2024", full, lora,
        lambda row: row.intruders, lambda value: f"{figures.ratio(value)} a matrix",
    )  # fmt: skip


def _rslora(summary: Summary) -> Finding | None:
    """The pair of candidates that differ in `use_rslora` alone, at the highest rank."""
    pairs = []
    for row in summary.scored:
        fields = dict(row.candidate.fields)
        if row.candidate.method == "lora" and fields.pop("use_rslora", "false").lower() == "true":
            twins = [r for r in summary.scored if r.candidate.method == "lora" and dict(r.candidate.fields) == fields]
            pairs += [
                (int(fields.get("r", 16)), row, twin)
                for twin in twins
                if twin.candidate.quantize == row.candidate.quantize
            ]
    _, scaled, plain = max(pairs, key=lambda pair: pair[0], default=(0, None, None))
    return _lower(
        "rsLoRA has fewer intruder dimensions than LoRA of the same high rank", "Shuttleworth et al. 2024",
        scaled, plain, lambda row: row.intruders, lambda value: f"{figures.ratio(value)} a matrix",
    )  # fmt: skip


def _random_labels(summary: Summary) -> Finding | None:
    def judge(twin: Row, control: Row, pair: Pair) -> tuple[Verdict, str]:
        lost = pair.is_shown and summary.sign * (twin.mean - control.mean) > 0
        return (
            "not seen here" if lost else "can't be told",
            f"{twin.name} {figures.score(twin.mean)}, with random answers {figures.score(control.mean)}",
        )

    claim = "Examples in the prompt help through their format; random answers serve nearly as well"
    return _tested(summary, claim, "Min et al. 2022", (summary.twin, summary.control), judge)


RULES: tuple[Callable[[Summary], Finding | None], ...] = (
    _qlora,
    _lora_against_full,
    _forgetting,
    _intruders,
    _rslora,
    _random_labels,
)


def _tested(
    summary: Summary,
    claim: str,
    source: str,
    rows: tuple[Row | None, Row | None],
    judge: Callable[[Row, Row, Pair], tuple[Verdict, str]],
) -> Finding | None:
    """A claim on the scores of two candidates, by their test."""
    first, second = rows
    if first is None or second is None:
        return None
    pair = summary.pair(first, second)
    if pair is None:
        return Finding(claim, source, "can't be told", "no seed was done with both")
    verdict, evidence = judge(first, second, pair)
    shown = "a difference is shown" if pair.is_shown else "no difference is shown"
    told = f"{shown} (adjusted p {figures.p_value(pair.adjusted)}; detectable {figures.score(pair.detectable)})"
    return Finding(claim, source, verdict, f"{evidence}; {told}")


def _lower(
    claim: str,
    source: str,
    low: Row | None,
    high: Row | None,
    figure: Callable[[Row], float | None],
    shown: Callable[[float], str],
) -> Finding | None:
    """A claim that one candidate's figure is below another's; these have no test, so all of enough seeds must agree."""
    if low is None or high is None:
        return None
    first, second = figure(low), figure(high)
    if first is None and second is None:
        return None
    if first is None or second is None:
        return Finding(claim, source, "can't be told", "it was not measured on both")
    values = [[value for r in row.done if (value := figure(_alone(row, r))) is not None] for row in (low, high)]
    ordered, reverse = max(values[0]) < min(values[1]), min(values[0]) >= max(values[1])
    runs = min(len(values[0]), len(values[1]))
    enough = runs >= ENOUGH_SEEDS
    verdict: Verdict = "can't be told" if not enough else "seen here" if ordered else "not seen here"
    verdict = verdict if ordered or reverse else "can't be told"
    apart = "the seeds are apart" if ordered or reverse else "the seeds overlap"
    said = apart if enough else f"{runs} seed{'s' if runs > 1 else ''} each, too few to tell"
    return Finding(claim, source, verdict, f"{low.name} {shown(first)}, {high.name} {shown(second)}; {said}")


def _alone(row: Row, result: object) -> Row:
    """A row of one run."""
    return Row(row.candidate, 1, (result,), (), row.score)  # type: ignore[arg-type]


def _steps(row: Row) -> str:
    steps = row.of_training(lambda training: training.steps)
    return f"{figures.count(steps)} steps"


UNPROMPTED = (
    "The model as it comes has no arm: it writes no text, so it can't be prompted, and its head for the labels is "
    "drawn anew for each run and would answer by chance."
)
UNFORGOTTEN = "Forgetting has no measure here: a classifier predicts no next token, so it has no loss on other text."


def remarks(task: Task, writes_text: bool, constant: Constant | None) -> list[str]:
    """Of a comparison on labels: what one answer to everything would score, and what is left out and why."""
    if constant is None:
        return []
    said = (
        f"Always answering '{constant.label}', the most frequent label to learn from, would be right on "
        f"{figures.score(constant.share)} of the questions."
    )
    return [said, *([] if writes_text else [UNPROMPTED]), UNFORGOTTEN]


def constant_of(task: Task) -> Constant | None:
    """What the most frequent label to learn from would score; None where there are no labels."""
    if task.kind != "classification":
        return None
    label, _ = Counter(row.label for row in read_labelled(task.train)).most_common(1)[0]
    asked = [row.label for row in read_labelled(task.questions)]
    return Constant(label=label, share=asked.count(label) / len(asked))


def beside_constant(summary: Summary, constant: Constant | None) -> list[str]:
    """A warning, where not even the best is shown to know more than the most frequent label."""
    best = summary.scored[0] if summary.scored else None
    if constant is None or best is None or best.score is None or best.score.low > constant.share:
        return []
    return [
        f"Nothing is shown to have been learned: the interval of {best.name}, the best here, does not lie above what "
        f"always answering '{constant.label}' would score ({figures.score(constant.share)})."
    ]


def moved(before: Facts, machine: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    """What runs that are there were made with, where that is something else than now."""
    changed = {name: value for name, value in before.machine.items() if machine.get(name) != value}
    older = {name: value for name, value in before.versions.items() if versions.get(name) != value}
    if not changed and not older:
        return before.moved
    told = figures.names([f"{name} {value}" for name, value in (changed | older).items()])
    said = f"Until {before.date} it was run with {told}: " + (
        "memory and time of those runs do not compare with the others." if changed else "look whether that matters."
    )
    return [*before.moved, said]


COUNTED: dict[str, Callable[[Training], float]] = {
    "steps": lambda training: training.steps,
    "examples a step": lambda training: training.batch,
    "tokens seen": lambda training: training.tokens,
}


def equal_and_not(summary: Summary) -> tuple[list[str], list[str]]:
    """Two lists of sentences: what all candidates shared, and where they differed."""
    questions = next((row.score.questions for row in summary.scored if row.score), 0)
    same = [f"The same {questions} questions for every arm and seed, judged by {summary.scorer}."]
    different: list[str] = []
    trained = [row for row in summary.rows if row.candidate.is_trained and row.done]
    if trained:
        same.append("The same training examples for every method, in the same order for the same seed.")
        for name, figure in COUNTED.items():
            _sort(name, figure, trained, same, different)
        _rates(trained, same, different)
    if any(not row.candidate.is_trained and row.candidate.shots for row in summary.rows):
        different.append("Prompts with examples see only those; they were drawn anew from the training data by seed.")
    if summary.base is not None:
        different.append("The model as it comes answers the same each time and was asked once: its interval is over "
                         "questions alone.")  # fmt: skip
    return same, different


def _sort(
    name: str, figure: Callable[[Training], float], trained: list[Row], same: list[str], different: list[str]
) -> None:
    by_candidate = {row.name: row.of_training(figure) for row in trained}
    if len(set(by_candidate.values())) == 1:
        same.append(f"{name.capitalize()}: {figures.count(next(iter(by_candidate.values())))} for every method.")
    else:
        told = ", ".join(f"{candidate} {figures.count(value)}" for candidate, value in by_candidate.items())
        different.append(f"{name.capitalize()}: {told}.")


def _rates(trained: list[Row], same: list[str], different: list[str]) -> None:
    rates = {row.name: row.of_training(lambda training: training.learning_rate) for row in trained}
    if len(set(rates.values())) == 1:
        same.append(f"Learning rate: {next(iter(rates.values())):g} for every method.")
    else:
        told = ", ".join(f"{candidate} {rate:g}" for candidate, rate in rates.items())
        different.append(f"Learning rate: {told}; none of them was searched for here.")
