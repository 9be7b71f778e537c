"""The results of all runs as one table: a row for each candidate, and every pair of candidates tested."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from slimtune.compare.results import DomainLosses, Result, RunScore, Training
from slimtune.errors import DataError
from slimtune.metrics.seeds import MeanInterval, PairedTest, SeedScores, compare_all, interval
from slimtune.recipe.candidates import BASE, Candidate


@dataclass(frozen=True)
class CandidateRow:
    """A candidate over its seeds; means over the runs that were done, None where nothing was measured."""

    candidate: Candidate
    wanted: int
    """Runs that were asked for."""
    done: tuple[Result, ...]
    failed: tuple[Result, ...]
    score: MeanInterval | None

    @property
    def name(self) -> str:
        """Of the candidate."""
        return self.candidate.name

    def of_training(self, figure: Callable[[Training], float]) -> float | None:
        """The mean of a figure of the training."""
        return _mean([figure(result.training) for result in self.done if result.training])

    @property
    def mean(self) -> float:
        """Of the score; not a number where there is none."""
        return self.score.mean if self.score else math.nan

    @property
    def peak_bytes(self) -> float | None:
        """Of memory while training."""
        return self.of_training(lambda training: training.peak_bytes)

    @property
    def train_seconds(self) -> float | None:
        """Of training."""
        return self.of_training(lambda training: training.seconds)

    @property
    def size_bytes(self) -> float | None:
        """On disk."""
        return self.of_training(lambda training: training.size_bytes)

    @property
    def trainable(self) -> float | None:
        """Parameters."""
        return self.of_training(lambda training: training.trainable_parameters)

    @property
    def answer_seconds(self) -> float | None:
        """For one question."""
        return _mean([r.score.seconds / len(r.score.per_question) for r in self.done if r.score])

    @property
    def domains(self) -> list[DomainLosses]:
        """Loss on other text before and after, means over the seeds."""
        measured = [result.forgetting for result in self.done if result.forgetting]
        names = [domain.name for domain in measured[0]] if measured else []
        return [_mean_domain(name, measured) for name in names]

    @property
    def forgotten(self) -> float | None:
        """The mean rise of the loss over the domains, in nats per token."""
        return _mean([domain.rise for domain in self.domains])

    @property
    def intruders(self) -> float | None:
        """Intruder dimensions for each matrix of weights."""
        return _mean([result.spectrum.intruders_per_matrix for result in self.done if result.spectrum])

    def to_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes, times in seconds, forgetting in nats per token."""
        return {
            "candidate": self.name,
            "summary": self.candidate.summary,
            "score": None if self.score is None else asdict(self.score),
            "forgotten": self.forgotten,
            "domains": [domain.model_dump() for domain in self.domains],
            "intruders_per_matrix": self.intruders,
            "peak_bytes": self.peak_bytes,
            "train_seconds": self.train_seconds,
            "trainable_parameters": self.trainable,
            "size_bytes": self.size_bytes,
            "answer_seconds": self.answer_seconds,
            "runs": {"wanted": self.wanted, "done": len(self.done), "failed": [r.reason for r in self.failed]},
        }


@dataclass(frozen=True)
class Summary:
    """All rows, and all pairs of them."""

    rows: tuple[CandidateRow, ...]
    pairs: tuple[PairedTest, ...]
    scorer: str
    higher_is_better: bool

    @property
    def scored(self) -> list[CandidateRow]:
        """Rows with a score, the best first; controls are no candidates and stand apart."""
        rows = [row for row in self.rows if row.score and not row.candidate.random_labels]
        return sorted(rows, key=lambda row: self.sign * row.mean, reverse=True)

    @property
    def control(self) -> CandidateRow | None:
        """The prompt whose answers were dealt at random."""
        return next((row for row in self.rows if row.score and row.candidate.random_labels), None)

    @property
    def twin(self) -> CandidateRow | None:
        """The prompt that the control repeats with random answers."""
        control = self.control
        return next((row for row in self.scored if control and row.candidate.is_same_prompt(control.candidate)), None)

    @property
    def sign(self) -> int:
        """+1 where more is better."""
        return 1 if self.higher_is_better else -1

    @property
    def is_all_wrong(self) -> bool:
        """Whether nobody gave a right answer, which says more of the scorer than of the candidates."""
        return bool(self.scored) and self.higher_is_better and all(row.mean == 0 for row in self.scored)

    def row(self, name: str) -> CandidateRow | None:
        """The row of a candidate that has a score."""
        return next((row for row in self.rows if row.name == name and row.score), None)

    @property
    def base(self) -> CandidateRow | None:
        """The model as it comes."""
        return self.row(BASE)

    def pair(self, first: CandidateRow, second: CandidateRow) -> PairedTest | None:
        """Their test, whichever came first; None where no seed was done by both."""
        # A set, since a pair is tested once: its sign is the first one's minus the second's, which `is_better` turns
        # round.
        names = {first.name, second.name}
        return next((pair for pair in self.pairs if {pair.first, pair.second} == names), None)

    def is_shown(self, first: CandidateRow, second: CandidateRow) -> bool:
        """Whether a difference between two candidates was shown."""
        pair = self.pair(first, second)
        return pair is not None and pair.is_shown

    def beaten_by(self, row: CandidateRow) -> CandidateRow | None:
        """The best of the candidates that are shown to be better than this one."""
        return next((other for other in self.scored if other is not row and self.is_better(other, row)), None)

    def is_better(self, first: CandidateRow, second: CandidateRow) -> bool:
        """Whether the first is shown to be better than the second."""
        pair = self.pair(first, second)
        if pair is None or not pair.is_shown:
            return False
        gain = self.sign * pair.difference
        return (gain if pair.first == first.name else -gain) > 0

    @property
    def missing(self) -> int:
        """Runs that were asked for and neither done nor failed yet."""
        return sum(row.wanted - len(row.done) - len(row.failed) for row in self.rows)


def summarize(candidates: Sequence[Candidate], results: Sequence[Result], seeds: int) -> Summary:
    """The table of what was measured so far; raises DataError if the scores can't be compared."""
    rows = [
        _row(candidate, [result for result in results if result.candidate == candidate.name], seeds)
        for candidate in candidates
    ]
    name, higher = _scorer([result.score for row in rows for result in row.done if result.score])
    tables = {row.name: _scores(row) for row in rows if row.score}
    pairs = [pair for pair in _pairs(rows) if _have_common_seed(tables[pair[0]], tables[pair[1]])]
    return Summary(tuple(rows), tuple(compare_all(tables, pairs)), name, higher)


def _scorer(scores: Sequence[RunScore]) -> tuple[str, bool]:
    """What all scores are and whether more is better; raises DataError if they differ."""
    # The number of questions, too: paired tests take question i of one run with question i of the other.
    kinds = {(score.name, score.higher_is_better, len(score.per_question)) for score in scores}
    if len(kinds) > 1:
        listed = ", ".join(f"{name} on {count} questions" for name, _, count in sorted(kinds))
        raise DataError(f"the runs were judged differently ({listed}); start with a new --output")
    name, higher, _ = next(iter(kinds), ("score", True, 0))
    return name, higher


def _pairs(rows: Sequence[CandidateRow]) -> list[tuple[str, str]]:
    """All pairs of candidates, and the control with its twin: a test that nobody asks for costs the others power."""
    candidates = [row for row in rows if row.score and not row.candidate.random_labels]
    pairs = [(first.name, second.name) for first, second in combinations(candidates, 2)]
    for control in (row for row in rows if row.score and row.candidate.random_labels):
        pairs += [(row.name, control.name) for row in candidates if row.candidate.is_same_prompt(control.candidate)]
    return pairs


def _row(candidate: Candidate, results: Sequence[Result], seeds: int) -> CandidateRow:
    wanted = seeds if candidate.is_seeded else 1
    # Runs of more seeds may lie in the folder from before; a mean over them would have more runs than it says.
    inside = sorted((result for result in results if result.seed < wanted), key=lambda result: result.seed)
    done = tuple(result for result in inside if result.status == "done")
    failed = tuple(result for result in inside if result.status == "failed")
    row = CandidateRow(candidate, wanted, done, failed, None)
    return CandidateRow(candidate, wanted, done, failed, interval(_scores(row).table)) if done else row


def _scores(row: CandidateRow) -> SeedScores:
    return SeedScores({r.seed: r.score.per_question for r in row.done if r.score}, row.candidate.is_seeded)


def _have_common_seed(first: SeedScores, second: SeedScores) -> bool:
    # A candidate without training has one result for all seeds, which pairs with each of the other's.
    return not (first.is_seeded and second.is_seeded) or bool(set(first.by_seed) & set(second.by_seed))


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _mean_domain(name: str, measured: Sequence[Sequence[DomainLosses]]) -> DomainLosses:
    same: list[Any] = [domain for domains in measured for domain in domains if domain.name == name]
    return DomainLosses(name=name, before=fmean(d.before for d in same), after=fmean(d.after for d in same))
