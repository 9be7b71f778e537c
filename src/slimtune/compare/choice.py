"""Which candidate to choose and how sure that is, by rules: each sentence follows from figures of the summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from slimtune.compare import format as figures
from slimtune.compare.summary import CandidateRow, Summary
from slimtune.metrics.seeds import MeanInterval

ENOUGH_SEEDS = 3
ALIKE = 1.05
"""Costs within this factor are no reason to choose."""


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
    """The best by score; of those not shown to differ from it the cheapest, and no training where none is needed."""
    ranked = summary.scored
    if not ranked:
        return Recommendation(None, "Nothing can be chosen", ("No run gave a score.",), tuple(_warnings(summary, None)))
    best = ranked[0]
    near = [row for row in ranked[1:] if not summary.is_shown(best, row)]
    # What is as good as the best as far as was seen, but worse than a third, is no candidate.
    peers = [best, *(row for row in near if summary.beaten_by(row) is None)]
    chosen, reason = _cheapest(best, peers)
    sentences = [
        _best(summary, best, near),
        *_beaten(summary, near),
        reason,
        *_against_base(summary, chosen),
        *_in_context(summary, chosen, peers),
        *_control(summary),
        *_forgetting(summary, chosen),
    ]
    headline = _headline(chosen, best, peers, summary)
    return Recommendation(chosen.name, headline, tuple(sentences), tuple(_warnings(summary, best)))


def _headline(chosen: CandidateRow, best: CandidateRow, peers: list[CandidateRow], summary: Summary) -> str:
    name = "the model as it comes" if chosen is summary.base else chosen.name
    if len(summary.scored) == 1:
        return f"Only {name} has a score"
    if len(peers) == 1:
        return f"Choose {name}: it is shown to be better than everything else here"
    if chosen is summary.base:
        return "Keep the model as it comes: nothing is shown to be better"
    if chosen is best:
        return f"Choose {name}: it scores best, though {_others(peers, best)} {_be(peers)} not shown to be worse"
    why = "nothing is trained" if not chosen.candidate.is_trained else "it costs less to train"
    return f"Choose {name}: not shown to be worse than the best, {best.name}, and {why}"


def _others(rows: list[CandidateRow], best: CandidateRow) -> str:
    return figures.names([row.name for row in rows if row is not best])


def _be(peers: list[CandidateRow]) -> str:
    return "is" if len(peers) == 2 else "are"


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


def _cheapest(best: CandidateRow, peers: list[CandidateRow]) -> tuple[CandidateRow, str]:
    """No training before training; then the least memory, time and size, each where it tells them apart."""
    untrained = sorted((row for row in peers if not row.candidate.is_trained), key=lambda row: row.candidate.shots)
    if untrained:
        row = untrained[0]
        if len(peers) == 1:
            return row, f"{_name(row)} needs no training."
        return row, f"Of these {row.name} needs no training, so nothing speaks for paying for one on these figures."
    if len(peers) == 1:
        return best, f"Its training took {_costs(best)}."
    for what, cost in COSTS.items():
        known = [(value, row) for row in peers if (value := cost(row)) is not None]
        if len(known) < len(peers):
            continue
        least, row = min(known, key=lambda pair: pair[0])
        others = [(value, other) for value, other in known if other is not row]
        if all(value > ALIKE * least for value, _ in others):
            beside = figures.names([f"{SHOWN[what](value)} ({other.name})" for value, other in others])
            below = "" if row is best else f" ({figures.score(abs(best.mean - row.mean))} from the best)"
            return row, f"Of these {row.name}{below} takes the least {what}: {SHOWN[what](least)} against {beside}."
    return best, f"Their costs hardly differ, so the score decides: {best.name} took {_costs(best)}."


COSTS: dict[str, Callable[[CandidateRow], float | None]] = {
    "memory to train": lambda row: row.peak_bytes,
    "time to train": lambda row: row.train_seconds,
    "room on disk": lambda row: row.size_bytes,
}
"""What a method costs, what weighs most first."""
SHOWN: dict[str, Callable[[float | None], str]] = {
    "memory to train": figures.size,
    "time to train": figures.duration,
    "room on disk": figures.size,
}


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


def _in_context(summary: Summary, chosen: CandidateRow, peers: list[CandidateRow]) -> Iterator[str]:
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
    if not longer or not shorter or longer <= ALIKE * shorter:
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
