"""The report: well-formed, escaped, whole in one file, and right in a real browser where one is at hand."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import DESK, PHONE, browser, look
from compare.constructed import BASE, LORA, done, everything, failed, questions, summary
from slimtune.compare.record import ComparisonRecord
from slimtune.compare.report import html, report, write_report
from slimtune.compare.results import ShownQuestion
from slimtune.compare.summary import Summary, summarize

NASTY = """<script>alert("1")</script><img src=x onerror=alert(2)> | </div> & "quoted" {{ 7 * 7 }}"""
VOID = {"meta", "link", "br", "img", "hr", "input"}


def facts() -> ComparisonRecord:
    return ComparisonRecord(
        model="a model",
        data="orders.jsonl",
        command=f"slimtune compare recipe.yaml '{NASTY}'",
        date="2026-11-23 04:36 UTC",
        recipe="model:\n  name: <x>\n",
        candidates=[],
        seeds=3,
        same={},
        machine={"processor": "a processor"},
        versions={"python": "3.11"},
        price_per_hour=0.6,
        price_of="RTX 4090",
    )


def nasty() -> tuple[Summary, list[ShownQuestion]]:
    """Everything at once, with answers and questions that are HTML."""
    candidates, results = everything()
    poisoned = [
        result.model_copy(update={"score": result.score.model_copy(update={"answers": [NASTY] * 100})})
        if result.score and result.candidate == "lora"
        else result
        for result in results
    ]
    return summarize(candidates, poisoned, 3), [ShownQuestion(text=NASTY, answer=NASTY), *questions()[1:]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    of, asked = nasty()
    return write_report(tmp_path_factory.mktemp("report"), report(of, facts(), asked))


class Balanced(HTMLParser):
    """Every tag closed in its order; what the browser would forgive is kept as a problem."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")


def parsed(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    return parser


def test_it_is_well_formed_with_every_name_once(page: Path) -> None:
    found = parsed(page.read_text())
    assert not found.problems
    assert not found.open
    names = [attributes["id"] for _, attributes in found.seen if "id" in attributes]
    assert len(names) == len(set(names))
    assert {"main", "svg", "table", "details"} <= {tag for tag, _ in found.seen}


def test_nothing_comes_from_elsewhere(page: Path) -> None:
    for tag, attributes in parsed(page.read_text()).seen:
        assert tag not in ("script", "iframe", "object", "embed"), tag
        for name in ("src", "href", "xlink:href", "srcset"):
            assert re.match(r"#|data:", attributes.get(name) or "#"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], attributes
    assert not re.search(r"@import|url\((?!#)", page.read_text())


def test_what_models_and_users_wrote_is_text(page: Path) -> None:
    text = page.read_text()
    assert "<img" not in text
    assert text.count("&lt;script&gt;alert(&#34;1&#34;)") >= 3
    assert "{{ 7 * 7 }}" in text
    table = (page.parent / "report.md").read_text()
    assert "<script" not in table


def test_names_make_no_markdown_and_steer_no_terminal(tmp_path: Path) -> None:
    of, asked = nasty()
    evil = "[pay](http://evil) ![p](http://evil/p.png) `code` **b** \x1b[31mred\n# title"
    write_report(tmp_path, report(of, facts().model_copy(update={"model": evil, "data": evil, "command": evil}), asked))
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "\x1b" not in text, name
        assert "\\x1b[31m" in text or "\\\\x1b\\[31m" in text, name
    lines = (tmp_path / "report.md").read_text().splitlines()
    prose = [line for line in lines if "evil" in line and not line.startswith("- `")]
    assert prose
    assert not [line for line in prose if re.search(r"(?<!\\)(?:\]\(|!\[)", line)]
    assert not [line for line in lines if line.startswith("# title")]


def test_everything_that_was_measured_is_told(page: Path) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text()))
    for said in (
        "Choose lora", "0.910 to 0.987", "+0.210", "1.65 GB", "4,884,480", "269.0 MB", "2 of 3, 1 failed",
        "the loss is not a number in step 17", "4-shot random labels", "Learning rate: full 2e-05",
        "Steps: 40 for every method", "seen here", "McNemar", "Question 1", "encyclopedia", "$0.60 an hour",
    ):  # fmt: skip
        assert said in text, said


def test_the_table_is_as_wide_in_every_line(page: Path) -> None:
    rows = [line for line in (page.parent / "report.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 10
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_pictures_for_a_readme_lie_beside_it(page: Path) -> None:
    for name in ("scores.png", "costs.png"):
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")


def test_the_same_results_give_the_same_page() -> None:
    of, asked = nasty()
    assert html(report(of, facts(), asked)) == html(report(of, facts(), asked))


@pytest.mark.parametrize(
    "parts",
    [
        [(BASE, done(BASE, [0.5]))],
        [(LORA, [failed(LORA, seed) for seed in range(3)])],
        [(LORA, [])],
        [(BASE, done(BASE, [1.0])), (LORA, done(LORA, [1.0, 1.0, 1.0]))],
    ],
    ids=["prompting alone", "all failed", "nothing yet", "all right"],
)
def test_little_to_tell_makes_a_page_too(parts: list, tmp_path: Path) -> None:
    found = parsed(write_report(tmp_path, report(summary(parts), facts(), questions())).read_text())
    assert not found.problems


def test_in_a_browser(page: Path) -> None:
    with browser() as opened:
        seen = {
            (size, scheme): look(opened, page, size, scheme) for size in (PHONE, DESK) for scheme in ("light", "dark")
        }
    for shown in seen.values():
        assert shown.problems == []
        assert shown.requests == [page.as_uri()]
        assert shown.overflow_pixels == 0
        assert shown.broken_images == 0
        assert shown.smallest_text_pixels >= 9
    assert seen[PHONE, "light"].background == "rgb(255, 255, 255)"
    assert seen[PHONE, "dark"].background == "rgb(20, 23, 28)"
