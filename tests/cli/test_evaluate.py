"""`slimtune evaluate`: a base, an adapter, a merged model and a classifier on a file of questions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slimtune.evaluate.generation import generate_batch
from slimtune.evaluate.tasks import prompt, read_task
from slimtune.metrics.classification import scores
from slimtune.models.load import load_model
from small_encoder import reviews, save_encoder
from small_text_model import orders, save_base, write_lines

SHORT = ["--max-new-tokens", 12]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six orders."""
    return write_lines(tmp_path_factory.mktemp("task") / "task.jsonl", *({"messages": e.messages()} for e in orders(6)))


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve texts with labels."""
    return write_lines(tmp_path_factory.mktemp("task") / "labels.jsonl", *reviews(12))


def asked(run: Any, *arguments: Any) -> dict[str, Any]:
    result = run("evaluate", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_loss_and_answers(run: Any, base: Path, task: Path, tmp_path: Path) -> None:
    found = asked(run, base, task, "--answers", tmp_path / "a.jsonl", *SHORT)
    assert (found["metric"], found["count"], found["max_new_tokens"]) == ("json_match", 6, 12)
    assert set(found["scores"]) == set(found["intervals"]) == {"json_match", "json_valid", "exact_match"}
    rows = lines(tmp_path / "a.jsonl")
    assert [row["question"] for row in rows] == [example.question() for example in orders(6)]
    assert [row["expected"] for row in rows] == [example.order.to_json() for example in orders(6)]
    model, tokenizer = load_model(str(base), "text")
    prompts = [prompt(tokenizer, question) for question in read_task(task).questions]
    assert [row["answer"] for row in rows] == generate_batch(model, tokenizer, prompts, 12)
    # A mean of the batches' means would be another number: the answers differ in length.
    per_token = sum(row["loss"] for row in rows) / sum(row["tokens"] for row in rows)
    assert found["loss"] == pytest.approx(per_token)
    assert found["perplexity"] == pytest.approx(math.exp(per_token))
    assert found["unfinished"] == sum(not row["ended"] for row in rows) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_what_the_model_would_say_is_right(run: Any, base: Path, task: Path, tmp_path: Path) -> None:
    asked(run, base, task, "--answers", tmp_path / "a.jsonl", *SHORT)
    said = [
        {"messages": [*row["question"], {"role": "assistant", "content": row["answer"]}]}
        for row in lines(tmp_path / "a.jsonl")
    ]
    said[0]["messages"][-1]["content"] += "not this"
    found = asked(run, base, write_lines(tmp_path / "said.jsonl", *said), "--scorer", "exact_match", *SHORT)
    assert found["scores"] == {"exact_match": pytest.approx(5 / 6)}
    low, high = found["intervals"]["exact_match"]
    assert 0.3 < low < 5 / 6 < high < 1


def test_the_batches_make_no_difference(run: Any, base: Path, task: Path, tmp_path: Path) -> None:
    found = [asked(run, base, task, *SHORT, "--batch-size", size, "--answers", tmp_path / f"{size}") for size in (1, 4)]
    assert [r["answer"] for r in lines(tmp_path / "1")] == [r["answer"] for r in lines(tmp_path / "4")]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)


def test_an_adapter_of_ours_or_of_peft_and_the_merged_model(
    run: Any, base: Path, tuned: Path, task: Path, tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    plain = asked(run, base, task, *SHORT)
    ours = asked(run, tuned, task, *SHORT)
    assert ours["loss"] < plain["loss"] - 1
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tuned))
    model.save_pretrained(str(tmp_path / "theirs"))
    assert asked(run, tmp_path / "theirs", task, *SHORT)["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert run("merge", tuned, "--output", tmp_path / "merged").exit_code == 0
    assert asked(run, tmp_path / "merged", task, *SHORT)["loss"] == pytest.approx(ours["loss"], rel=1e-3)


def test_a_run_that_was_killed_goes_on(run: Any, base: Path, task: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    asked(run, base, task, *SHORT, "--answers", whole)
    # The scorer fails at the first answer, when all of them have been written down.
    (tmp_path / "mine.py").write_text("def score(answer, expected):\n    raise ValueError('not yet')\n")
    options = [*SHORT, "--batch-size", 2, "--answers", broken]
    assert run("evaluate", base, task, *options, "--scorer", f"{tmp_path}/mine.py:score").exit_code == 2
    part = tmp_path / "broken.jsonl.part"
    kept = part.read_text().splitlines()
    assert len(kept) == 7
    # As if killed in the middle of the third line, with a mark by which the kept answer is known.
    first = json.dumps([json.loads(kept[1])[0], "kept from before", True])
    part.write_text("\n".join([kept[0], first, kept[2], kept[3][:9]]))
    found = asked(run, base, task, *options)
    assert found["known"] == 2
    answers = [row["answer"] for row in lines(broken)]
    expected = [row["answer"] for row in lines(whole)]
    expected[json.loads(first)[0]] = "kept from before"
    assert answers == expected
    assert not part.exists()


def test_another_model_does_not_go_on_with_it(run: Any, base: Path, tuned: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(answer, expected):\n    raise ValueError('not yet')\n")
    options = [*SHORT, "--answers", tmp_path / "a.jsonl"]
    run("evaluate", base, task, *options, "--scorer", f"{tmp_path}/mine.py:score")
    assert asked(run, tuned, task, *options)["known"] == 0


def test_labels_are_chosen_by_their_likelihood(run: Any, base: Path, sentiment: Path, tmp_path: Path) -> None:
    found = asked(run, base, sentiment, "--answers", tmp_path / "a.jsonl")
    rows = lines(tmp_path / "a.jsonl")
    assert scores([r["answer"] for r in rows], [r["expected"] for r in rows]) == pytest.approx(found["scores"])
    model, tokenizer = load_model(str(base), "text")
    question = read_task(sentiment).questions[0]
    shown = prompt(tokenizer, question, (), "Answer with one of these labels and nothing else: bad, good.")
    begin = len(tokenizer(shown, add_special_tokens=False)["input_ids"])
    likely = {}
    for label in ("bad", "good"):
        ids = torch.tensor([tokenizer(f"{shown}{label}<|im_end|>", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            log_p = model(ids).logits[0].log_softmax(-1)
        likely[label] = sum(log_p[i - 1, ids[0, i]].item() for i in range(begin, ids.shape[1]))
    assert rows[0]["answer"] == max(likely, key=likely.__getitem__)
    assert rows[0]["loss"] == pytest.approx(-likely[rows[0]["expected"]], rel=1e-4)


def test_labels_can_be_written_instead(run: Any, base: Path, sentiment: Path) -> None:
    found = asked(run, base, sentiment, "--scorer", "exact_match,chrf", "--system", "Good or bad?")
    assert list(found["scores"]) == ["exact_match", "chrf"]
    assert found["metric"] == "exact_match"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("pick", ["random", "similar"])
@pytest.mark.parametrize("kind", ["task", "sentiment"])
def test_examples_in_the_prompt(run: Any, base: Path, request: Any, tmp_path: Path, kind: str, pick: str) -> None:
    rows = orders(12)[6:] if kind == "task" else reviews(20)[12:]
    rows = [{"messages": row.messages()} for row in rows] if kind == "task" else rows
    examples = write_lines(tmp_path / "examples.jsonl", *rows)
    short = SHORT if kind == "task" else []  # a label is chosen, not written
    options = [request.getfixturevalue(kind), "--shots", 2, "--examples", examples, "--pick", pick, *short]
    found, again = asked(run, base, *options), asked(run, base, *options)
    mixed = asked(run, base, *options, "--random-labels")
    assert (found["shots"], found["examples"]["pick"]) == (2, pick)
    assert found["loss"] == again["loss"] != asked(run, base, options[0], *short)["loss"]
    assert mixed["examples"]["random_labels"]
    assert mixed["loss"] != found["loss"]


def test_text_for_a_model_without_turns_ends_at_the_blank_line(run: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", chat_template=None)
    rows = [{"prompt": f"Q{n}:", "completion": f" {n}"} for n in range(8)]
    task, examples = write_lines(tmp_path / "t.jsonl", *rows[:3]), write_lines(tmp_path / "e.jsonl", *rows[3:])
    found = asked(run, base, task, "--shots", 3, "--examples", examples, "--answers", tmp_path / "a.jsonl")
    assert found["metric"] == "number_match"
    assert all("\n\n" not in row["answer"] for row in lines(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("method", ["lora", "full", "features"])
def test_a_classifier(run: Any, tmp_path: Path, method: str) -> None:
    encoder, fresh = save_encoder(tmp_path / "base"), write_lines(tmp_path / "fresh.jsonl", *reviews(20, seed=5))
    data = write_lines(tmp_path / "rows.jsonl", *reviews(16))
    train = [] if method == "features" else ["--max-steps", 2]
    options = ["-o", tmp_path / "out", "--method", method, f"data.held_out={fresh}", *train]
    trained = run("train", encoder, data, *options, "--json")
    assert trained.exit_code == 0, trained.output
    found = asked(run, tmp_path / "out", fresh, "--answers", tmp_path / "a.jsonl")
    assert found["scores"] == pytest.approx(json.loads(trained.stdout)["scores"])
    assert (found["metric"], found["perplexity"], found["count"]) == ("accuracy", None, 20)
    rows = lines(tmp_path / "a.jsonl")
    assert [row["question"] for row in rows] == [row["text"] for row in reviews(20, seed=5)]
    assert found["loss"] == pytest.approx(sum(row["loss"] for row in rows) / 20)


def test_what_people_see(run: Any, base: Path, task: Path, sentiment: Path, tmp_path: Path) -> None:
    shown = run("evaluate", base, task, *SHORT, "--answers", tmp_path / "a.jsonl").output
    for part in ("json_match", "0.000 to 0.390", "a token of the expected answers", "6 questions", "cut off after 12"):
        assert part in shown, shown
    shown = run("evaluate", base, task, *SHORT, "--shots", 2, "--examples", task).stderr
    assert "6 are left out as questions of the task itself" in shown


@pytest.mark.slow
def test_tasks_of_the_harness(run: Any, base: Path, tuned: Path, tmp_path: Path) -> None:
    items = write_lines(
        tmp_path / "items.jsonl", *({"q": f"{n} and {n} is", "choices": [str(2 * n), "x"], "a": 0} for n in range(4))
    )
    folder = tmp_path / "tasks"
    folder.mkdir()
    described = {
        "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices",
        "doc_to_target": "a", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "sums.yaml").write_text(yaml.safe_dump(described))
    found = asked(run, tuned, "--lm-eval", "sums", "--lm-eval-path", folder, "--limit", 3)
    loaded, tokenizer = load_model(str(tuned), "text")

    def likely(text: str, answer: str) -> float:
        ids = torch.tensor([tokenizer(f"{text} {answer}")["input_ids"]])
        begin = len(tokenizer(text)["input_ids"])
        with torch.no_grad():
            log_p = loaded(ids).logits[0].log_softmax(-1)
        return sum(log_p[i - 1, ids[0, i]].item() for i in range(begin, ids.shape[1]))

    right = sum(likely(f"{n} and {n} is", str(2 * n)) > likely(f"{n} and {n} is", "x") for n in range(3))
    assert found["scores"] == {"sums/acc": pytest.approx(right / 3)}
    assert (found["metric"], found["count"], found["loss"]) == ("sums/acc", 3, None)
    low, high = found["intervals"]["sums/acc"]
    assert 0 <= low < high <= 1
    missing = run("evaluate", base, "--lm-eval", "sum", "--lm-eval-path", folder)
    assert missing.exit_code == 2
    assert "no task 'sum'" in missing.stderr


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([], [], ["holds no example"]),
        (["{"], [], ["line 1"]),
        ([{"messages": [{"role": "user", "content": "q"}]}], [], ["line 1", "no assistant turn"]),
        ([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}], [], ["expected"]),
        ([{"prompt": "", "completion": "a"}], [], ["asks nothing"]),
        ([{"prompt": "q", "completion": "a"}], ["--scorer", "bleurt"], ["no scorer 'bleurt'"]),
        ([{"prompt": "q", "completion": "a"}], ["--scorer", "rogue"], ["did you mean 'rouge'?"]),
        ([{"prompt": "q", "completion": "a"}], ["--shots", 2], ["no examples were given"]),
        ([{"prompt": "q", "completion": "a"}], ["--examples", "e.jsonl"], ["--examples", "without --shots"]),
        ([{"prompt": "q", "completion": "a"}], ["--random-labels"], ["ask for shots"]),
        ([{"prompt": "q", "completion": "a"}], ["--too-long", "truncate"], ["error, drop"]),
        ([{"prompt": "q", "completion": "a"}], ["--max-new-tokens", 600], ["1 of 1 questions don't fit", "512"]),
        ([{"prompt": "q", "completion": "a"}], ["--scorer", "accuracy"], ["choose another scorer"]),
        ([{"text": "t", "label": "a"}], [], ["'a'", "no choice"]),
        ([{"text": t, "label": t} for t in "ab"], ["--max-new-tokens", 5], ["max_new_tokens", "likeliest label"]),
        ([{"prompt": "q", "completion": "a"}], ["--lm-eval", "arc_easy"], ["both TASK and --lm-eval"]),
        ([{"prompt": "q", "completion": "a"}], ["--lm-eval-chat"], ["--lm-eval-chat", "without --lm-eval"]),
    ],
    ids=str,
)
def test_mistakes(run: Any, base: Path, tmp_path: Path, rows: list[Any], options: list[Any], said: list[str]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    result = run("evaluate", base, path, *options, "--answers", tmp_path / "a.jsonl")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("slimtune: ")
    assert result.stderr.count("\n") == 1
    for part in said:
        assert part in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.jsonl"]


def test_answers_that_are_there_stay(run: Any, base: Path, task: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"kept": 1})
    result = run("evaluate", base, task, *SHORT, "--answers", path)
    assert (result.exit_code, "--overwrite" in result.stderr) == (2, True)
    assert lines(path) == [{"kept": 1}]
    asked(run, base, task, *SHORT, "--answers", path, "--overwrite")
    assert len(lines(path)) == 6


def test_a_classifier_refuses_what_it_cannot_do(run: Any, task: Path, tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "base")
    data, other = (
        write_lines(tmp_path / "r.jsonl", *reviews(8)),
        write_lines(tmp_path / "o.jsonl", *reviews(8, ("good", "odd"))),
    )
    assert run("train", encoder, data, "-o", tmp_path / "out", "--max-steps", 1).exit_code == 0
    for arguments, said in (
        ([task], "pass rows with text, label"),
        ([other], "doesn't know: odd"),
        ([data, "--scorer", "chrf"], "leave --scorer out"),
        ([data, "--shots", 2, "--examples", other], "leave --shots out"),
    ):
        result = run("evaluate", tmp_path / "out", *arguments)
        assert result.exit_code == 2, result.output
        assert said in result.stderr


@pytest.mark.slow
def test_the_real_model_learns_from_examples(run: Any, tmp_path: Path) -> None:
    rows = [{"messages": example.messages()} for example in orders(12)]
    task, examples = write_lines(tmp_path / "t.jsonl", *rows[:2]), write_lines(tmp_path / "e.jsonl", *rows[2:])
    zero = asked(run, "smollm2-135m-instruct", task, "--max-new-tokens", 40)
    four = asked(run, "smollm2-135m-instruct", task, "--max-new-tokens", 40, "--shots", 4, "--examples", examples)
    # Asked outright it doesn't know the form; four examples show it.
    assert (zero["scores"]["json_match"], four["scores"]["json_valid"]) == (0, 1)
    assert four["loss"] < zero["loss"] / 2
