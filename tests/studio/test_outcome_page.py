"""Whether tuning worked: checks, the reports of comparisons, and votes that are blind."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from browser import browser
from slimtune.compare.results import Result, RunScore, ShownQuestion, write_questions
from slimtune.errors import ConfigError
from slimtune.metrics.intervals import wilson
from slimtune.studio.checks import read_check
from slimtune.studio.jobs import Jobs
from slimtune.studio.votes import Contest, Votes
from small_server import wait_until
from small_text_model import orders, write_lines
from studio_browser import PHONE, check_accessible, listening_studio, tab_of
from studio_client import open_studio
from studio_runs import answering, save_runs

NO_RUNS = ["../tiny", "..%2ftiny", "%2e%2e", ".studio", "a%2fb", "nothing", "%00"]
REPORT = (
    "<!doctype html><style>p { color: green }</style><p>take lora</p><script>parent.document.title = 'taken'</script>"
)


def save_recipe(runs: Path, base: Path, **data: Any) -> None:
    """A recipe for the run "orders", as a training writes it."""
    rows = write_lines(runs.parent / "orders.jsonl", *({"messages": each.messages()} for each in orders(20)))
    recipe = {"model": {"name": str(base)}, "data": {"train": str(rows)} | data, "output": str(runs / "orders")}
    (runs / "orders" / "recipe.yaml").write_text(json.dumps(recipe))


def save_comparison(runs: Path) -> Path:
    """A comparison of two, as its command leaves it."""
    folder = runs / "compared"
    for name, scores in (("lora", [1.0, 1.0, 0.0]), ("0 shots", [1.0, 0.0, 0.0])):
        place = folder / "runs" / f"{name.replace(' ', '-')}-seed-0"
        place.mkdir(parents=True)
        answers = [f"{name} says {number}" for number in range(3)]
        score = RunScore(name="exact_match", per_question=scores, answers=answers, seconds=1.0)
        Result(candidate=name, seed=0, status="done", score=score).write(place / "result.json")
    write_questions(folder / "questions.jsonl", [ShownQuestion(text=f"question <{n}>", answer="yes") for n in range(3)])
    record = {
        "model": "smollm2-135m-instruct", "data": "rows.jsonl", "command": "slimtune compare",
        "date": "now", "recipe": "",
        "candidates": ["lora", "0 shots"], "seeds": 1, "same": {}, "machine": {}, "versions": {},
    }  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(record))
    (folder / "report.html").write_text(REPORT)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, runs = save_runs(tmp_path_factory.mktemp("outcome"))
    save_comparison(runs)
    return base, runs


def test_answers_of_a_comparison_stand_side_by_side(made: tuple[Path, Path]) -> None:
    client = open_studio(made[1])
    page = client.get("/outcome/checks/compared").text
    assert page.count('class="asked"') == 3
    assert "question &lt;1&gt;" in page
    assert "lora says 1" in page
    assert client.get("/outcome/checks/compared?differ=true").text.count('class="asked"') == 1
    assert "compared" in client.get("/outcome").text


def test_a_report_is_shown_in_a_sandbox_of_its_own(made: tuple[Path, Path], tmp_path: Path) -> None:
    report = open_studio(made[1]).get("/outcome/checks/compared/report")
    assert report.text == REPORT
    policy = report.headers["content-security-policy"]
    assert policy.startswith("sandbox;")
    assert "script" not in policy
    assert "default-src 'none'" in policy
    runs = tmp_path / "runs"
    secret = tmp_path / "secret.html"
    secret.write_text("secret")
    (runs / "linked").mkdir(parents=True)
    (runs / "linked" / "comparison.json").write_text("{}")
    (runs / "linked" / "report.html").symlink_to(secret)
    refused = open_studio(runs).get("/outcome/checks/linked/report")
    assert (refused.status_code, "secret" in refused.text) == (404, False)


@pytest.mark.parametrize("name", NO_RUNS)
@pytest.mark.parametrize("behind", ["", "/report", "/jobs"])
def test_what_is_no_run_is_not_shown(made: tuple[Path, Path], name: str, behind: str) -> None:
    assert open_studio(made[1]).get(f"/outcome/checks/{name}{behind}").status_code == 404


def test_damaged_files_are_named_and_the_others_shown(tmp_path: Path) -> None:
    folder = save_comparison(tmp_path)
    (folder / "runs" / "lora-seed-0" / "result.json").write_text("{")
    (tmp_path / "checked").mkdir()
    (tmp_path / "checked" / "check.json").write_text("[]")
    (tmp_path / "checked" / "base.jsonl").write_text('{"question": "one')
    check = read_check(tmp_path, Jobs(tmp_path), "compared")
    assert [candidate.name for candidate in check.candidates] == ["0 shots"]
    assert "result.json is damaged" in check.faults[0]
    page = open_studio(tmp_path).get("/outcome/checks/checked").text
    assert "check.json can&#39;t be read" in page
    assert "base.jsonl can&#39;t be read" in page
    assert open_studio(tmp_path).get("/outcome").status_code == 200


def test_a_run_that_held_nothing_out_says_so(tmp_path: Path) -> None:
    base, runs = save_runs(tmp_path)
    save_recipe(runs, base)
    client = open_studio(runs)
    for kind, said in (("check", "nothing is held out"), ("comparison", "held no rows out")):
        refused = client.post("/outcome/checks", data={"run": "orders", "kind": kind})
        assert refused.status_code == 422
        assert said in refused.text
    assert client.post("/outcome/checks", data={"run": "../tiny"}).status_code == 404
    assert "has no recipe.yaml" in client.post("/outcome/checks", data={"run": "주문"}).text
    assert not list(Jobs(runs))
    assert sorted(path.name for path in runs.iterdir()) == ["orders", "주문"]


def test_a_comparison_is_a_command_by_the_recipe_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, runs = save_runs(tmp_path)
    save_recipe(runs, base, held_out=0.2)
    # What it runs is `slimtune compare`, which has tests of its own and takes minutes.
    monkeypatch.setattr(Jobs, "run_on", lambda self: None)
    client = open_studio(runs)
    form = {"run": "orders", "kind": "comparison", "methods": "lora,dora", "few": "0", "seeds": "2", "max_steps": "5"}
    for name in ("orders-comparison", "orders-comparison-2"):
        assert client.post("/outcome/checks", data=form).headers["hx-redirect"] == f"/outcome/checks/{name}"
    command = next(iter(Jobs(runs))).command
    assert command.startswith(f"slimtune compare {runs}/orders/recipe.yaml --methods lora,dora --shots 0 --seeds 2")
    assert command in client.get("/outcome/checks/orders-comparison").text
    client.post("/outcome/checks/orders-comparison/stop")
    assert next(iter(Jobs(runs))).state == "stopped"


def test_a_comparison_runs_no_code_that_a_recipe_names(tmp_path: Path) -> None:
    base, runs = save_runs(tmp_path)
    for extra in ({"evaluation": {"scorer": "own.py:score"}}, {"compare": {"scorer": "own.py:score"}}):
        save_recipe(runs, base, held_out=0.2)
        path = runs / "orders" / "recipe.yaml"
        path.write_text(json.dumps(json.loads(path.read_text()) | extra))
        refused = open_studio(runs).post("/outcome/checks", data={"run": "orders", "kind": "comparison"})
        assert (refused.status_code, "code in a file" in refused.text) == (422, True)
    assert not list(Jobs(runs))


def test_a_vote_is_kept_once_and_by_who_was_where(tmp_path: Path) -> None:
    votes, contest = Votes(tmp_path), Contest.between(tmp_path, "tiny", "orders", "")
    assert contest == Contest.between(tmp_path, "tiny", "", "orders")
    sides: set[str] = set()
    ballot = votes.deal(contest, "first prompt", ("of the base", "of the run"))
    votes.vote(contest, ballot.id, "tie")
    with pytest.raises(ConfigError, match="judged already"):
        votes.vote(contest, ballot.id, "left")
    for number in range(30):
        ballot = votes.deal(contest, f"prompt {number}", ("of the base", "of the run"))
        sides.add(ballot.left)
        # The run is better, wherever it stands.
        votes.vote(contest, ballot.id, "left" if ballot.left == "of the run" else "right")
    assert sides == {"of the base", "of the run"}
    tally = votes.tally(contest)
    assert (tally.wins, tally.losses, tally.ties) == (0, 30, 1)
    assert tally.rate == 0.5 / 31
    assert tally.is_shown
    assert len(votes.prompts(contest)) == 31
    decided = Contest.between(tmp_path, "tiny", "orders", "reviews")
    votes.vote(decided, votes.deal(decided, "prompt", ("a", "b")).id, "left")
    assert votes.tally(decided).interval in (wilson(0, 1), wilson(1, 1))
    for name in ("../../x", "0" * 16, ""):
        with pytest.raises(ConfigError):
            votes.vote(contest, name, "tie")
    with pytest.raises(ConfigError, match="between two"):
        Contest.between(tmp_path, "tiny", "orders", "orders")


def test_a_kill_in_a_vote_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    votes, contest = Votes(tmp_path), Contest("tiny", "", "orders")
    ballot = votes.deal(contest, "prompt", ("a", "b"))
    folder = votes.folder / contest.id
    kept = (folder / "open" / f"{ballot.id}.json").read_bytes()
    votes.vote(contest, ballot.id, "tie")
    # Killed between the vote and the removal of its ballot: it is there again.
    (folder / "open" / f"{ballot.id}.json").write_bytes(kept)
    votes.vote(contest, ballot.id, "tie")
    with (folder / "votes.jsonl").open("a") as file:
        file.write('{"id": "cut')
    second = votes.deal(contest, "another", ("a", "b"))
    votes.vote(contest, second.id, "tie")
    assert (votes.tally(contest).ties, votes.tally(contest).rate) == (2, 0.5)


def test_an_adapter_that_was_trained_again_begins_a_contest_of_its_own(tmp_path: Path) -> None:
    weights = tmp_path / "orders" / "adapter_model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    before = Contest.between(tmp_path, "tiny", "", "orders")
    os.utime(weights, (1.0, 1.0))
    assert Contest.between(tmp_path, "tiny", "", "orders").id != before.id


def test_a_vote_names_nobody_and_stays_within_a_base(made: tuple[Path, Path]) -> None:
    base, runs = made
    with answering(runs, base):
        client = open_studio(runs)
        sides = {"one": json.dumps([str(base), ""]), "other": json.dumps([str(base), "orders"])}
        dealt = client.post("/outcome/vote/next", data=sides | {"prompt": "two apples", "max_tokens": "4"})
        assert dealt.status_code == 200
        assert "orders" not in dealt.text
        assert str(base) not in dealt.text
        ballot = re.search(r'name="id" value="(\w+)"', dealt.text)
        assert ballot is not None
        vote = sides | {"id": ballot[1], "choice": "left"}
        assert client.post("/outcome/vote/cast", data=vote).status_code == 200
        assert client.post("/outcome/vote/cast", data=vote).status_code == 422
        assert client.post("/outcome/vote/next", data=sides).status_code == 422
        for other, status in (('["else", ""]', 422), ('["tiny", "../x"]', 422), ("{", 422)):
            assert client.post("/outcome/vote/next", data=sides | {"other": other}).status_code == status
        outside = sides | {"other": json.dumps([str(base), "../tiny"])}
        assert client.post("/outcome/vote/next", data=outside).status_code == 404


def test_a_run_is_checked_and_voted_on_in_a_browser(tmp_path: Path) -> None:
    base, runs = save_runs(tmp_path, "orders")
    save_recipe(runs, base, held_out=0.2)
    with browser() as opened, answering(runs, base), listening_studio(runs) as url, tab_of(opened) as tab:
        tab.goto(f"{url}/outcome")
        for name, value in (("limit", "2"), ("shots", "0"), ("texts", "0")):
            tab.fill(f"[name={name}]", value)
        tab.click("#check-form button.primary")
        tab.wait_for_url("**/outcome/checks/orders-check")
        assert f"slimtune evaluate {runs}/orders" in tab.locator("#jobs").text_content()
        # The page is loaded again by itself as each command ends.
        tab.locator(".asked h4 >> text=Base").first.wait_for(timeout=240_000)
        wait_until(lambda: not any(job.state == "running" for job in Jobs(runs)))
        assert [job.state for job in Jobs(runs)] == ["done", "done"]
        check = read_check(runs, Jobs(runs), "orders-check")
        assert [(candidate.name, len(candidate.answers)) for candidate in check.candidates] == [
            ("base", 2),
            ("tuned", 2),
        ]
        tab.goto(f"{url}/outcome/vote")
        tab.fill("[name=max_tokens]", "6")
        tab.click("#contest button.primary")
        for number, key in enumerate("10", 1):
            tab.locator(".ballot").wait_for()
            assert "orders" not in tab.locator("#ballot").inner_text()
            tab.keyboard.press(key)
            tab.locator(f"text=/(Votes so far: |Votes: ){number}/").first.wait_for()
        tab.click("#result summary")
        tab.locator("#tallies >> text=orders against").wait_for()
        assert Votes(runs).tallies()[0].count == 2


def test_a_report_in_a_browser_has_its_style_and_runs_nothing(made: tuple[Path, Path]) -> None:
    with browser() as opened, listening_studio(made[1]) as url:
        tab, said = opened.new_page(), []
        tab.on("console", lambda line: said.append(line.text))
        tab.goto(f"{url}/outcome/checks/compared")
        shown = tab.frame_locator("iframe.report").locator("p")
        assert shown.inner_text() == "take lora"
        assert shown.evaluate("each => getComputedStyle(each).color") == "rgb(0, 128, 0)"
        assert tab.title().startswith("compared")
        assert ["sandboxed" in line for line in said] == [True]


@pytest.mark.parametrize(("size", "language", "scheme"), [(PHONE, "ko-KR", "dark"), ((1280, 900), "en-US", "light")])
def test_the_pages_are_accessible_at_a_phone_and_at_a_desk(
    made: tuple[Path, Path], size: tuple[int, int], language: str, scheme: str
) -> None:
    runs = made[1]
    votes, contest = Votes(runs), Contest(str(made[0]), "", "orders")
    votes.vote(contest, votes.deal(contest, "prompt", ("a", "b")).id, "left")
    lines = [{"question": "q", "answer": "a", "expected": "a", "score": 1.0, "scores": {"exact_match": 1.0}}] * 3
    (runs / "checked").mkdir(exist_ok=True)
    (runs / "checked" / "check.json").write_text('{"run": "orders"}')
    write_lines(runs / "checked" / "base.jsonl", *lines)
    (runs / "compared" / "report.html").write_text("<!doctype html><html lang='en'><title>report</title><p>take lora")
    with browser() as opened, listening_studio(runs) as url, tab_of(opened, size, language, scheme) as tab:
        for path in ("", "/vote", "/checks/compared", "/checks/checked"):
            tab.goto(f"{url}/outcome{path}")
            tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            check_accessible(tab)
