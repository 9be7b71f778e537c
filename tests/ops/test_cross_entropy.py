"""Log-probabilities behind a frozen head, and their gradients: those of plain torch, whatever the chunks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimtune.ops import cross_entropy
from slimtune.ops.cross_entropy import TokenStatistics, chunked_cross_entropy, chunked_log_probs
from tensors import assert_near

VOCABULARY, FEATURES = 37, 6
ALSO = TokenStatistics._fields[1:]


@pytest.fixture(autouse=True)
def few_held() -> Iterator[None]:
    """Chunks of eight parts, of two rows each."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cross_entropy, "HELD", {"cpu": 16 * VOCABULARY, "cuda": 16 * VOCABULARY})
        yield


def plain(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor, scale: float
) -> TokenStatistics:
    z_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias_V) * scale
    log_p_TV = z_TV.log_softmax(-1)
    return TokenStatistics(
        log_p_TV.gather(-1, labels_T[:, None])[:, 0],
        -(log_p_TV.exp() * log_p_TV).sum(-1),
        (2 * log_p_TV).logsumexp(-1),
        z_TV.mean(-1),
        z_TV.argmax(-1) == labels_T,
    )


@given(
    tokens=st.integers(0, 40), scale=st.sampled_from([1.0, 0.5, 1.7]), biased=st.booleans(),
    also=st.sets(st.sampled_from(ALSO)), of_entropy=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_statistics_and_gradients_are_those_of_all_logits(
    tokens: int, scale: float, biased: bool, also: set[str], of_entropy: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, FEATURES, requires_grad=True)
    weight, bias = torch.randn(VOCABULARY, FEATURES), torch.randn(VOCABULARY) if biased else None
    labels, factors = torch.randint(0, VOCABULARY, (tokens,)), torch.randn(2, tokens)
    found = chunked_log_probs(hidden, weight, bias, labels, scale, also)
    expected = plain(hidden, weight, bias, labels, scale)
    assert {name for name in ALSO if getattr(found, name) is not None} == also
    gradients = []
    for statistics in (found, expected):
        total = statistics.log_probs @ factors[0]
        if of_entropy and statistics.entropy is not None and "entropy" in also:
            total = total + statistics.entropy @ factors[1]
        gradients.append(torch.autograd.grad(total, hidden)[0])
    for one, other in zip(found, expected, strict=True):
        if one is not None and tokens:
            assert one.shape == (tokens,)
            assert_near(one.float(), other.float(), 1e-5)
    if tokens:
        assert_near(gradients[0], gradients[1], 2e-5)
    assert found.entropy is None or found.entropy.requires_grad
    assert all(each is None or not each.requires_grad for each in found[2:])


def test_the_first_of_equally_likely_tokens_is_the_likeliest() -> None:
    weight = torch.zeros(VOCABULARY, FEATURES)
    found = chunked_log_probs(torch.ones(3, FEATURES), weight, None, torch.tensor([0, 1, 36]), also=["is_top1"])
    assert found.is_top1 is not None
    assert found.is_top1.tolist() == [True, False, False]


def test_the_gradient_in_16_bits_is_as_near_as_that_of_all_logits() -> None:
    hidden, weight = torch.randn(40, FEATURES), torch.randn(VOCABULARY, FEATURES)
    labels, factors = torch.randint(0, VOCABULARY, (40,)), torch.randn(40)
    gradients = []
    for kind, score in ((torch.float32, plain), (torch.bfloat16, plain), (torch.bfloat16, chunked_log_probs)):
        own = hidden.bfloat16().to(kind).requires_grad_()
        found = score(own, weight.bfloat16().to(kind), None, labels, 1.0)
        gradients.append(torch.autograd.grad(found.log_probs.float() @ factors, own)[0].float())
    exact, usual, ours = gradients
    assert float((ours - exact).norm()) <= 1.5 * float((usual - exact).norm())


def test_no_gradient_is_made_where_none_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(5, FEATURES, requires_grad=True)
    weight, labels = torch.randn(VOCABULARY, FEATURES), torch.randint(0, VOCABULARY, (5,))
    expected = chunked_log_probs(hidden, weight, None, labels).log_probs
    made: list[bool] = []
    statistics = cross_entropy._statistics
    monkeypatch.setattr(cross_entropy, "_statistics", lambda *args: made.append(args[-1]) or statistics(*args))
    with torch.no_grad():
        found = chunked_log_probs(hidden, weight, None, labels).log_probs
    assert torch.equal(found, expected)
    assert not any(made)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_that_of_the_labels_that_count(reduction: str) -> None:
    hidden, weight = torch.randn(20, FEATURES, requires_grad=True), torch.randn(VOCABULARY, FEATURES)
    labels = torch.randint(0, VOCABULARY, (20,))
    labels[3:9] = -100
    ours = chunked_cross_entropy(hidden, weight, None, labels, reduction=reduction)
    usual = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction=reduction)
    assert_near(ours, usual)
    assert_near(torch.autograd.grad(ours, hidden)[0], torch.autograd.grad(usual, hidden)[0])
