"""The whole way on the real SmolLM2: from an empty folder, through the pages, to a GGUF file that answers."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from browser import browser
from export.llama_cpp import LlamaCpp
from slimtune.data.demo_orders import INSTRUCTION, Example, make_orders
from slimtune.studio.jobs import Job, Jobs
from small_text_model import write_lines
from studio_browser import started, tab_of

MODEL = "smollm2-135m-instruct"
TOKENS = 48
"""More than an order takes in JSON."""


@pytest.mark.soak
def test_the_pages_lead_from_an_empty_folder_to_a_gguf_that_answers_as_a_terminal_makes_it(tmp_path: Path) -> None:
    examples, held_out = make_orders(320, 1)
    dropped = write_lines(tmp_path / "orders.jsonl", *({"messages": example.messages()} for example in examples))
    # As whoever starts it in a folder of their own: the commands that the pages show are typed there.
    here = tmp_path / "here"
    here.mkdir()
    (question,) = held_out
    with browser() as opened, started(Path("runs"), directory=here) as (_, url), tab_of(opened) as page:
        page.set_default_timeout(400_000)
        look_at_data(page, url, dropped)
        train(page)
        check(page, url)
        base, tuned = chat(page, url, question)
        file = export(page, url, tmp_path / "downloaded.gguf")
    check_answers(base, tuned, question)
    assert LlamaCpp(file).chat(question.question(), TOKENS) == tuned
    type_again(here, file)


def look_at_data(page: Any, url: str, dropped: Path) -> None:
    """Nothing is there but a file, which is dropped."""
    page.goto(url)
    page.get_by_text("No runs yet").wait_for()
    page.goto(f"{url}/data")
    assert page.get_by_label("Model whose tokens are counted").input_value() == MODEL
    page.locator("input[type=file]").set_input_files(dropped)
    page.locator(".samples mark").first.wait_for()
    page.get_by_role("link", name="Train on it").click()


def train(page: Any) -> None:
    page.get_by_label("Name", exact=True).fill("orders")
    page.locator("summary", has_text="Training").click()
    for name, value in (("max_steps", "60"), ("batch_size", "8"), ("learning_rate", "1e-3"), ("logging_steps", "5")):
        page.get_by_label(name, exact=True).first.fill(value)
    page.locator("#comes-to code", has_text="training.logging_steps=5").wait_for()
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/runs/orders")
    page.locator(".badge.done").wait_for()


def check(page: Any, url: str) -> None:
    """Base and run answer what was held out."""
    page.goto(f"{url}/outcome?run=orders")
    for name, value in (("limit", "4"), ("shots", "0"), ("texts", "0")):
        page.fill(f"[name={name}]", value)
    page.click("#check-form button.primary")
    page.wait_for_url("**/outcome/checks/orders-check")
    page.locator(".asked h4 >> text=Base").first.wait_for()


def chat(page: Any, url: str, question: Example) -> tuple[str, str]:
    """What base and run answer to a question that was in no file."""
    page.goto(f"{url}/chat?adapter=orders")
    page.fill("#system", INSTRUCTION)
    page.fill("[name=max_tokens]", str(TOKENS))
    page.fill("[name=temperature]", "0")
    page.fill("#message", question.sentence)
    page.keyboard.press("Enter")
    page.locator("#stop").wait_for()
    page.locator("#send").wait_for()
    base, tuned = page.locator(".assistant p:first-of-type").all_text_contents()
    page.click("#server button")
    page.locator("#server .badge.queued").wait_for()
    return base, tuned


def export(page: Any, url: str, path: Path) -> Path:
    """The file as the browser keeps it."""
    page.goto(f"{url}/slim?run=orders")
    page.check("[value=gguf]")
    page.select_option("[name=kind]", "F16")
    page.click("#export-form button.primary")
    page.wait_for_url("**/slim/results/orders-gguf")
    page.locator(".files").wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name="model.gguf", exact=True).click()
    download.value.save_as(path)
    return path


def check_answers(base: str, tuned: str, question: Example) -> None:
    """It was worth it: an order in JSON with the keys that were learned, which the base doesn't write."""
    keys = json.loads(question.order.to_json()).keys()
    assert json.loads(tuned).keys() == keys
    assert base != tuned


def type_again(here: Path, file: Path) -> None:
    """The commands that the pages showed, typed into an empty folder beside: to the bit the same files."""
    by_page, data = here / "runs", here / "runs" / "data"
    jobs = [job for job in Jobs(by_page) if job.arguments[0] in ("train", "evaluate", "export")]
    assert [job.state for job in jobs] == ["done"] * len(jobs)
    there = here.with_name("there")
    shutil.copytree(data, there / "runs" / "data")
    shutil.copytree(by_page / "orders-check" / "data", there / "runs" / "orders-check" / "data")
    for job in jobs:
        typed(job, here, there)
    written = [
        "orders/adapter_model.safetensors", "orders/adapter_config.json", "orders/loss.jsonl", "orders-gguf/model.gguf",
        "orders-check/base.jsonl", "orders-check/tuned.jsonl",
    ]  # fmt: skip
    for name in written:
        assert (there / "runs" / name).read_bytes() == (by_page / name).read_bytes(), name
    assert file.read_bytes() == (by_page / "orders-gguf" / "model.gguf").read_bytes()


def typed(job: Job, here: Path, there: Path) -> None:
    """A command as it stands on the page, in a shell elsewhere."""
    words = shlex.split(job.command.replace(str(here), str(there)))
    assert words[0] == "slimtune"
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=there, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
