"""Which tokens are learned: the answers with their end of turn, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.data.batches import IGNORED, Encoded, Limit, PadRight, pieces
from slimtune.data.encode import encode, encode_row, fit
from slimtune.data.reading import read_rows
from slimtune.data.rows import Conversation, Pair
from slimtune.errors import DataError
from small_text_model import CHATML, orders, tiny_tokenizer, write_lines

TOKENIZER = tiny_tokenizer()
HEADERLESS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"  # noqa: E501
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation.model_validate({"messages": [{"role": role, "content": text} for role, text in turns]})


def learned(example: Encoded, tokenizer: Any = TOKENIZER) -> list[str]:
    return [tokenizer.decode(ids) for is_learned, ids in pieces(example) if is_learned]


texts = st.text(st.characters(codec="utf-8", exclude_characters="<|"), min_size=1, max_size=12).filter(
    lambda text: text == text.strip()
)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.booleans())
def test_every_answer_is_learned_with_its_end_and_nothing_else(pairs: list[tuple[str, str]], has_system: bool) -> None:
    turns = [("system", "be brief")] if has_system else []
    for question, answer in pairs:
        turns += [("user", question), ("assistant", answer)]
    example = encode_row(conversation(*turns), TOKENIZER)
    assert learned(example) == [f"{answer}<|im_end|>" for _, answer in pairs]
    assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.input_ids, strict=True))


def test_the_ids_are_what_the_template_renders() -> None:
    row = conversation(("user", "two teas"), ("assistant", "{}"))
    rendered = TOKENIZER.apply_chat_template(row.turns(), tokenize=False)
    assert encode_row(row, TOKENIZER).input_ids == TOKENIZER(rendered, add_special_tokens=False)["input_ids"]


def test_a_template_whose_answers_end_in_eos() -> None:
    tokenizer = tiny_tokenizer(INST)
    example = encode_row(
        conversation(("user", "hi"), ("assistant", "ho"), ("user", "hm"), ("assistant", "ha")), tokenizer
    )
    assert learned(example, tokenizer) == [" ho<|im_end|>", " ha<|im_end|>"]
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


def test_a_template_without_an_end_of_turn_gets_one() -> None:
    tokenizer = tiny_tokenizer(HEADERLESS)
    example = encode_row(conversation(("user", "hi"), ("assistant", "ho")), tokenizer)
    # The space is the template's, but one token holds it together with the answer's first letter.
    assert learned(example, tokenizer) == [" ho<|im_end|>"]


def test_plain_text_without_a_template_ends_too() -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    example = encode_row(Pair(prompt="1+1=", completion="2"), tokenizer)
    assert learned(example, tokenizer) == ["2<|im_end|>"]
    with pytest.raises(DataError, match="no chat template"):
        encode_row(conversation(("user", "a"), ("assistant", "b")), tokenizer)


def test_a_doubled_beginning_of_sequence_is_caught() -> None:
    tokenizer = tiny_tokenizer("{{ bos_token }}" + INST)
    with pytest.raises(DataError, match="twice"):
        encode_row(conversation(("user", "hi"), ("assistant", "ho")), tokenizer)


def test_a_pair_is_a_question_and_its_answer() -> None:
    pair = encode_row(Pair(prompt="hi", completion="ho"), TOKENIZER)
    assert pair == encode_row(conversation(("user", "hi"), ("assistant", "ho")), TOKENIZER)


def test_a_template_that_refuses_a_role() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match="no system"):
        encode_row(conversation(("system", "x"), ("user", "y"), ("assistant", "z")), tiny_tokenizer(strict))


def test_padding_is_neither_attended_to_nor_learned_though_it_is_the_end_of_turn() -> None:
    short, long = (
        encode_row(conversation(("user", "hi"), ("assistant", text)), TOKENIZER) for text in ("a", "a b c d e f")
    )
    batch = PadRight(TOKENIZER.pad_token_id)([short, long])
    length = len(short.input_ids)
    assert batch["attention_mask"].sum(1).tolist() == [length, len(long.input_ids)]
    assert (batch["labels"][0, length:] == IGNORED).all()
    assert TOKENIZER.eos_token_id in batch["labels"][0, :length].tolist()


def test_counts() -> None:
    rows = [conversation(*((turn["role"], turn["content"]) for turn in e.messages())) for e in orders(9)]
    prepared = encode(rows, TOKENIZER, 10_000)
    lengths = [len(example.input_ids) for example in prepared.examples]
    assert (prepared.tokens, prepared.longest) == (sum(lengths), max(lengths))
    assert prepared.learned == sum(label != IGNORED for e in prepared.examples for label in e.labels)
    limit = sorted(lengths)[4]
    too_long = sum(length > limit for length in lengths)
    assert encode(rows, TOKENIZER, limit, "drop").dropped == too_long
    cut = encode(rows, TOKENIZER, limit, "truncate")
    assert (cut.truncated, len(cut.examples), cut.longest) == (too_long, 9, limit)
    with pytest.raises(DataError, match=f"{too_long} of 9 examples .* --max-length {max(lengths)}"):
        encode(rows, TOKENIZER, limit)


def test_a_separator_that_only_python_takes_for_a_new_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False))
    assert read_rows(tmp_path / "d.jsonl") == [Pair(prompt="a\u2028b", completion="c")]


def test_empty_lines_and_other_fields_are_passed_over(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b", "id": 7})
    path.write_text("\n" + path.read_text() + "\n\n")
    assert read_rows(path) == [Pair(prompt="a", completion="b")]


@given(length=st.integers(2, 60), size=st.integers(2, 12))
def test_the_pieces_of_a_long_text_predict_each_of_its_tokens_once(length: int, size: int) -> None:
    ids = list(range(100, 100 + length))
    found = fit(Encoded(ids, list(ids)), Limit(size, "split"))
    assert all(len(piece.input_ids) <= size for piece in found)
    predicted = [label for piece in found for label in piece.labels[1:]]
    assert predicted == ids[1:]
    # What a piece predicts first, it predicts from the token before, in the text as in the piece.
    assert all(piece.input_ids[0] + 1 == piece.input_ids[1] for piece in found)
    assert all(piece.labels[0] == IGNORED for piece in found[1:])
