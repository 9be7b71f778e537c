"""The next token by its settings, held against transformers' processors and the definitions; and growing text."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from slimtune.engine.engine import Engine
from slimtune.engine.request import Request, SamplingParams, TokenEvent
from slimtune.engine.sampling import SampledToken, Sampler, sample
from slimtune.engine.text import TextStream
from slimtune.errors import ConfigError
from small_text_model import tiny_model, tiny_tokenizer

VOCABULARY = 600
TOKENIZER = tiny_tokenizer()


def logits_of(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def sampler(prompt: tuple[int, ...] = (), **options: Any) -> Sampler:
    return Sampler(SamplingParams(**options), frozenset(prompt))


def drawn(logits_1V: Tensor, count: int, **options: Any) -> Counter[int]:
    samplers = [sampler(seed=seed, **options) for seed in range(count)]
    return Counter(
        chosen.token for chosen in sample(logits_1V.expand(count, -1), samplers) if not isinstance(chosen, str)
    )


@given(
    seed=st.integers(0, 99), temperature=st.sampled_from([0.3, 1.0, 2.5]), top_k=st.sampled_from([0, 1, 7, 300]),
    top_p=st.sampled_from([1.0, 0.95, 0.4]), min_p=st.sampled_from([0.0, 0.02, 0.5]),
)  # fmt: skip
def test_draws_are_among_what_transformers_leaves(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    logits_1V = logits_of(seed)
    kept = set(warpers(torch.zeros(1, 1), logits_1V.clone())[0].isfinite().nonzero()[:, 0].tolist())
    found = drawn(logits_1V, 200, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    # A sum in float32 may leave one token more or less at the edge of top-p.
    assert len(set(found) - kept) <= (top_p < 1)
    if len(kept) <= 3:
        assert kept - set(found) <= {min(kept, key=lambda token: logits_1V[0, token])}


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    logits_1V = logits_of(0)
    count = 20_000
    found = drawn(logits_1V, count, temperature=1.3)
    for token, p in enumerate((logits_1V[0] / 1.3).softmax(-1).tolist()):
        # Six standard deviations, and one for the tokens of which none is expected.
        assert abs(found[token] - count * p) <= 6 * (count * p * (1 - p)) ** 0.5 + 1


def test_a_repetition_penalty_is_transformers() -> None:
    logits_1V, seen = logits_of(1), (4, 9, 77)
    logits_1V[0, list(seen)] += 20
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits_1V.clone()).argmax(-1)
    own = sampler(prompt=(4, 9), temperature=0, repetition_penalty=1.7)
    own.accept(77)
    (chosen,) = sample(logits_1V, [own])
    assert isinstance(chosen, SampledToken)
    assert chosen.token == int(expected)


def test_presence_and_frequency_are_taken_off_what_the_answer_has() -> None:
    logits_1V = torch.zeros(1, 8)
    logits_1V[0, :3] = torch.tensor([5.0, 4.0, 3.0])
    for options, expected in (({"presence_penalty": 1.5}, 1), ({"frequency_penalty": 0.7}, 1), ({}, 0)):
        own = sampler(prompt=(1,), temperature=0, **options)
        own.accept(0)
        own.accept(0)
        (chosen,) = sample(logits_1V, [own])
        assert isinstance(chosen, SampledToken)
        assert chosen.token == expected
    # What was given is not written over.
    assert logits_1V[0, 0] == 5.0


EXTREMES = st.sampled_from(
    [0, 5e-324, 1e-320, 1e-45, 0.01, 0.02, 0.5, 1, 1 - 2**-53, 1.7, 2, 50, 100, 1e300, 10**30, 10**400]
)
SIGNED = EXTREMES | EXTREMES.map(lambda number: -number)


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "temperature": EXTREMES, "top_p": EXTREMES, "min_p": EXTREMES, "presence_penalty": SIGNED,
            "frequency_penalty": SIGNED, "repetition_penalty": EXTREMES, "seed": st.integers(),
            "top_k": st.sampled_from([0, 1, 7, 2**31, 2**63, 10**400]),
            "logprobs": st.sampled_from([None, 0, 3, 10**400]),
        },
    ),
    logits=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([3e38, -3e38, 0.0, 30.0, -30.0]),
        min_size=1, max_size=300,
    ),
    written=st.lists(st.integers(0, 299), max_size=4),
)  # fmt: skip
@settings(max_examples=600)
def test_whatever_is_accepted_draws_a_token_from_finite_logits(
    options: dict[str, Any], logits: list[float], written: list[int]
) -> None:
    try:
        own = sampler(prompt=(0, len(logits) - 1), **options)
    except ConfigError:
        return
    for token in written:
        own.accept(token % len(logits))
    (chosen,) = sample(torch.tensor([logits], dtype=torch.float32), [own])
    assert isinstance(chosen, SampledToken)
    assert 0 <= chosen.token < len(logits)


def test_penalties_do_not_hide_logits_that_are_not_finite() -> None:
    for broken in (torch.inf, torch.nan):
        own = sampler(prompt=(0, 1), repetition_penalty=0.5, presence_penalty=1.0)
        own.accept(1)
        assert sample(torch.tensor([[1.0, broken, 2.0]]), [own]) == ["the model's logits are not finite"]


def test_a_row_depends_on_no_other() -> None:
    logits_NV = logits_of(3, rows=4)
    options: list[dict[str, Any]] = [
        {"temperature": 0}, {"seed": 1, "top_p": 0.5}, {"seed": 2, "min_p": 0.1, "logprobs": 2}, {"seed": 3},
    ]  # fmt: skip
    together = sample(logits_NV, [sampler(**each) for each in options])
    alone = [sample(logits_NV[row, None], [sampler(**each)])[0] for row, each in enumerate(options)]
    assert together == alone


def test_log_probabilities_are_those_before_temperature_and_filters() -> None:
    logits_1V = logits_of(4)
    (chosen,) = sample(logits_1V, [sampler(temperature=0.1, top_k=3, seed=1, logprobs=3)])
    assert isinstance(chosen, SampledToken)
    expected = logits_1V[0].log_softmax(-1)
    assert chosen.logprob == pytest.approx(float(expected[chosen.token]))
    assert [token for token, _ in chosen.alternatives] == expected.topk(3).indices.tolist()


class Only:
    """A constraint to a few tokens of a vocabulary that is smaller than the model's."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.accepted = tokens, []

    def mask(self) -> Tensor:
        return torch.isin(torch.arange(100), torch.tensor(self.tokens, dtype=torch.long))

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_a_constraint_is_obeyed_and_told() -> None:
    only = Only(5, 6)
    engine = Engine(tiny_model(), TOKENIZER, slots=2, context=32)
    (completion,) = engine.generate([Request((4, 8), SamplingParams(max_tokens=6, seed=0, constraint=only))])
    assert set(completion.tokens) <= {5, 6}
    assert tuple(only.accepted) == completion.tokens
    assert sample(logits_of(5), [sampler(constraint=Only())]) == ["the constraint of the answer allows no token"]
    assert sample(torch.full((1, 8), torch.nan), [sampler()]) == ["the model's logits are not finite"]


class Failing(Only):
    """A constraint that breaks at its second token."""

    def mask(self) -> Tensor:
        if self.accepted:
            raise RuntimeError("no such rule")
        return super().mask()


def test_a_constraint_that_fails_ends_its_own_answer() -> None:
    engine = Engine(tiny_model(), TOKENIZER, slots=2, context=32)
    plain = Request((4, 8), SamplingParams(max_tokens=6, temperature=0))
    events: list[TokenEvent] = []
    engine.submit(Request((4, 8), SamplingParams(constraint=Failing(5))), events.extend)
    assert engine.generate([plain]) == Engine(tiny_model(), TOKENIZER, context=32).generate([plain])
    assert [(event.token, event.error) for event in events] == [
        (5, None), (-1, "the constraint of the answer failed: no such rule"),
    ]  # fmt: skip


def test_a_seed_gives_the_same_answer_in_any_company() -> None:
    engine = Engine(tiny_model(), TOKENIZER, slots=3, context=64)
    seeded = Request((9, 8, 7), SamplingParams(max_tokens=8, seed=11, temperature=1.5))
    others = [Request((n, 5), SamplingParams(max_tokens=6, temperature=2.0)) for n in range(5, 10)]
    (alone,) = engine.generate([seeded])
    assert engine.generate([*others, seeded])[-1] == alone


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_streamed_text_is_the_text_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZER
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stream = TextStream(tokenizer, tuple(stop))
    given = ""
    for token in ids:
        given += stream.push(token)
    given += stream.finish()
    places = [whole.find(each) for each in stop if each in whole]
    assert given == stream.text == (whole[: min(places)] if places else whole)
    assert stream.stopped == bool(places)


def test_nothing_that_a_stop_string_may_take_back_is_given() -> None:
    tokenizer = TOKENIZER
    stream = TextStream(tokenizer, ("abc",))
    pieces = [stream.push(tokenizer(letter)["input_ids"][0]) for letter in "xabab"]
    assert pieces == ["x", "", "", "ab", ""]
    assert stream.finish() == "ab"


def test_an_incomplete_character_is_given_at_the_end_as_decoded() -> None:
    tokenizer = TOKENIZER
    first, *_ = tokenizer("é")["input_ids"]
    stream = TextStream(tokenizer)
    assert stream.push(first) == ""
    assert stream.finish() == tokenizer.decode([first])


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}, {"top_k": -1}, {"max_tokens": 0},
     {"repetition_penalty": 0.0}, {"logprobs": -1}, {"stop": ("",)}, {"temperature": 1e300}, {"temperature": 10**400},
     {"repetition_penalty": 1e-300}, {"repetition_penalty": 1e6}, {"presence_penalty": 1e300},
     {"frequency_penalty": -1e300}, {"min_p": float("nan")}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        SamplingParams(**options)
