"""Every page in a real browser: nothing refused or from elsewhere, usable by keyboard, on a phone, in the dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import DESK, PHONE, browser
from slimtune.studio.app import find_pages
from slimtune.studio.security import Access
from studio_browser import listening_studio, tab
from studio_client import write_run

ADDRESSES = {page.name: page.path for page in find_pages() if page.order is not None} | {"run": "/runs/orders-lora"}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A studio over a folder with some runs, one of them damaged."""
    runs = tmp_path_factory.mktemp("studio") / "runs"
    base = "smollm2-135m-instruct"
    falling = [2.6 * 0.97**step + 0.25 + 0.08 * (step * 7 % 5 - 2) * 0.97**step for step in range(120)]
    write_run(runs / "orders-lora", base, losses=falling)
    write_run(runs / "orders-dora", base, "dora", losses=[loss * 0.93 + 0.02 for loss in falling], rank=64)
    write_run(runs / "reviews", "minilm-l6-v2", "ia3", losses=[loss / 2 for loss in falling])
    write_run(runs / "damaged", base)
    (runs / "damaged" / "results.json").write_text('{"base": "smol')
    with listening_studio(runs) as url:
        yield url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ADDRESSES)
def test_a_page_is_whole_and_accessible(chromium: Any, studio: str, name: str, scheme: str) -> None:
    with tab(chromium, DESK, scheme) as seen:
        seen.page.goto(studio + ADDRESSES[name], wait_until="networkidle" if name != "run" else "load")
        assert seen.page.locator("h1").count() == 1
        seen.picture(f"{name}-{scheme}")
        seen.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert seen.violations() == []
        assert seen.overflow_pixels <= 0
        assert seen.problems == []
        assert seen.strangers == []


@pytest.mark.parametrize("language", ["en", "ko"])
@pytest.mark.parametrize("name", ADDRESSES)
def test_a_page_fits_on_a_phone(chromium: Any, studio: str, name: str, language: str) -> None:
    with tab(chromium, PHONE, language=language) as seen:
        seen.page.goto(studio + ADDRESSES[name])
        seen.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert seen.page.locator("html").get_attribute("lang") == language
        assert seen.overflow_pixels <= 0
        assert seen.problems == []
        if language == "en":
            seen.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = false)")
            seen.picture(f"{name}-phone")


def test_chosen_runs_are_drawn_over_each_other(chromium: Any, studio: str) -> None:
    with tab(chromium) as seen:
        page = seen.page
        page.goto(studio)
        page.get_by_label("Search").fill("orders")
        page.get_by_role("link", name="reviews").wait_for(state="detached")
        for name in ("orders-lora", "orders-dora"):
            page.get_by_label(f"Choose {name}").check()
        page.get_by_role("button", name="Curves and differences").click()
        page.locator("#curves canvas").wait_for()
        assert page.locator("#curves .u-series").count() == 3  # the steps, and a line each
        assert page.get_by_role("rowheader", name="method.r").is_visible()
        # The list is read again now and then, and what is chosen stays so.
        with page.expect_response(lambda answer: answer.request.headers.get("hx-source", "").endswith("rows")):
            pass
        assert page.get_by_label("Choose orders-lora").is_checked()
        assert seen.violations() == []
        assert seen.problems == []
        seen.picture("runs-compared")


def test_a_run_is_deleted_after_a_question(chromium: Any, studio: str) -> None:
    with tab(chromium) as seen:
        page = seen.page
        page.goto(f"{studio}/runs/damaged")
        asked: list[str] = []
        page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
        page.get_by_role("button", name="Delete").click()
        assert "Delete damaged with all of its files?" in asked[0]
        page.reload()
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Delete").click()
        page.wait_for_url(f"{studio}/")
        assert page.get_by_role("link", name="damaged").count() == 0


def test_the_keyboard_is_enough(chromium: Any, studio: str) -> None:
    with tab(chromium) as seen:
        page = seen.page
        page.goto(f"{studio}/train")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == "#content"
        page.get_by_role("radio", name="classification A classifier").focus()
        page.keyboard.press("ArrowDown")
        page.wait_for_url("**preset=continued-pretraining**")
        page.get_by_label("Data", exact=True).focus()
        page.keyboard.type("my data.jsonl")
        page.locator("#comes-to code", has_text="my data.jsonl").wait_for()
        start = page.get_by_role("button", name="Start", exact=True)
        start.focus()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert seen.problems == []


def test_mistakes_are_said_beside_their_fields(chromium: Any, studio: str) -> None:
    with tab(chromium) as seen:
        page = seen.page
        page.goto(f"{studio}/train")
        page.locator("summary", has_text="Training").click()
        page.get_by_label("epochs", exact=True).fill("-1")
        wrong = page.locator("#error-training-epochs", has_text="above 0")
        wrong.wait_for()
        assert page.get_by_label("epochs", exact=True).get_attribute("aria-invalid") == "true"
        assert seen.violations() == []
        page.get_by_label("epochs", exact=True).fill("2")
        wrong.wait_for(state="detached")
        assert page.get_by_label("epochs", exact=True).get_attribute("aria-invalid") is None
        page.get_by_role("button", name="Start", exact=True).click()
        page.locator("#error-data-train", has_text="needed").wait_for()


@pytest.mark.parametrize("button", ["Start", "Save recipe"])
def test_what_is_missing_stays_said_when_an_earlier_check_answers_late(chromium: Any, studio: str, button: str) -> None:
    """Leaving a field checks the form, and the press that left it must not lose its answer to that check."""
    with tab(chromium) as seen:
        page = seen.page
        page.goto(f"{studio}/train")
        epochs = page.get_by_label("epochs", exact=True)
        page.locator("summary", has_text="Training").click()
        late: list[Any] = []
        page.route("**/train/check", lambda route: late.append(route) if not late else route.continue_())
        epochs.fill("2")
        page.get_by_role("button", name=button, exact=True).click()
        needed = page.locator("#error-data-train", has_text="needed")
        needed.wait_for()
        late[0].continue_()
        epochs.fill("4")
        with page.expect_response("**/train/check"):
            epochs.blur()
        page.locator("#comes-to code", has_text="epochs=4").wait_for()
        assert needed.is_visible()
        assert page.locator("#comes-to .notice.bad", has_text="needed").is_visible()


def test_a_password_is_asked_for_in_the_page(chromium: Any, tmp_path: Path) -> None:
    with listening_studio(tmp_path, Access(password="open sesame")) as url, tab(chromium) as seen:
        page = seen.page
        page.goto(f"{url}/train")
        page.wait_for_url("**/login")
        assert seen.violations() == []
        page.get_by_label("Password").fill("guess")
        page.get_by_role("button", name="Enter").click()
        page.locator("#notice", has_text="not the password").wait_for()
        page.get_by_label("Password").fill("open sesame")
        page.get_by_role("button", name="Enter").click()
        page.wait_for_url(f"{url}/")
        assert page.get_by_role("heading", name="No runs yet").is_visible()
        seen.picture("empty")


def test_a_page_of_another_site_changes_nothing(chromium: Any, studio: str, tmp_path: Path) -> None:
    """It may send a form, as any page may to anybody; the studio refuses."""
    evil = tmp_path / "evil.html"
    evil.write_text(f'<form method="post" action="{studio}/runs/reviews/delete"><button>win</button></form>')
    with tab(chromium) as seen:
        seen.page.goto(evil.as_uri())
        with seen.page.expect_response("**/delete") as answered:
            seen.page.get_by_role("button").click()
        assert answered.value.status == 403
        seen.page.goto(studio)
        assert seen.page.get_by_role("link", name="reviews").is_visible()
