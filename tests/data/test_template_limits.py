"""A chat template is a stranger's program: it ends in time, in memory and in a sentence, in any thread."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import trl

from slimtune.data import template_process
from slimtune.data.chat_template import named_templates, render, use_template
from slimtune.errors import DataError
from small_text_model import tiny_tokenizer

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TEMPLATES = [*sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")), *named_templates().values()]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_real_models_render_as_transformers_renders_them(path: Path) -> None:
    tokenizer = tiny_tokenizer(path.read_text(encoding="utf-8"))
    for turns in (TURNS, [{"role": "user", "content": "a\ud800\u2028\x1b\"'<", "name": None}]):
        for for_answer in (False, True):
            try:
                expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=for_answer)
            except Exception:  # whatever the template doesn't take
                with pytest.raises(DataError):
                    render(tokenizer, turns, for_answer)
                continue
            assert render(tokenizer, turns, for_answer) == expected


EXCESSIVE = {
    "a text times a number": "{{ 'a' * 10 ** 10 }}",
    "a width": "{{ 'a' | center(10 ** 10) }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a list in itself": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}"
    "{{ n.s }}",
    "much text": "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
}
ENDLESS = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 10) }}",
}
WRONG = {
    "nothing": "{{ x.y.z }}",
    "a division": "{{ 1 / 0 }}",
    "an attribute": "{{ ''.__class__.__mro__ }}",
    "not closed": "{% for i in messages %}",
    "nested": "{% for i in messages %}" * 50 + "{% endfor %}" * 50,
    "a macro of itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_rendered(case: str) -> None:
    with pytest.raises(DataError) as caught:
        render(tiny_tokenizer(WRONG[case]), TURNS)
    assert "refuses a conversation" in str(caught.value)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", EXCESSIVE)
def test_what_takes_too_much_memory(case: str) -> None:
    with pytest.raises(DataError, match="can't be used"):
        render(tiny_tokenizer(EXCESSIVE[case]), TURNS)


def test_the_process_is_ended_at_its_size_and_the_next_conversation_has_another() -> None:
    with pytest.raises(DataError, match="takes more than 512 MB of memory"):
        render(tiny_tokenizer(EXCESSIVE["doubling"]), TURNS)
    assert render(tiny_tokenizer(), TURNS).startswith("<|im_start|>user")


def test_what_earlier_conversations_took_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1.0)
    template_process.end()
    # A fifth of a second or so each, twice the limit together.
    busy = tiny_tokenizer("{% for i in range(1500) %}{% for j in range(2000) %}{% endfor %}{% endfor %}hi")
    for _ in range(10):
        assert render(busy, TURNS) == "hi"
    template_process.end()


@pytest.mark.parametrize("case", ENDLESS)
def test_what_takes_too_long(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.2)
    template_process.end()
    with pytest.raises(DataError, match=r"takes longer than 0\.2 s"):
        render(tiny_tokenizer(ENDLESS[case]), TURNS)
    monkeypatch.undo()
    template_process.end()
    assert render(tiny_tokenizer(), TURNS).startswith("<|im_start|>user"), "and the next one is rendered"


def test_a_template_without_end_named_for_training(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text(EXCESSIVE["doubling"])
    tokenizer = tiny_tokenizer()
    before = tokenizer.chat_template
    with pytest.raises(DataError, match="can't be used"):
        use_template(tokenizer, str(tmp_path / "mine"))
    assert tokenizer.chat_template == before
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe or a device"):
        use_template(tokenizer, str(tmp_path / "pipe"))


def test_threads_get_their_own_answers() -> None:
    tokenizer, wrong = tiny_tokenizer(), []

    def ask(number: int) -> None:
        for count in range(30):
            text = f"{number}-{count}"
            wrong.extend([text] if text not in render(tokenizer, [{"role": "user", "content": text}]) else [])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_process_that_is_forked_has_one_of_its_own() -> None:
    tokenizer: Any = tiny_tokenizer()
    expected = render(tokenizer, TURNS)
    child = os.fork()
    if child == 0:
        is_right = render(tokenizer, TURNS) == expected
        template_process.end()
        os._exit(0 if is_right else 1)
    assert render(tokenizer, TURNS) == expected
    assert os.waitpid(child, 0)[1] == 0
