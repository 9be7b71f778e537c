"""The chunked loss against the plain formula, and its gradient against differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.slim import losses
from slimtune.slim.cache import Request, _top_k, drawn_of
from slimtune.slim.losses import Distance, TopKTeacher, WholeTeacher, distillation_loss, plain_divergence
from slimtune.slim.readout import Readout
from tensors import assert_near

N, D, V, K = 7, 5, 23, 4
DISTANCES = [Distance(b, t, a) for b, t, a in [(0, 1, 1), (1, 1, 0.5), (0.5, 2, 1), (0.1, 0.7, 0.3), (0, 3, 0.5)]]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "HELD", {"cpu": 3 * V, "cuda": 3 * V})
    monkeypatch.setattr(losses, "FLOAT_SHARE", 2)


def pieces(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(D, V, dtype=dtype)
    hidden = torch.randn(N, D, dtype=dtype).requires_grad_()
    return head, hidden, torch.randn(N, V, dtype=dtype) * 2, torch.randint(0, V, (N,))


def top_k(teacher_z: Tensor, distance: Distance, k: int = K) -> TopKTeacher:
    log_p = F.log_softmax(teacher_z / distance.temperature, dim=-1)
    top, ids = log_p.topk(k)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return TopKTeacher(ids, top, rest)


def plain(z: Tensor, teacher_z: Tensor, labels: Tensor, distance: Distance, k: int | None) -> Tensor:
    log_q = F.log_softmax(z / distance.temperature, dim=-1)
    log_p = F.log_softmax(teacher_z / distance.temperature, dim=-1)
    if k is not None:
        ids = log_p.topk(k).indices

        def lumped(logs: Tensor) -> Tensor:
            return torch.cat([logs.gather(-1, ids), logs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)], -1)

        log_p, log_q = lumped(log_p), lumped(log_q)
    apart = plain_divergence(log_p, log_q, distance.beta).sum() * distance.temperature**2
    hard = F.cross_entropy(z, labels, reduction="sum")
    return distance.alpha * apart + (1 - distance.alpha) * hard


@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize("distance", DISTANCES)
def test_value_and_gradients_are_the_plain_formulas(distance: Distance, k: int | None) -> None:
    head, hidden, teacher_z, labels = pieces()
    teacher: Any = WholeTeacher(Readout(teacher_z, lambda h: h)) if k is None else top_k(teacher_z, distance)
    loss = distillation_loss(Readout(hidden, head, tuple(head.parameters())), teacher, labels, distance, V)
    loss.backward()
    ours = [hidden.grad, *(p.grad for p in head.parameters())]
    hidden.grad = head.weight.grad = head.bias.grad = None
    wanted = plain(head(hidden), teacher_z, labels, distance, k)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for own, other in zip(ours, [hidden.grad, *(p.grad for p in head.parameters())], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradcheck(beta: float) -> None:
    head, hidden, teacher_z, labels = pieces()
    distance = Distance(beta, 1.5, 0.6)
    for teacher in (WholeTeacher(Readout(teacher_z, lambda h: h)), top_k(teacher_z, distance)):

        def loss(hidden: Tensor, weight: Tensor, teacher: Any = teacher) -> Tensor:
            student = Readout(hidden, lambda h: F.linear(h, weight), (weight,))
            return distillation_loss(student, teacher, labels, distance, V)

        assert torch.autograd.gradcheck(loss, (hidden, head.weight))


def test_a_whole_top_k_is_the_whole_distribution_and_less_is_never_above_it() -> None:
    head, hidden, teacher_z, labels = pieces()
    for distance in DISTANCES:
        one = Distance(distance.beta, distance.temperature, 1.0)

        def value(teacher: Any, one: Distance = one) -> float:
            return float(distillation_loss(Readout(hidden.detach(), head), teacher, labels, one, V))

        whole = value(WholeTeacher(Readout(teacher_z, lambda h: h)))
        assert value(top_k(teacher_z, one, V)) == pytest.approx(whole, rel=1e-4)
        assert 0 < value(top_k(teacher_z, one, 1)) <= value(top_k(teacher_z, one, K)) <= whole * (1 + 1e-6)


def test_padding_of_the_vocabulary_takes_no_part() -> None:
    head, hidden, teacher_z, labels = pieces()
    wider = torch.cat([teacher_z, torch.full((N, 9), 50.0, dtype=teacher_z.dtype)], -1)
    values = [
        distillation_loss(Readout(hidden, head), WholeTeacher(Readout(z, lambda h: h)), labels, Distance(), V)
        for z in (teacher_z, wider)
    ]
    assert torch.equal(*values)


def test_a_token_that_the_teacher_rules_out_gives_a_number() -> None:
    head, hidden, teacher_z, labels = pieces()
    teacher_z[:, 3] = -torch.inf
    for beta in (0.0, 0.5, 1.0):
        loss = distillation_loss(
            Readout(hidden, head), WholeTeacher(Readout(teacher_z, lambda h: h)), labels, Distance(beta), V
        )
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(hidden.grad).all()


def test_no_tensor_has_the_size_of_all_tokens_times_the_vocabulary() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in [out] if isinstance(t, Tensor))])
            return out

    head, hidden, _, labels = pieces()
    many = hidden.detach().repeat(8, 1).requires_grad_()
    teacher = Readout(torch.randn(8 * N, D, dtype=torch.float64), nn.Linear(D, V, dtype=torch.float64))
    with Watch():
        distillation_loss(Readout(many, head), WholeTeacher(teacher), labels.repeat(8), Distance(0.5), V).backward()
    # Three tokens' logits are held at a time.
    assert largest <= max(3 * V, many.numel())


class TestDrawnTokens:
    """The stored answers of a whole vocabulary: likely tokens, and some drawn from the others."""

    def made(self, count: int, width: int = 2048) -> tuple[Tensor, Tensor]:
        """Logits of a teacher as sharp as a language model, and of a student that is some way off."""
        generator = torch.Generator().manual_seed(0)
        teacher_z = 2.5 * torch.randn(count, width, generator=generator)
        return teacher_z, teacher_z + 0.8 * torch.randn(count, width, generator=generator)

    def stored(self, teacher_z: Tensor, k: int, seed: int = 0) -> TopKTeacher:
        request = Request("", "", teacher_z.shape[1], k, 1.0, drawn_of(k))
        generator = torch.Generator().manual_seed(seed)
        return TopKTeacher(*_top_k(Readout(teacher_z, lambda h: h), request, generator), drawn_of(k))

    def test_the_stored_loss_is_that_of_the_whole_vocabulary(self) -> None:
        teacher_z, z = self.made(400)
        log_p, log_q = teacher_z.log_softmax(-1), z.log_softmax(-1)
        whole = plain_divergence(log_p, log_q, 0).mean()
        teacher = self.stored(teacher_z, 64)
        assert teacher.ids.shape == teacher.log_probs.shape == (400, 64)
        found, _ = teacher.compare(log_q, slice(None), Distance(0.0))
        assert float(found.mean() / whole) == pytest.approx(1, abs=0.02)
        # The others as one outcome miss a good part of it.
        lumped, _ = self.stored(teacher_z, 64).compare(log_q, slice(None), Distance(1e-9))
        top = teacher.log_probs[:, :48].float().exp().sum(-1).mean()
        assert top < 0.8
        assert float(lumped.mean() / 1e-9 / whole) < 0.9

    def test_value_and_gradient_are_right_on_average_over_draws(self) -> None:
        teacher_z, z = self.made(1, width=64)
        log_p, log_q = teacher_z.log_softmax(-1), z.log_softmax(-1)
        draws = [self.stored(teacher_z, 8, seed).compare(log_q, slice(None), Distance(0.0)) for seed in range(3000)]
        value = torch.stack([value for value, _ in draws])
        slope = torch.stack([slope for _, slope in draws])
        whole = plain_divergence(log_p, log_q, 0)
        assert abs(float(value.mean() - whole)) < 4 * float(value.std()) / 3000**0.5 + 1e-3
        expected = log_q.exp() - log_p.exp()
        assert float((slope.mean(0) - expected).norm() / expected.norm()) < 0.05

    def test_the_gradient_is_that_of_the_value(self) -> None:
        teacher_z, z = self.made(5, width=64)
        teacher = self.stored(teacher_z, 16)
        z = z.double().requires_grad_()
        log_q = z.log_softmax(-1)
        _, slope = teacher.compare(log_q.detach(), slice(None), Distance(0.0))
        ids, drawn = teacher.ids, teacher.drawn
        weights = teacher.log_probs.double().exp()
        weights[:, -drawn:] = teacher.rest.double().exp()[:, None] / drawn
        (-(weights * log_q.gather(-1, ids)).sum()).backward()
        assert_near(slope, z.grad, 1e-6)
