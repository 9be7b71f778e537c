"""What an adopted module computes is its method's equation, in values and in gradients, fused or not."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slimtune
from kinds import FLOATING, KINDS, Kind, attach, cases, configs, methods_for
from slimtune import fused as ops
from slimtune.bases import base_of
from slimtune.core.config import PeftConfig, methods
from slimtune.core.frozen import Frozen
from slimtune.errors import ConfigError, TargetError
from tensors import adapter_gradients, adapter_tensors, assert_all_near, assert_near, copies, randomize, trainable

Case = tuple[Kind, PeftConfig]
TIGHT = 2e-6
LORA = ("LORA",)
BF16 = 2.0**-8  # half a unit in the last place, relative to the value


def scale(config: Any) -> float:
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def equation(site: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B(A(x)) as the papers write it, from the tensors on disk."""
    if isinstance(site, nn.Embedding):
        return F.embedding(x, a.t(), site.padding_idx) @ b.t()
    if isinstance(site, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        convolve: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(site.kernel_size)]
        if site.padding_mode == "zeros":
            z = convolve(x, a, stride=site.stride, padding=site.padding, dilation=site.dilation)
        else:
            around = [pad for pad in reversed(site.padding) for _ in range(2)]
            z = convolve(F.pad(x, around, site.padding_mode), a, stride=site.stride, dilation=site.dilation)
        return convolve(z, b, groups=site.groups)
    return (x @ a.t()) @ b.t()


def dense(site: Any, stored: Tensor) -> Tensor:
    """A weight as (out, in, ...)."""
    return stored.t() if base_of(site).is_transposed else stored


def expected_output(kind: Kind, config: Any, tensors: dict[str, Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The textbook's answer in `dtype`."""
    site: Any = kind.exact(dtype)
    stored = {key.rpartition(".")[2]: tensor.to(dtype) for key, tensor in tensors.items()}
    biases = {"bias": stored["bias"]} if "bias" in stored else {}
    a, b = (next(t for key, t in tensors.items() if f"_{name}" in key).to(dtype) for name in "AB")
    y = torch.func.functional_call(site, biases, (x,))
    term = scale(config) * equation(site, x, a, b)
    if not config.use_dora:
        return y + term
    moved = dense(site, site.weight) + scale(config) * torch.tensordot(b.flatten(1), a, dims=1)
    norm = moved.detach().flatten(1).norm(dim=1).view_as(stored["lora_magnitude_vector"])
    ratio = stored["lora_magnitude_vector"] / norm
    bias = stored.get("bias", getattr(site, "bias", None))
    straight = y if bias is None else y - bias.view_as(ratio)
    return y + (ratio - 1) * straight + ratio * term


def cotangent(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)


@given(cases(among=LORA, lora_dropout=0.0))
def test_the_output_is_the_equation_s(case: Case) -> None:
    kind, config = case
    model = randomize(slimtune, attach(kind, config))
    tensors = adapter_tensors(slimtune, model)
    x = kind.input()
    reference = x.double() if x.is_floating_point() else x
    assert_near(model(x), expected_output(kind, config, tensors, reference, torch.float64), TIGHT)


@given(cases(among=LORA, lora_dropout=0.0))
def test_the_gradients_are_the_equation_s(case: Case) -> None:
    kind, config = case
    model = randomize(slimtune, attach(kind, config)).train()
    x = kind.input()
    leaf = x.clone().requires_grad_(x.is_floating_point())
    y = model(leaf)
    y.backward(cotangent(y))
    ours = copies(adapter_gradients(slimtune, model))

    tensors = {
        key: tensor.double().requires_grad_() for key, tensor in copies(adapter_tensors(slimtune, model)).items()
    }
    reference = x.double().requires_grad_() if x.is_floating_point() else x
    expected = expected_output(kind, config, tensors, reference, torch.float64)
    expected.backward(cotangent(expected))
    assert_all_near(ours, {key: tensor.grad for key, tensor in tensors.items()}, TIGHT)
    if x.is_floating_point():
        assert_near(leaf.grad, reference.grad, TIGHT)


VARIANTS: dict[str, list[dict[str, Any]]] = {"LORA": [{"use_dora": False}, {"use_dora": True}]}
"""Options that choose among the deltas of a method."""
PLAIN: dict[str, Any] = {
    "lora_dropout": 0.0, "vera_dropout": 0.0, "rank_dropout": 0.0, "module_dropout": 0.0, "bias": "none",
}  # fmt: skip
Variant = tuple[Kind, str, dict[str, Any]]


def small_config(method: str, kind: Kind, options: dict[str, Any]) -> Any:
    """A config whose rank, if it has one, fits."""
    config: Any = methods()[method]
    ranked = {"r": 2 * kind.rank_step} if "r" in {field.name for field in fields(config)} else {}
    return config(target_modules=["site"], **ranked, **options)


def fused_for(model: Any) -> Any:
    return ops.fused_for(type(model.site.deltas["default"]), type(base_of(model.site)))


def fused_variants() -> list[Variant]:
    """The kinds and methods whose delta and base have an entry in the table of fused functions."""
    found: list[Variant] = []
    for kind in KINDS:
        for method in methods_for(kind):
            for options in VARIANTS.get(method, [{}]):
                try:
                    model = attach(kind, small_config(method, kind, options))
                except (ConfigError, TargetError):
                    continue
                if fused_for(model):
                    found.append((kind, method, options))
    return found


FUSED = fused_variants()


@st.composite
def fused_cases(draw: st.DrawFn) -> Case:
    kind, method, options = draw(st.sampled_from(FUSED))
    return kind, draw(configs(method, kind, **PLAIN, **options))


def test_the_table_of_fused_functions_is_covered() -> None:
    entries = set()
    for kind, method, options in FUSED:
        entries.add(fused_for(attach(kind, small_config(method, kind, options))))
    assert entries == set(ops.table().values())


def run(
    kind: Kind, config: PeftConfig, dtype: torch.dtype, fused: bool, x: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output, gradients of the adapter and of the input: as dispatched, or by the plain formula."""
    model = randomize(slimtune, slimtune.get_peft_model(kind.host().to(dtype), config)).train()
    x = (kind.input() if x is None else x).detach().to(dtype).requires_grad_()
    site: Any = model.site
    frozen = Frozen(site, base_of(site), site.adopted_from.forward)
    y = model(x) if fused else site.deltas["default"](frozen, x)
    y.backward(cotangent(y))
    gradients = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    assert x.grad is not None
    return y.detach(), gradients, x.grad


@given(fused_cases())
def test_fused_equals_plain_in_float32(case: Case) -> None:
    (y, gradients, gx), (plain_y, plain_gradients, plain_gx) = (run(*case, torch.float32, f) for f in (True, False))
    assert_near(y, plain_y, TIGHT)
    assert_all_near(gradients, plain_gradients, TIGHT)
    assert_near(gx, plain_gx, TIGHT)


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("variant", FUSED, ids=lambda variant: "-".join(map(str, variant)))
def test_fused_equals_plain_for_few_tokens_and_for_many(variant: Variant, tokens: int) -> None:
    """Fewer than the layer has inputs, or more: what is multiplied first differs."""
    kind, method, options = variant
    torch.manual_seed(tokens)
    x = torch.randn(tokens, kind.input().shape[-1])
    fused, plain = (run(kind, small_config(method, kind, options), torch.float32, f, x) for f in (True, False))
    assert_near(fused[0], plain[0], TIGHT)
    assert_all_near(fused[1], plain[1], TIGHT)
    assert_near(fused[2], plain[2], TIGHT)


@given(fused_cases())
def test_in_bf16_both_are_within_rounding_of_float64(case: Case) -> None:
    """The base's product is rounded once, the low-rank term a few times: bf16 allows no less."""
    kind, config = case
    if kind.name == "linear-with-own-forward":
        return
    for fused in (True, False):
        y, _, _ = run(kind, config, torch.bfloat16, fused)
        host = kind.host().to(torch.bfloat16).double()
        model = randomize(slimtune, slimtune.get_peft_model(host, config))
        exact = model(kind.input().to(torch.bfloat16).double())
        parts = exact.abs().max() + kind_product_bound(model, kind)
        assert (y.double() - exact).abs().max() <= 4 * BF16 * parts


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", FUSED, ids=lambda variant: "-".join(map(str, variant)))
def test_gradients_in_bf16_are_those_of_float32_to_a_few_roundings(variant: Variant, autocast: bool) -> None:
    """Whether the base is in 16 bits, or in 32 with autocast."""
    kind, method, options = variant
    config = small_config(method, kind, options)
    x = kind.input().to(torch.bfloat16)
    exact = run(kind, config, torch.float32, False, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = run(kind, config, torch.float32 if autocast else torch.bfloat16, True, x)
    for near, gradient in [(found[2], exact[2]), *((found[1][name], exact[1][name]) for name in exact[1])]:
        assert (near.double() - gradient).norm() <= 6 * BF16 * gradient.norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", FUSED, ids=lambda variant: "-".join(map(str, variant)))
def test_a_layer_answers_in_the_dtype_in_which_it_does_without_an_adapter(
    variant: Variant, dtype: torch.dtype, autocast: bool
) -> None:
    """A dense layer in that of its weight, one in few bits in that of its input; under autocast both in 16 bits."""
    kind, method, options = variant
    host = kind.host().to(dtype) if kind in FLOATING else kind.host()
    model = randomize(slimtune, attach(kind, small_config(method, kind, options)))
    model = model.to(dtype) if kind in FLOATING else model
    x = kind.input().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = host(x).dtype
        assert expected == (torch.bfloat16 if autocast else dtype)
        assert model.train()(x).dtype == expected
        with torch.no_grad():
            assert model.eval()(x).dtype == expected


AROUND: dict[str, Any] = {
    "out-of-place": lambda model, x: torch.relu(model(x)),
    "in-place": lambda model, x: torch.relu_(model(x)),
    "in-place-on-a-view": lambda model, x: model(x).view(-1).relu_().view(2, 3, 7),
    "checkpointed": lambda model, x: torch.relu(checkpoint(model, x, use_reentrant=False)),
    "checkpointed-reentrant": lambda model, x: torch.relu(checkpoint(model, x, use_reentrant=True)),
    "in-place-checkpointed": lambda model, x: checkpoint(lambda x: torch.relu_(model(x)), x, use_reentrant=False),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("variant", FUSED, ids=lambda variant: "-".join(map(str, variant)))
def test_what_comes_after_a_fused_layer_changes_no_gradient(variant: Variant, around: str) -> None:
    kind, method, options = variant
    config = small_config(method, kind, options)
    found = []
    for after in ("out-of-place", around):
        model = randomize(slimtune, attach(kind, config)).train()
        x = kind.input().requires_grad_()
        y = AROUND[after](model, x)
        for _ in range(1 if "checkpointed" in around else 2):
            y.backward(cotangent(y), retain_graph=True)
        found.append({name: p.grad for name, p in trainable(model).items()} | {"x": x.grad})
    assert_all_near(found[1], found[0], TIGHT)


@pytest.mark.parametrize("variant", FUSED, ids=lambda variant: "-".join(map(str, variant)))
def test_a_second_backward_doubles_the_gradients(variant: Variant) -> None:
    kind, method, options = variant
    model = randomize(slimtune, attach(kind, small_config(method, kind, options))).train()
    y = model(kind.input().requires_grad_())
    y.backward(cotangent(y), retain_graph=True)
    once = {name: 2 * p.grad for name, p in trainable(model).items() if p.grad is not None}
    y.backward(cotangent(y))
    assert_all_near({name: p.grad for name, p in trainable(model).items() if p.grad is not None}, once, TIGHT)


def kind_product_bound(model: Any, kind: Kind) -> Tensor:
    """The size of the summands: rounding is relative to these, not to a sum in which they may cancel."""
    x = kind.input().to(torch.bfloat16).double()
    with model.disable_adapter():
        base = model(x)
    return base.abs().max() + (model(x) - base).abs().max()


WITH_DROPOUT = tuple(kind for kind in FLOATING if "embedding" not in kind.name)  # ids can't be dropped


@given(cases(WITH_DROPOUT, ("LORA", "VERA"), lora_dropout=0.4, vera_dropout=0.4, bias="none", use_dora=False))
def test_with_dropout_forward_and_backward_use_one_mask(case: Case) -> None:
    """The term is linear in each thing that is trained: <gradient, factor> is <cotangent, term> for the mask drawn."""
    kind, config = case
    model = randomize(slimtune, attach(kind, config).double()).train()
    x = kind.input().double()
    with model.disable_adapter():
        base = model(x).detach()
    y = model(x)
    g = cotangent(y)
    y.backward(g)
    term = (g * (y.detach() - base)).sum()
    factors, gradients = adapter_tensors(slimtune, model), adapter_gradients(slimtune, model)
    assert len(gradients) == 2
    for key, gradient in gradients.items():
        assert float((gradient * factors[key]).sum()) == pytest.approx(float(term), rel=1e-6, abs=1e-9)


def test_dropout_keeps_the_mean_and_drops_the_share_that_was_asked_for() -> None:
    torch.manual_seed(0)
    site = nn.Linear(4096, 1, bias=False)
    config = slimtune.LoraConfig(r=1, lora_alpha=1, target_modules=["0"], lora_dropout=0.25)
    model = slimtune.get_peft_model(nn.Sequential(site), config).train()
    ones = {key: torch.ones_like(t) for key, t in adapter_tensors(slimtune, model).items()}
    slimtune.set_peft_model_state_dict(model, ones)
    x = torch.ones(64, 4096)
    with model.disable_adapter():
        base = model(x)
    kept = (model(x) - base) / 4096  # the mean of mask / (1 - p) over a row
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.01)  # 262,144 draws
    assert len(set(kept.flatten().tolist())) > 32, "each row has a mask of its own"
    x = torch.eye(4096)[:512]
    with model.disable_adapter():
        base = model(x)
    single = (model(x) - base).flatten()
    values = sorted({round(v, 3) for v in single.tolist()})
    assert values == pytest.approx([0.0, 4 / 3], abs=2e-3)


DROPPING = {
    "lora": slimtune.LoraConfig(r=4, target_modules=["site"], lora_dropout=0.5),
    "dora": slimtune.LoraConfig(r=4, target_modules=["site"], lora_dropout=0.5, use_dora=True),
    "vera": slimtune.VeraConfig(r=4, target_modules=["site"], vera_dropout=0.5),
}


@pytest.mark.parametrize("method", DROPPING)
def test_two_forwards_draw_two_masks_and_a_seed_repeats_them(method: str) -> None:
    kind = KINDS[0]
    model = randomize(slimtune, attach(kind, DROPPING[method])).train()
    # So many rows that a sum of weights would be the cheaper product.
    x = torch.cat([kind.input(seed) for seed in range(20)])
    torch.manual_seed(5)
    first, second = model(x), model(x)
    torch.manual_seed(5)
    again = model(x)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert torch.equal(model.eval()(x), model(x))


INPUTS: dict[str, Any] = {
    "a-leaf": lambda u, v: u,
    "a-product": lambda u, v: u * v,
    "a-square": lambda u, v: u * u,
    "a-broadcast-product": lambda u, v: u * v[..., :1],
    "a-product-with-a-constant": lambda u, v: u * torch.linspace(0.5, 1.5, 12, dtype=u.dtype),
    "a-product-with-a-number": lambda u, v: u * 3.0,
    "a-product-with-a-detached": lambda u, v: u * v.detach(),
    "a-product-changed-in-place": lambda u, v: (u * v).add_(1.0),
    "a-reshaped-product": lambda u, v: (u * v).flip(-1),
    "a-gated-activation": lambda u, v: torch.nn.functional.silu(u) * v,
}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("case", INPUTS)
def test_gradients_pass_through_whatever_made_the_input(case: str, dropout: float) -> None:
    """Saving memory by what autograd keeps of the input anyway must not depend on how the input came about."""
    config = slimtune.LoraConfig(r=3, target_modules=["site"], lora_dropout=dropout)
    model = randomize(slimtune, attach(KINDS[0], config)).double().train()
    torch.manual_seed(3)
    start = [torch.randn(2, 3, 12, dtype=torch.float64) for _ in range(2)]

    def loss(u: Tensor, v: Tensor, *factors: Tensor) -> Tensor:
        torch.manual_seed(4)  # the same mask each time
        slimtune.set_peft_model_state_dict(model, dict(zip(names, factors, strict=True)))
        y = model(INPUTS[case](u, v))
        return (y * cotangent(y)).sum()

    names = sorted(adapter_tensors(slimtune, model))
    factors = [copies(adapter_tensors(slimtune, model))[name] for name in names]
    leaves = [tensor.clone().requires_grad_() for tensor in start]
    loss(*leaves, *factors).backward()
    gradients = adapter_gradients(slimtune, model)
    analytic = [*(leaf.grad for leaf in leaves), *(gradients[name] for name in names)]
    assert sum(gradient is not None for gradient in analytic) >= 3

    for position, gradient in enumerate(analytic):
        if gradient is None:  # a leaf that isn't used, or is detached
            continue
        point = [*start, *factors]
        direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        ahead, behind = (
            [*point[:position], point[position] + h * direction, *point[position + 1 :]] for h in (1e-5, -1e-5)
        )
        with torch.no_grad():
            slope = float((loss(*ahead) - loss(*behind)) / 2e-5)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_two_layers_may_read_one_product() -> None:
    """Siblings share their input, as gate and up do, and each is run again by a checkpoint."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"one": nn.Linear(6, 4), "two": nn.Linear(6, 4)})
    model = randomize(slimtune, slimtune.get_peft_model(plain, slimtune.LoraConfig(r=2, target_modules=["one", "two"])))
    u, v = (torch.randn(5, 6, requires_grad=True) for _ in range(2))

    def both(u: Tensor, v: Tensor) -> Tensor:
        x = u * v
        return (model["one"](x) * model["two"](x)).square().sum()

    found = []
    for run in (both, lambda u, v: checkpoint(both, u, v, use_reentrant=False)):
        model.zero_grad()
        u.grad = v.grad = None
        run(u, v).backward()
        found.append({"u": u.grad, "v": v.grad, **copies(adapter_gradients(slimtune, model))})
    assert_all_near(found[1], found[0], TIGHT)
