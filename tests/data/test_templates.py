"""What is learned with the chat templates of real models, none of which marks what is generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl

from slimtune.data.batches import IGNORED, Encoded, pieces
from slimtune.data.chat_template import named_templates, render, use_template
from slimtune.data.encode import encode, encode_row
from slimtune.data.preview import preview
from slimtune.data.rows import Conversation
from slimtune.data.settings import DataSettings
from slimtune.errors import ConfigError, DataError
from small_text_model import CHATML, tiny_tokenizer, write_lines

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ANSWERS = ("two teas", "{}")

ENDS = {
    "llama3": ("<|eot_id|>", ""),
    "llama3_1": ("<|eot_id|>", ""),
    "qwen2_5": ("<|im_end|>", ""),
    "qwen3_instruct_2507": ("<|im_end|>", ""),
    "gemma": ("<end_of_turn>", ""),
    "gemma3": ("<end_of_turn>", ""),
    "gemma4": ("<turn|>", ""),
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""),
    "cohere2": ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", ""),
    "deepseekv3": ("<\uff5cend\u2581of\u2581sentence\uff5c>", ""),
    "deepseek_r1_distill": ("<\uff5cend\u2581of\u2581sentence\uff5c>", ""),
    "lfm2": ("<|im_end|>", ""),
    "glm4moe": ("", "\n<think></think>\n"),
    "phi3": ("<|end|>", ""),
}
"""Models' templates as trl ships them: how a turn ends, and what the answer begins with."""
REWRITING = {
    "qwen3": ("<|im_end|>", "<think>\n\n</think>\n\n"),
    "gptoss": ("<|return|>", "<|channel|>final<|message|>"),
    "qwen3_5_nothink": ("<|im_end|>", ""),
}
"""Templates that render an answer otherwise once a turn follows."""


def tokenizer_of(name: str, end: str) -> Any:
    """The tiny tokenizer with the template and the end of turn of a model; padding is that end, as in many."""
    tokenizer = tiny_tokenizer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{part}" for part in end.split("<")[1:]]})
    return tokenizer


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation.model_validate({"messages": [{"role": role, "content": text} for role, text in turns]})


def learned(example: Encoded, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids) for is_learned, ids in pieces(example) if is_learned]


TWO_ANSWERS = conversation(("user", "hi"), ("assistant", ANSWERS[0]), ("user", "and?"), ("assistant", ANSWERS[1]))


@pytest.mark.parametrize("name", ENDS)
def test_answers_with_their_ends_are_learned_and_nothing_else(name: str) -> None:
    end, opening = ENDS[name]
    tokenizer = tokenizer_of(name, end)
    example = encode_row(TWO_ANSWERS, tokenizer)
    first, last = learned(example, tokenizer)
    assert first == f"{opening}{ANSWERS[0]}{end}"
    # Templates without an end of turn, and those that end the text, have an end of text as well.
    assert last.removesuffix(tokenizer.eos_token).rstrip("\n") == f"{opening}{ANSWERS[1]}{end}"
    assert example.labels[-1] != IGNORED or not tokenizer.decode([example.input_ids[-1]]).strip()
    rendered = render(tokenizer, TWO_ANSWERS.turns())
    assert tokenizer.decode(example.input_ids).startswith(rendered.rstrip())


@pytest.mark.parametrize("name", REWRITING)
def test_each_answer_is_an_example_of_its_own_where_the_template_rewrites_earlier_turns(name: str) -> None:
    end, opening = REWRITING[name]
    tokenizer = tokenizer_of(name, end)
    prepared = encode([TWO_ANSWERS], tokenizer, 100_000)
    assert [learned(example, tokenizer) for example in prepared.examples] == [[f"{opening}{a}{end}"] for a in ANSWERS]
    assert (prepared.given, prepared.apart) == (1, 1)
    # The text up to the answer is what the model is shown when it has to answer.
    shown = render(tokenizer, TWO_ANSWERS.turns()[:3], for_answer=True)
    assert tokenizer.decode(prepared.examples[1].input_ids).startswith(shown)


def test_a_turn_of_weight_0_is_shown_and_not_learned() -> None:
    tokenizer = tokenizer_of("qwen2_5", "<|im_end|>")
    turns = TWO_ANSWERS.model_dump()["messages"]
    row = Conversation.model_validate({"messages": [turns[0], turns[1] | {"weight": 0}, *turns[2:]]})
    assert learned(encode_row(row, tokenizer), tokenizer) == ["{}<|im_end|>"]
    assert "weight" not in row.turns()[1]


def test_tool_calls_are_learned_and_tools_are_shown() -> None:
    tokenizer = tokenizer_of("qwen2_5", "<|im_end|>")
    call = {"type": "function", "function": {"name": "brew", "arguments": '{"what": "tea"}'}}
    row = Conversation.model_validate(
        {
            "messages": [
                {"role": "user", "content": "tea!"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "done"},
                {"role": "assistant", "content": "Here."},
            ],
            "tools": [{"type": "function", "function": {"name": "brew", "parameters": {}}}],
        }
    )
    called, said = learned(encode_row(row, tokenizer), tokenizer)
    assert '{"name": "brew", "arguments": {"what": "tea"}}' in called
    assert said == "Here.<|im_end|>"
    assert "<tools>" in tokenizer.decode(encode_row(row, tokenizer).input_ids)


@pytest.mark.parametrize(
    ("turns", "template", "said"),
    [
        ((("user", "hi"), ("assistant", "ho")), "smolvlm", "leaves out what turn 1 says"),
        ((("user", "hi"), ("assistant", "<think>why</think>ho")), "deepseek_r1_distill", "leaves out what turn 2 says"),
        ((("system", "x"), ("user", "hi"), ("assistant", "ho")), "gemma", "System role not supported"),
        ((("user", "hi"), ("user", "hm"), ("assistant", "ho")), "gemma", "must alternate"),
    ],
)
def test_what_a_template_can_not_say_is_not_dropped(
    turns: tuple[tuple[str, str], ...], template: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        encode_row(conversation(*turns), tokenizer_of(template, ""))


def test_a_tool_call_that_the_template_knows_nothing_of() -> None:
    call = {"function": {"name": "brew", "arguments": {}}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(DataError, match=r"leaves out what turn 2 says \(assistant: 'brew'\)"):
        encode_row(Conversation.model_validate({"messages": turns}), tiny_tokenizer())


def test_the_template_for_tools_that_ships_is_named_and_shows_tools_calls_and_responses() -> None:
    call = {"type": "function", "function": {"name": "brew", "arguments": {"what": "tea", "cups": [1]}}}
    tool = {"type": "function", "function": {"name": "brew", "parameters": {"type": "object"}}}
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "tea!"},
        {"role": "assistant", "content": "At once.", "tool_calls": [call, call]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "Here."},
    ]
    row = Conversation.model_validate({"messages": turns, "tools": [tool]})
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match=r"leaves out the row's tools \(brew\); set data.chat_template to hermes"):
        encode_row(row, tokenizer)
    with pytest.raises(DataError, match=r"leaves out what turn 3 says \(assistant: 'brew'\); set .* to hermes"):
        encode_row(row.model_copy(update={"tools": None}), tokenizer)
    use_template(tokenizer, "hermes")
    written = '<tool_call>\n{"name": "brew", "arguments": {"what": "tea", "cups": [1]}}\n</tool_call>'
    example = encode_row(row, tokenizer)
    assert learned(example, tokenizer) == [f"At once.\n{written}\n{written}<|im_end|>", "Here.<|im_end|>"]
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("<|im_start|>system\nBe kind.\n\nYou may call functions.")
    assert text.count("Be kind.") == 1
    assert "<tools>\n" + json.dumps(tool) + "\n</tools>" in text
    assert "<|im_start|>tool\n<tool_response>\ndone\n</tool_response><|im_end|>" in text
    plain = tiny_tokenizer()
    assert render(tokenizer, TWO_ANSWERS.turns(), True) == render(plain, TWO_ANSWERS.turns(), True)


def test_a_template_by_name_and_from_a_file(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    use_template(tokenizer, "chatml")
    assert learned(encode_row(TWO_ANSWERS, tokenizer), tokenizer) == [f"{answer}<|im_end|>" for answer in ANSWERS]
    use_template(tokenizer, "plain")
    assert learned(encode_row(TWO_ANSWERS, tokenizer), tokenizer) == [f"{answer}<|im_end|>" for answer in ANSWERS]
    (tmp_path / "own.jinja").write_text("!" + CHATML)
    use_template(tokenizer, str(tmp_path / "own.jinja"))
    assert render(tokenizer, TWO_ANSWERS.turns()).startswith("!")


def test_data_are_shown_as_the_chosen_template_writes_them(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", {"prompt": "two teas", "completion": "a latte"})
    for name in ("chatml", "plain"):
        settings = DataSettings(str(rows), chat_template=name)
        shown = preview(settings, tiny_tokenizer(chat_template=None))
        chosen = tiny_tokenizer(chat_template=None)
        use_template(chosen, name)
        turns = [{"role": "user", "content": "two teas"}, {"role": "assistant", "content": "a latte"}]
        assert "".join(text for _, text in shown.samples[0]) == render(chosen, turns)


def test_templates_that_can_not_be_used(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        use_template(tokenizer, "chatlm")
    with pytest.raises(DataError, match=r"writes <\|start_header_id\|>, which is no token"):
        use_template(tokenizer, "llama3")
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    with pytest.raises(DataError, match="refuses"):
        use_template(tokenizer, str(tmp_path / "broken.jinja"))
    assert tokenizer.chat_template == CHATML
    assert set(named_templates()) == {"chatml", "hermes", "llama3", "plain"}
