"""Which candidate to choose and how sure that is, by rules: each sentence follows from figures of the summary.

The rule (docs/adr/0021-what-is-chosen.md):

1. What is shown to be worse than another candidate is out.
2. Of the rest the best by score is chosen, unless another one *does as well for less*: its score is within 2% of the
   best, as measured, and it needs no training, or saves more than a tenth of memory, time or room on disk and takes a
   tenth more of none of them.

A difference that is not shown is not equality, so it never makes the lower score the better choice by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from slimtune.compare import format as figures
from slimtune.compare.summary import CandidateRow, Summary
from slimtune.metrics.seeds import MeanInterval

ENOUGH_SEEDS = 3
AS_GOOD = 0.02
"""The share of the best score that a cheaper candidate may give up."""
ALIKE = 0.1
"""Costs that differ by this share or less are no reason to choose."""


@dataclass(frozen=True)
class Recommendation:
    """The candidate to choose, None if nothing can be said, and why, sentence by sentence."""

    candidate: str | None
    headline: str
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def paragraph(self) -> str:
        """All of it as running text."""
        return " ".join((*self.sentences, *self.warnings))


def choose(summary: Summary) -> Recommendation:
    """By the rule above: the best by score, or what does as well for less."""
    ranked = summary.scored
    if not ranked:
        return Recommendation(None, "Nothing can be chosen", ("No run gave a score.",), tuple(_warnings(summary, None)))
    best = ranked[0]
    near = [row for row in ranked[1:] if not summary.is_shown(best, row)]
    # What is as good as the best as far as was seen, but worse than a third, is no candidate.
    peers = [best, *(row for row in near if summary.beaten_by(row) is None)]
    chosen = for_less(best, [row for row in peers if gives_up(row, best) <= AS_GOOD])
    sentences = [
        _best(summary, best, near),
        *_beaten(summary, near),
        _reason(chosen, best, peers),
        *_against_base(summary, chosen),
        *_in_context(summary, chosen),
        *_control(summary),
        *_forgetting(summary, chosen),
    ]
    headline = _headline(chosen, best, peers, summary)
    return Recommendation(chosen.name, headline, tuple(sentences), tuple(_warnings(summary, best)))


def gives_up(row: CandidateRow, best: CandidateRow) -> float:
    """The share of the better score that a candidate falls short of it by; 0 where both are 0."""
    largest = max(abs(row.mean), abs(best.mean))
    return abs(best.mean - row.mean) / largest if largest else 0.0


def for_less(best: CandidateRow, alike: Sequence[CandidateRow]) -> CandidateRow:
    """Of candidates that do as well as the best, which is one of them: what costs least, as far as costs differ.

    No training comes before training. Of those that are cheaper than the best it is the first by score that none of
    them is cheaper than.
    """
    untrained = [row for row in alike if not row.candidate.is_trained]
    if untrained:
        return min(untrained, key=lambda row: row.candidate.shots)
    cheaper = [row for row in alike if is_cheaper(row, best)]
    return next((row for row in cheaper if not any(is_cheaper(other, row) for other in cheaper)), best)


def is_cheaper(row: CandidateRow, other: CandidateRow) -> bool:
    """Whether a candidate saves more than a tenth of some cost of another one and takes a tenth more of none."""
    ratios = [ratio for _, ratio in _ratios(row, other)]
    return any(ratio < 1 - ALIKE for ratio in ratios) and all(ratio <= 1 + ALIKE for ratio in ratios)


def _headline(chosen: CandidateRow, best: CandidateRow, peers: list[CandidateRow], summary: Summary) -> str:
    """One sentence, with what is given up for what."""
    if len(summary.scored) == 1:
        return f"Only {'the model as it comes' if chosen is summary.base else chosen.name} has a score"
    if len(peers) == 1:
        name = "the model as it comes" if chosen is summary.base else chosen.name
        return f"Choose {name}: it is shown to be better than everything else here"
    if chosen is not best:
        less = figures.score(abs(best.mean - chosen.mean))
        name = "Keep the model as it comes" if chosen is summary.base else f"Choose {chosen.name}"
        more = _costs_more(best, chosen) if chosen.candidate.is_trained else "has to be trained"
        return f"{name}: {best.name} scores {less} better, which may be chance, and {more}"
    if chosen is summary.base:
        return "Keep the model as it comes: nothing scores better"
    rival = peers[1]
    lead = figures.score(abs(best.mean - rival.mean))
    if is_cheaper(rival, best) or not rival.candidate.is_trained:
        cost = "has to be trained" if not rival.candidate.is_trained else _costs_more(best, rival)
        return f"Choose {best.name}: it scores {lead} better than {_called(rival)}, which may be chance, but {cost}"
    return f"Choose {best.name}: it scores best, {lead} better than {_called(rival)}, which may be chance"


def _others(rows: list[CandidateRow], best: CandidateRow) -> str:
    return figures.names([row.name for row in rows if row is not best])


def _called(row: CandidateRow) -> str:
    return "the model as it comes" if row.name == "base" else row.name


def _best(summary: Summary, best: CandidateRow, near: list[CandidateRow]) -> str:
    assert best.score
    scored = f"{summary.scorer} {_with_interval(best.score, best.candidate.is_seeded)}"
    begin = f"{_name(best)} scores best: {scored}"
    rest = [row for row in summary.scored if row is not best]
    if not rest:
        return f"{_name(best)} has {scored}; there is nothing to compare it with."
    if not near:
        worst = max(pair.adjusted for row in rest if (pair := summary.pair(best, row)))
        return f"{begin}, and is shown to differ from each of the others (adjusted p {figures.p_value(worst)} at most)."
    seen = [pair for row in near if (pair := summary.pair(best, row))]
    if not seen:
        return f"{begin}; no seed was done by it and by {_others(near, best)}, so they can't be compared."
    least = min(pair.adjusted for pair in seen)
    could = max(pair.detectable for pair in seen)
    return (
        f"{begin}, but no difference is shown between it and {_others(near, best)} (adjusted p "
        f"{figures.p_value(least)}{' at least' if len(seen) > 1 else ''}); that does not make them equal, for a "
        f"difference below {figures.score(could)} would often have gone unseen."
    )


def _beaten(summary: Summary, near: list[CandidateRow]) -> Iterator[str]:
    for row in near:
        better = summary.beaten_by(row)
        if better is not None:
            yield f"{row.name} is shown to be worse than {better.name}."


COSTS: dict[str, Callable[[CandidateRow], float | None]] = {
    "memory to train": lambda row: row.peak_bytes,
    "time to train": lambda row: row.train_seconds,
    "room on disk": lambda row: row.size_bytes,
}
"""What a method costs."""
SHOWN: dict[str, Callable[[float | None], str]] = {
    "memory to train": figures.size,
    "time to train": figures.duration,
    "room on disk": figures.size,
}


def _ratios(row: CandidateRow, other: CandidateRow) -> list[tuple[str, float]]:
    """Each cost of a candidate against that of another one, where both are known."""
    known = [(what, cost(row), cost(other)) for what, cost in COSTS.items()]
    return [(what, one / another) for what, one, another in known if one is not None and another]


def _reason(chosen: CandidateRow, best: CandidateRow, peers: list[CandidateRow]) -> str:
    """Why this one, with the costs that speak for and against it."""
    if not chosen.candidate.is_trained:
        if len(peers) == 1:
            return f"{_name(chosen)} needs no training."
        return f"Of these {chosen.name} needs no training, so nothing speaks for paying for one on these figures."
    if len(peers) == 1:
        return f"Its training took {_costs(best)}."
    if chosen is not best:
        saves = [what for what, ratio in _ratios(chosen, best) if ratio < 1 - ALIKE]
        beside = figures.names([_beside(what, chosen, best) for what in saves])
        gap = figures.score(abs(best.mean - chosen.mean))
        return f"{chosen.name} ({gap} from the best) does as well for less {beside}."
    trained = [row for row in peers[1:] if row.candidate.is_trained]
    cheaper = [row for row in trained if is_cheaper(row, best)]
    if cheaper:
        row = cheaper[0]
        costs = figures.names([_beside(what, row, best) for what, ratio in _ratios(row, best) if ratio < 1 - ALIKE])
        return (
            f"{row.name} takes less {costs}, but its score is {figures.score(abs(best.mean - row.mean))} lower, and a "
            "difference that is not shown is not equality, so the score decides."
        )
    alike = all(abs(ratio - 1) <= ALIKE for row in trained for _, ratio in _ratios(row, best))
    if alike:
        return f"Their costs hardly differ, so the score decides: {best.name} took {_costs(best)}."
    return f"None of the others is cheaper in all, so the score decides: {best.name} took {_costs(best)}."


def _beside(what: str, row: CandidateRow, other: CandidateRow) -> str:
    """A cost of two candidates: `time to train: 60 s against 90 s (dora)`."""
    one, another = (SHOWN[what](COSTS[what](each)) for each in (row, other))
    return f"{what}: {one} against {another} ({other.name})"


def _costs_more(dear: CandidateRow, cheap: CandidateRow) -> str:
    """Of which cost a candidate takes most beside another one."""
    what, ratio = max(_ratios(dear, cheap), key=lambda pair: pair[1], default=("to train", 1.0))
    return f"takes {ratio:.1f} times the {what}"


def _costs(row: CandidateRow) -> str:
    known = [SHOWN[what](value) for what, cost in COSTS.items() if (value := cost(row)) is not None]
    return " / ".join(known) + " (memory, time, disk)" if len(known) == len(COSTS) else " / ".join(known) or "no time"


def _against_base(summary: Summary, chosen: CandidateRow) -> Iterator[str]:
    base = summary.base
    if base is None or base is chosen:
        return
    pair = summary.pair(chosen, base)
    gain = summary.sign * (chosen.mean - base.mean)
    if pair is None:
        return
    if pair.is_shown and gain > 0:
        yield (
            f"The model as it comes scores {figures.score(base.mean)}; {chosen.name} is shown to be better "
            f"(by {figures.score(gain)}, adjusted p {figures.p_value(pair.adjusted)})."
        )
    else:
        yield (
            f"Against the model as it comes ({figures.score(base.mean)}) no gain is shown for {chosen.name} "
            f"(adjusted p {figures.p_value(pair.adjusted)})."
        )


def _in_context(summary: Summary, chosen: CandidateRow) -> Iterator[str]:
    prompts = [row for row in summary.scored if not row.candidate.is_trained and row.candidate.shots > 0]
    methods = [row for row in summary.scored if row.candidate.is_trained]
    if not prompts or not methods:
        return
    prompt, method = prompts[0], methods[0]
    pair = summary.pair(prompt, method)
    base = summary.base
    is_idle = base is not None and not summary.is_better(prompt, base) and not summary.is_better(method, base)
    if pair is None or is_idle:
        return
    ahead = summary.sign * (prompt.mean - method.mean)
    scores = f"{figures.score(prompt.mean)} against {figures.score(method.mean)}"
    if not pair.is_shown:
        yield (
            f"Examples in the prompt may suffice: between {prompt.name} and {method.name} ({scores}) no difference is "
            f"shown (adjusted p {figures.p_value(pair.adjusted)}){_price_of_asking(prompt, method)}."
        )
    elif ahead > 0:
        yield f"Examples in the prompt suffice: {prompt.name} beats the best tuned model, {method.name} ({scores})."
    else:
        yield (
            f"Examples in the prompt do not suffice: {prompt.name}, the best of them, is shown to be worse than "
            f"{method.name} ({scores}, adjusted p {figures.p_value(pair.adjusted)})."
        )


def _price_of_asking(prompt: CandidateRow, method: CandidateRow) -> str:
    longer, shorter = prompt.answer_seconds, method.answer_seconds
    if not longer or not shorter or longer <= (1 + ALIKE) * shorter:
        return ""
    return f"; each answer then takes {figures.duration(longer)} instead of {figures.duration(shorter)}"


def _control(summary: Summary) -> Iterator[str]:
    control, twin = summary.control, summary.twin
    pair = summary.pair(twin, control) if twin and control else None
    if control is None or twin is None or pair is None:
        return
    scores = f"{figures.score(twin.mean)} with right answers, {figures.score(control.mean)} with random ones"
    p = f"adjusted p {figures.p_value(pair.adjusted)}"
    if pair.is_shown and summary.sign * pair.difference > 0:
        yield f"The examples of the {twin.name} prompt teach more than the format: {scores} ({p})."
    elif pair.is_shown:
        yield f"The {twin.name} prompt does better with random answers than with right ones: {scores} ({p})."
    else:
        yield f"That the examples of the {twin.name} prompt teach more than the format is not shown: {scores} ({p})."


def _forgetting(summary: Summary, chosen: CandidateRow) -> Iterator[str]:
    rise = chosen.forgotten
    if rise is None:
        return
    worst = max(chosen.domains, key=lambda domain: domain.rise)
    others = [row for row in summary.scored if row.forgotten is not None and row is not chosen]
    least = min(others, key=lambda row: row.forgotten or 0.0, default=None)
    if rise <= 0:
        text = f"{chosen.name} forgot nothing that was measured: loss on other text changed by {figures.change(rise)}"
    else:
        text = (
            f"{chosen.name} forgot: loss on other text rose by {figures.change(rise)} nats per token, most in "
            f"{worst.name} ({figures.score(worst.before)} to {figures.score(worst.after)})"
        )
    if least is not None and least.forgotten is not None and least.forgotten < rise:
        text += f"; {least.name} changed it least ({figures.change(least.forgotten)})"
    yield text + "."


def _warnings(summary: Summary, best: CandidateRow | None) -> Iterator[str]:
    if summary.missing:
        runs = "1 run is" if summary.missing == 1 else f"{summary.missing} runs are"
        yield f"This is unfinished: {runs} still to be done."
    yield from _failures(summary)
    if best is None:
        return
    if summary.is_all_wrong:
        yield f"No answer of any candidate was right; look at some: the scorer ({summary.scorer}) may not fit the task."
    seeds = min((row.score.seeds for row in summary.scored if row.score and row.candidate.is_seeded), default=0)
    if 0 < seeds < ENOUGH_SEEDS:
        yield (
            f"Fewer than {ENOUGH_SEEDS} seeds ({seeds}): {_SEEDS[seeds]}; repeat with {ENOUGH_SEEDS} or more "
            f"before relying on it."
        )


def _failures(summary: Summary) -> Iterator[str]:
    """Each candidate's reasons; seeds that failed alike are told together."""
    for row in summary.rows:
        reasons = dict.fromkeys(result.reason.rstrip(".") for result in row.failed)
        for reason in reasons:
            seeds = [str(result.seed) for result in row.failed if result.reason.rstrip(".") == reason]
            with_seeds = (
                f" with seed{'s' if len(seeds) > 1 else ''} {figures.names(seeds)}" if row.candidate.is_seeded else ""
            )
            yield f"{row.name} failed{with_seeds}: {reason}."


_SEEDS = {
    1: "the intervals know nothing of how much another seed would change, and the tests call too much a difference",
    2: "how much seeds matter is hardly known from two",
}


def _with_interval(score: MeanInterval, is_seeded: bool) -> str:
    seeds = ("1 seed, " if score.seeds == 1 else f"{score.seeds} seeds, ") if is_seeded else ""
    return (
        f"{figures.score(score.mean)} (95% interval {figures.score(score.low)} to {figures.score(score.high)}, "
        f"{seeds}{score.questions} questions)"
    )


def _name(row: CandidateRow) -> str:
    return "The model as it comes" if row.name == "base" else row.name
