"""All languages say the same, and templates say nothing by themselves."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slimtune.studio import app, forms, texts
from slimtune.studio.exports import slim_recipes
from studio_client import open_studio

TEMPLATES = sorted((app.HERE / "templates").glob("*.j2"))
SPOKEN = {"aria-label", "title", "alt", "placeholder", "aria-description", "label", "hx-confirm", "data-copied"}
"""Attributes that are read by people."""
LANGUAGES = texts.load()
ENGLISH = LANGUAGES["en"].by_key
LIBRARY = "library."
"""In front of what the library says in English itself: settings, methods and recipes."""
PLACEHOLDER = re.compile(r"{(\w+)")


class Words(HTMLParser):
    """What a page says: its text, and the attributes that are read aloud."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.said += [value for name, value in attrs if name in SPOKEN and value]

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def bare_words(template: str) -> list[str]:
    """Words of a template that don't come from the texts."""
    without = re.sub(r"{#.*?#}|{%.*?%}|{{.*?}}", "", template, flags=re.DOTALL)
    words = Words()
    words.feed(without)
    return [word for said in words.said for word in re.findall(r"[^\W\d_]{2,}", said)]


def of_the_pages(language: str) -> dict[str, str]:
    """What pages say, without what the library says in English."""
    return {key: text for key, text in LANGUAGES[language].by_key.items() if not key.startswith(LIBRARY)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_languages_have_the_same_keys_in_the_same_order(language: str) -> None:
    assert list(of_the_pages(language)) == list(ENGLISH)


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_languages_name_the_same_values(language: str) -> None:
    for key, text in of_the_pages(language).items():
        assert set(PLACEHOLDER.findall(text)) == set(PLACEHOLDER.findall(ENGLISH[key])), key


@pytest.mark.parametrize("language", LANGUAGES.keys() - {"en"})
def test_a_language_says_all_that_the_library_says_on_the_pages_and_nothing_besides(language: str) -> None:
    groups = [group for method in forms.method_names() for group in forms.all_settings(method).values()]
    shown = {f"setting.{setting.place}" for group in groups for setting in group}
    shown |= {f"method.{name}" for name in forms.method_names()} | {f"preset.{name}" for name in forms.presets()}
    shown |= {f"slim.{recipe.name}" for recipe in slim_recipes()}
    said = {key.removeprefix(LIBRARY) for key in LANGUAGES[language].by_key if key.startswith(LIBRARY)}
    assert said == shown


@pytest.mark.parametrize("method", forms.method_names())
def test_settings_are_explained_in_the_language_of_the_page(tmp_path: Path, method: str) -> None:
    for language, wanted in (("ko", "[가-힣]"), ("en", "[a-z]")):
        page = open_studio(tmp_path, language=language).get("/train", params={"method.name": method}).text
        help_of = dict(re.findall(r'<span class="help" id="help-([\w-]+)">(.*?)</span>\n', page, re.DOTALL))
        for setting in (each for group in forms.all_settings(method).values() for each in group):
            said = re.sub("<.*?>", "", help_of[setting.id])
            # Some have no help in English: their names say it, or the text above all of a method's settings does.
            assert bool(re.search(wanted, said)) == (language != "en" or setting.help != ""), setting.place


def test_korean_is_korean() -> None:
    english = {key for key, text in LANGUAGES["ko"].by_key.items() if not re.search("[가-힣]", text)}
    assert not english


def test_what_has_no_text_of_a_language_is_said_in_english() -> None:
    parts = app._templates().from_string('{% from "parts.html.j2" import said with context %}{{ said("x", "a `b`") }}')
    assert parts.render(t=LANGUAGES["ko"]).strip() == '<span lang="en">a b</span>'


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_a_template_says_nothing_by_itself(template: Path) -> None:
    assert bare_words(template.read_text(encoding="utf-8")) == []


def test_bare_words_are_found() -> None:
    assert bare_words("<p>Stop {{ name }}</p><img alt='a curve'>{# note #}") == ["Stop", "curve"]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_a_template_has_no_script_or_style_of_its_own(template: Path) -> None:
    text = template.read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|<style|\son\w+=|hx-on|javascript:|js:|<script(?![^>]*\ssrc=)", text)


@pytest.mark.parametrize("path", [*TEMPLATES, *sorted(app.HERE.rglob("*.py"))], ids=lambda path: path.name)
def test_every_text_that_is_named_is_there(path: Path) -> None:
    for key in re.findall(r"""\bt\(\s*["']([\w.]+)["']\s*[,)]""", path.read_text(encoding="utf-8")):
        assert key in ENGLISH, key


def test_a_language_is_chosen_by_the_browser_then_by_the_reader(tmp_path: Path) -> None:
    assert texts.choose("fr-FR, ko;q=0.8, en;q=0.5", LANGUAGES) == "ko"
    assert texts.choose("fr, de;q=x", LANGUAGES) == "en"
    client = open_studio(tmp_path, language="ko-KR,ko;q=0.9")
    assert '<html lang="ko">' in client.get("/").text
    assert '<html lang="en">' in client.get("/?language=en").text
    assert '<html lang="en">' in client.get("/").text
