"""Tasks that reasoning-gym makes and scores by itself (Stojanovski et al. 2025, arXiv:2505.24760)."""

from __future__ import annotations

from typing import Any

from slimtune.errors import ConfigError, MissingDependencyError, did_you_mean
from slimtune.evaluate.tasks import MADE, Question, Task


def make_task(name: str, size: int, seed: int, instruction: str = "") -> Task:
    """`size` questions of a task by name, the same for the same seed; raises ConfigError for an unknown name."""
    gym = _gym()
    known = list(gym.factory.DATASETS)
    if name not in known:
        raise ConfigError(f"reasoning-gym has no task '{name}'{did_you_mean(name, known) or f'; it has {known}'}")
    entries = gym.create_dataset(name, size=size, seed=seed)
    questions = [
        Question(
            [{"role": "user", "content": entry["question"]}],
            str(entry["answer"]),
            f"{entry['question']}\n",
            entry=entry,
        )
        for entry in entries
    ]
    return Task(MADE + name, questions, instruction=instruction)


def score_entry(answer: str, question: Question) -> float:
    """The score that the task itself gives, from 0 to 1; raises ConfigError for a question of another origin."""
    if question.entry is None:
        raise ConfigError(f"the scorer 'reasoning_gym' is for tasks called {MADE}NAME; choose another scorer")
    return float(_gym().get_score_answer_fn(question.entry["metadata"]["source_dataset"])(answer, question.entry))


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise MissingDependencyError(
            "tasks of reasoning-gym need the library: run `pip install 'slimtune[reasoning]'`"
        ) from error
    return reasoning_gym
