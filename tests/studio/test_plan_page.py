"""The page Plan: what it shows is what `slimtune plan` says, and leads to a training with those settings."""

from __future__ import annotations

import html
import re
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
from fastapi.testclient import TestClient

from browser import browser
from slimtune.studio import forms
from slimtune.studio.pages.plan import OPTIONS, TO_TRAIN
from small_text_model import save_base
from studio_browser import Tab, check_accessible, listening_studio, tab_of
from studio_client import awaited, open_studio


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_base(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return open_studio(tmp_path_factory.mktemp("runs"))


def test_a_plan_leads_to_a_training_with_its_settings(client: TestClient, model: str) -> None:
    settings = {"model.name": model, "method.name": "lora", "model.quantize": "dense", "method.r": "4"}
    more = {"training.batch_size": "2", "data.max_length": "64", "device": "RTX 4090"}
    page = awaited(client, "/plan/result", **settings, **more)
    command = f"slimtune plan {model} --device 'RTX 4090' --method lora --base dense --rank 4 --batch-size 2"
    assert command in html.unescape(page)
    assert "Fits RTX 4090" in page
    assert 'class="part-weights"' in page
    (query, *_) = re.findall(r'href="/train\?([^"]*)"', page)
    to_train = dict(parse_qsl(html.unescape(query)))
    assert to_train["model.name"] == model
    assert (to_train["method.name"], to_train["method.r"], to_train["training.batch_size"]) == ("lora", "4", "2")
    assert forms.fill_in({**to_train, "data.train": "rows.jsonl"}).errors == {}


def test_what_doesnt_fit_says_what_would(client: TestClient) -> None:
    page = awaited(
        client,
        "/plan/result",
        **{"model.name": "llama-2-7b", "method.name": "full", "device": "T4", "data.max_length": "64"},
    )
    assert "Nothing fits T4" in page
    assert "would fit" in page
    assert "/train?" not in page


def test_mistakes_are_the_sentences_of_the_library(client: TestClient) -> None:
    assert "did you mean" in awaited(client, "/plan/result", **{"model.name": "llama-2-7", "device": "T4"})


def test_the_form_has_what_the_address_says(client: TestClient) -> None:
    page = client.get("/plan", params={"model.name": "some-model", "method.r": "32", "goal": "tiny"}).text
    assert 'value="some-model"' in page
    assert 'name="method.r" min="1" value="32"' in page
    assert '<option value="tiny" selected>' in page
    for name in OPTIONS:
        assert f'name="{name}"' in page


def test_settings_are_those_of_the_form_of_training(tmp_path: Path) -> None:
    known = {setting.place for group in forms.all_settings().values() for setting in group}
    assert {*TO_TRAIN.values()} - {forms.METHOD} <= known


def test_the_plan_moves_with_its_settings_in_a_browser(model: str, tmp_path: Path) -> None:
    settings = "method.name=lora&model.quantize=dense&data.max_length=64&device=T4&training.batch_size=1"
    with browser() as opened, listening_studio(tmp_path) as url, tab_of(opened) as page:
        page.goto(f"{url}/plan?model.name={model}&{settings}")
        page.locator("#recommended").wait_for()
        page.locator(".waiting").wait_for(state="detached")
        Tab(page).picture("plan-result")
        before = page.locator("#recommendation .big").inner_text()
        page.get_by_label("Examples at once").fill("64")
        page.locator("#result code", has_text="--batch-size 64").wait_for()
        page.locator("#recommended").wait_for()
        assert page.locator("#recommendation .big").inner_text() != before
        check_accessible(page)
        page.get_by_role("link", name="Train with these settings").click()
        page.wait_for_url("**/train?**")
        assert page.locator("#training-batch_size").input_value() == "64"
