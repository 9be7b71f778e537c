"""Scores of single answers, which scorer a task gets, and a user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimtune.errors import ConfigError
from slimtune.evaluate.scorers import EvaluationSettings, find_scorers
from slimtune.evaluate.tasks import Question, Task, open_task

ORDER = '{"name": "Bo", "quantity": 1}'


def question(expected: str) -> Question:
    return Question([{"role": "user", "content": "q"}], expected, "q\n")


def task(*expected: str, labels: tuple[str, ...] = ()) -> Task:
    return Task("task", [question(answer) for answer in expected], list(labels))


def scored(name: str, answer: str, expected: str) -> Any:
    return find_scorers(name, task(expected))[0].score(answer, question(expected))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (task("yes", "no"), ["exact_match"]),
        (task("12", "-3.5", "1,000"), ["number", "exact_match"]),
        (task("12", "about 3"), ["exact_match"]),
        (task(ORDER, "[1]"), ["json", "exact_match"]),
        (task(ORDER, "{"), ["exact_match"]),
        (task("a", "b", labels=("a", "b")), ["accuracy"]),
    ],
)
def test_auto_goes_by_the_answers(given: Task, names: list[str]) -> None:
    assert [scorer.name for scorer in find_scorers("auto", given)] == names


@pytest.mark.parametrize(
    ("name", "answer", "expected", "scores"),
    [
        ("exact_match", " yes\n", "yes", {"exact_match": 1}),
        ("exact_match", "Yes", "yes", {"exact_match": 0}),
        ("json", '{"quantity": 1, "name": "Bo"}', ORDER, {"json_match": 1, "json_valid": 1}),
        ("json", '{"name": "Bo", "quantity": true}', ORDER, {"json_match": 0, "json_valid": 1}),
        ("json", '{"name": "Bo"', ORDER, {"json_match": 0, "json_valid": 0}),
        ("number", "12 apples and 5 are 1,017.0", "1017", {"number_match": 1}),
        ("number", "1e3", "1000", {"number_match": 1}),
        ("number", "17, or so I think. No: 16", "17", {"number_match": 0}),
        ("number", "none", "0", {"number_match": 0}),
    ],
)
def test_one_answer(name: str, answer: str, expected: str, scores: dict[str, float]) -> None:
    assert scored(name, answer, expected) == scores


def test_overlap_is_that_of_the_libraries() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_chrf

    answer, expected = "the small cat sat down", "a small cat sat on the mat"
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(expected, answer)
    assert scored("rouge", answer, expected) == {kind: theirs[kind].fmeasure for kind in ("rougeL", "rouge1", "rouge2")}
    assert scored("chrf", answer, expected)["chrf"] == pytest.approx(sentence_chrf(answer, [expected]).score / 100)
    assert scored("chrf", expected, expected)["chrf"] == pytest.approx(1)


def test_a_task_of_reasoning_gym_scores_itself() -> None:
    made = open_task("reasoning-gym:chain_sum", size=5, seed=3)
    (scorer,) = find_scorers("auto", made)
    assert len(made.questions) == 5
    for one in made.questions:
        assert scorer.score(one.expected, one) == {"reasoning_gym": 1.0}
        assert scorer.score("no idea", one)["reasoning_gym"] < 0.5
    assert open_task("reasoning-gym:chain_sum", size=5, seed=3).questions == made.questions
    with pytest.raises(ConfigError, match="did you mean 'chain_sum'"):
        open_task("reasoning-gym:chain_sums")


def test_a_users_function(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def share(answer, expected):\n    return len(answer) / len(expected)\n"
        "def turns(answer, expected, turns):\n    return turns[-1]['content'] == 'q'\n"
    )
    assert scored(f"{path}:share", "ab", "abcd") == {"share": 0.5}
    assert scored(f"{path}:turns", "ab", "abcd") == {"turns": 1.0}
    assert list(find_scorers(f"exact_match,{path}:share", task("x"))[1].score("", question("x"))) == ["share"]


@pytest.mark.parametrize(
    ("code", "name", "said"),
    [
        ("def score(answer, expected):\n    return 'good'\n", "score", "returned 'good'"),
        ("def score(answer, expected):\n    return float('nan')\n", "score", "returned nan"),
        ("def score(answer, expected):\n    return None\n", "score", "returned None"),
        ("def score(answer, expected):\n    raise KeyError('x')\n", "score", "raised KeyError"),
        ("def score(answer):\n    return 1\n", "score", r"must take \(answer, expected\)"),
        ("def score(answer, expected):\n    return 1\n", "scores", "did you mean 'score'"),
        ("x = 1\n", "score", "found none"),
        ("import nothing_like_it\n", "score", "can't be run: ModuleNotFoundError"),
    ],
)
def test_a_users_function_that_fails(tmp_path: Path, code: str, name: str, said: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(ConfigError, match=said):
        scored(f"{path}:{name}", "a", "b")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exact_mach", "did you mean 'exact_match'"),
        ("rouge,", "no scorer ''"),
        ("auto,rouge", "no scorer 'auto'"),
        ("accuracy,rouge", "pass it alone"),
        (3, "found 3"),
    ],
)
def test_an_unknown_scorer(name: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EvaluationSettings(scorer=name)


def test_a_scorer_whose_file_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean 'mine\.py'"):
        scored(f"{tmp_path}/mien.py:score", "a", "b")


@pytest.mark.parametrize(("name", "expected"), [("json", "words"), ("number", "words"), ("reasoning_gym", "words")])
def test_a_scorer_that_does_not_fit_the_task(name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=name):
        scored(name, "1", expected)


@pytest.mark.parametrize("field", [{"limit": 0}, {"batch_size": -1}, {"max_new_tokens": 0}, {"too_long": "truncate"}])
def test_settings_that_cannot_be(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        EvaluationSettings(**field)


def test_json_of_any_depth_is_no_crash() -> None:
    deep = "[" * 100_000
    assert scored("json", deep, json.dumps([1])) == {"json_match": 0, "json_valid": 0}
