"""`slimtune generate` and `slimtune chat`: the right model answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune import PeftModel
from slimtune.console.screen import printable
from small_text_model import orders, write_lines

SHORT = ["--max-new-tokens", 12]


def reference(base: Path, question: list[dict[str, str]], adapter: Path | None = None, shown: bool = False) -> str:
    """What transformers' own generate answers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        produced = model.generate(ids, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(produced[0, ids.shape[1] :], skip_special_tokens=True)
    # Some control characters count as white space, and are shown escaped where they are written as they come.
    return printable(answer).strip() if shown else answer.strip()


def test_one_prompt_is_answered_as_transformers_answers_it(run: Any, base: Path, tuned: Path) -> None:
    question = [{"role": "user", "content": "two large lattes for maria"}]
    plain = run("generate", base, question[0]["content"], *SHORT)
    adapted = run("generate", base, question[0]["content"], "--adapter", tuned, *SHORT)
    assert plain.stdout.strip() == printable(reference(base, question))
    assert adapted.stdout.strip() == printable(reference(base, question, tuned))
    assert plain.stdout != adapted.stdout


def test_an_adapter_folder_brings_its_base(run: Any, base: Path, tuned: Path) -> None:
    assert run("generate", tuned, "hello", *SHORT).stdout == run("generate", base, "hello", "-a", tuned, *SHORT).stdout


def test_many_prompts_at_once_are_answered_as_one_by_one(run: Any, base: Path, tuned: Path, tmp_path: Path) -> None:
    questions = [example.question() for example in orders(7)]
    rows = write_lines(tmp_path / "rows.jsonl", *({"messages": question} for question in questions))
    result = run("generate", base, "-a", tuned, "--input", rows, "--batch-size", 3, "--json", *SHORT)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["messages"] for answer in answers] == questions
    assert [answer["answer"] for answer in answers] == [reference(base, q, tuned) for q in questions]


def test_answers_in_the_data_are_left_out_of_the_question(run: Any, base: Path, tmp_path: Path) -> None:
    example = orders(1)[0]
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": example.messages()}, {"prompt": "x", "completion": "y"})
    result = run("generate", base, "--input", rows, "--json", *SHORT)
    asked = [json.loads(line)["messages"] for line in result.stdout.splitlines()]
    assert asked == [example.question(), [{"role": "user", "content": "x"}]]


def test_standard_input_and_a_system_message(run: Any, base: Path) -> None:
    piped = run("generate", base, "--json", *SHORT, stdin="hello\n")
    spoken = run("generate", base, "hello", "--json", *SHORT)
    assert piped.stdout == spoken.stdout
    with_system = json.loads(run("generate", base, "hello", "--system", "be brief", "--json", *SHORT).stdout)
    assert with_system["messages"][0] == {"role": "system", "content": "be brief"}


def test_temperature_draws_by_seed(run: Any, base: Path) -> None:
    def drawn(seed: int) -> str:
        return run("generate", base, "hello", "--temperature", 1.5, "--seed", seed, *SHORT).stdout

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_chat_switches_between_adapters_and_the_base(run: Any, base: Path, tuned: Path) -> None:
    script = "hi\n/base\n/reset\nhi\n/use mine\n/reset\nhi\n/adapters\n/exit\nnever answered\n"
    result = run("chat", base, "--adapter", f"mine={tuned}", "--adapter", f"other={tuned}", *SHORT, stdin=script)
    assert result.exit_code == 0, result.output
    question = [{"role": "user", "content": "hi"}]
    adapted, plain = reference(base, question, tuned, shown=True), reference(base, question, shown=True)
    assert result.stdout.split("\n") == [adapted, plain, adapted, "mine", "other", ""] or (
        "".join(result.stdout.split()) == "".join(f"{adapted}{plain}{adapted}mineother".split())
    )
    assert "now answering: base" in result.stderr
    assert "now answering: mine" in result.stderr


def test_chat_remembers_what_was_said(run: Any, base: Path) -> None:
    first = [{"role": "user", "content": "hi"}]
    said = reference(base, first)
    both = [*first, {"role": "assistant", "content": said}, {"role": "user", "content": "and?"}]
    result = run("chat", base, *SHORT, stdin="hi\nand?\n")
    shown = reference(base, first, shown=True) + reference(base, both, shown=True)
    assert "".join(result.stdout.split()) == "".join(shown.split())


@pytest.mark.parametrize("line", ["/use nobody", "/nothing", "/help"])
def test_a_slip_of_the_pen_does_not_end_the_chat(run: Any, base: Path, tuned: Path, line: str) -> None:
    result = run("chat", base, "-a", tuned, *SHORT, stdin=f"{line}\n/adapters\n")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "tuned"
    assert result.stderr.count("\n") == (1 if line == "/help" else 2)
