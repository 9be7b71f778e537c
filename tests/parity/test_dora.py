"""DoRA does what it does in peft."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import nn

import slimtune
from beside_peft import Agreement, Case, check_generation
from tensors import activate, adapter_tensors, assert_all_near, assert_near, loss_of, predict, randomize, trainable
from zoo import BERT, GEMMA3, GPT2, LLAMA, LLAMA_LINEARS, MIXTURE, QWEN2, T5, TIED_LLAMA, VIT, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LIBRARIES = (slimtune, peft)
UNGROUPED = ["embedding", "conv1d", "conv2d", "shared", "named", "out"]


def case(specimen: Specimen, **options: Any) -> Case:
    return Case("LoraConfig", specimen, specimen.options(r=4, lora_alpha=6, use_dora=True, **options))


CASES = {
    "llama": case(LLAMA),
    "tied-llama": case(TIED_LLAMA),
    "output-head": case(TIED_LLAMA, target_modules=["lm_head", "q_proj"]),
    "qwen2-with-biases": case(QWEN2, bias="all"),
    "gpt2": case(GPT2),
    "gemma3-scaled-embedding": case(GEMMA3),
    "bert": case(BERT),
    "t5": case(T5, target_modules=["q", "v", "o"]),
    "vit": case(VIT),
    "mixture": case(MIXTURE, target_modules=UNGROUPED),
    "rslora-and-patterns": case(
        LLAMA, use_rslora=True, rank_pattern={"q_proj": 2, "mlp.up_proj": 7}, alpha_pattern={"v_proj": 3}
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class TestAgreement(Agreement):
    cases = CASES
    # peft's merge of a tied head changes the embedding too.
    merged = {name: case for name, case in CASES.items() if name != "output-head"}


def test_generation_agrees() -> None:
    check_generation("LoraConfig", target_modules=LLAMA_LINEARS, use_dora=True)


@each_case
def test_a_new_adapter_has_peft_s_magnitudes_and_changes_no_bit(case: Case) -> None:
    ours, theirs = (adapter_tensors(library, case.model(library)) for library in LIBRARIES)
    magnitudes = {key: tensor for key, tensor in ours.items() if key.endswith("lora_magnitude_vector")}
    assert_all_near(magnitudes, {key: theirs[key] for key in magnitudes}, 1e-6)
    # A strided input of three dimensions gets its bias after rounding from torch's own linear layer, but not here.
    dtypes = (torch.float32,) if case.specimen is MIXTURE else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        base = case.specimen.model().to(dtype)
        expected = predict(base, case.batch(dtype))
        config = slimtune.LoraConfig(**copy.deepcopy(case.options))
        assert torch.equal(predict(slimtune.get_peft_model(base, config), case.batch(dtype)), expected)


def two(library: ModuleType, specimen: Specimen, **options: Any) -> Any:
    model = library.get_peft_model(specimen.model(), library.LoraConfig(**specimen.options(use_dora=True, **options)))
    model.add_adapter("other", library.LoraConfig(**specimen.options(r=3, lora_alpha=5, use_dora=True, **options)))
    return randomize(library, randomize(library, model, seed=4), "other", seed=5)


@pytest.mark.parametrize("specimen", [LLAMA, QWEN2, GPT2, T5], ids=lambda specimen: specimen.name)
def test_several_adapters_at_once_agree(specimen: Specimen) -> None:
    outputs, merged = [], []
    for library in LIBRARIES:
        model = two(library, specimen)
        activate(model, ["default", "other"])
        outputs.append(predict(model, specimen.batch()))
        merged.append(predict(model.merge_and_unload(), specimen.batch()))
    assert_near(*outputs)
    assert_near(*merged)
    assert_near(merged[0], outputs[0])


def test_with_dropout_the_mean_over_masks_is_the_output_without() -> None:
    """And a mask of peft's gives peft's output: on ones, all that counts of a mask is how many it keeps."""
    site = nn.Linear(4096, 3)
    nn.init.constant_(site.weight, 0.01)
    outputs = {}
    for dropout in (0.0, 0.25):
        config = slimtune.LoraConfig(r=2, target_modules=["0"], lora_dropout=dropout, use_dora=True)
        model = slimtune.get_peft_model(nn.Sequential(copy.deepcopy(site)), config)
        torch.manual_seed(0)
        constant = {key: torch.full_like(t, 0.03) for key, t in adapter_tensors(slimtune, model).items()}
        slimtune.set_peft_model_state_dict(model, constant)
        outputs[dropout] = model.train()(torch.ones(512, 4096)).detach()
    assert outputs[0.25].std(0).min() > 0
    assert_near(outputs[0.25].mean(0), outputs[0.0].mean(0), 0.01)


def test_dropout_follows_the_formula() -> None:
    """y = base(x) + (c - 1) (base(x') - b) + c s B A x' with one mask in x'."""
    torch.manual_seed(0)
    site = nn.Linear(12, 7).double()
    config = slimtune.LoraConfig(r=3, target_modules=["0"], lora_dropout=0.4, use_dora=True)
    model: Any = randomize(slimtune, slimtune.get_peft_model(nn.Sequential(site), config)).double().train()
    x = torch.randn(5, 12).double()
    torch.manual_seed(6)
    y = model(x)
    torch.manual_seed(6)
    kept = torch.nn.functional.dropout(x, 0.4)
    delta = model[0].deltas["default"]
    update = delta.scaling * delta.lora_B @ delta.lora_A
    ratio = delta.lora_magnitude_vector / (site.weight + update).norm(dim=1)
    plain = x @ site.weight.t() + site.bias
    assert_near(y, plain + (ratio - 1) * (kept @ site.weight.t()) + ratio * (kept @ update.t()), 1e-12)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_the_kept_norm_of_the_weight_follows_the_weight(copied: Any) -> None:
    """It is computed once; a weight that changes, by hand or by a merge, and a copy have their own."""
    model: Any = CASES["llama"].tuned(slimtune)
    batch = LLAMA.batch()
    expected = predict(model, batch)
    twin = copied(model)
    assert torch.equal(predict(twin, batch), expected)
    layer = twin.model.layers[0].self_attn.q_proj

    def overwrite() -> None:
        layer.weight.copy_(3 * layer.weight)

    def exchange() -> None:
        layer.weight = nn.Parameter(layer.weight / 2 + 0.1, requires_grad=False)

    def exchange_data() -> None:
        layer.weight.data = layer.weight + 0.1

    for change in (overwrite, exchange, exchange_data):
        before = predict(twin, batch)
        with torch.no_grad():
            change()
        after = predict(twin, batch)
        assert not torch.equal(after, before)
        assert torch.equal(after, predict(copy.deepcopy(twin), batch)), "a copy computes it anew"
    assert torch.equal(predict(model, batch), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(predict(model, batch), expected)


def test_a_row_of_zeros_starts_at_the_base_and_learns() -> None:
    """Its norm is zero and has no direction; so it is in layers that start at zero, as in ControlNets."""
    for site in (nn.Linear(6, 4), nn.Conv2d(2, 4, 3)):
        nn.init.zeros_(site.weight)
        config = slimtune.LoraConfig(r=2, target_modules=["0"], use_dora=True)
        model: Any = slimtune.get_peft_model(nn.Sequential(site), config).train()
        x = torch.randn(5, 6) if isinstance(site, nn.Linear) else torch.randn(5, 2, 4, 4)
        y = model(x)
        assert site.bias is not None
        assert torch.equal(y, site.bias.view(-1, *[1] * (y.ndim - 2)).expand_as(y))
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert losses[-1] < losses[0]


def test_bf16_trains_close_to_float32() -> None:
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        config = slimtune.LoraConfig(**LLAMA.options(use_dora=True))
        model = slimtune.get_peft_model(LLAMA.model().to(dtype), config).train()
        assert {p.dtype for p in trainable(model).values()} == {torch.float32}
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
        for _ in range(8):
            optimizer.zero_grad()
            loss_of(model, LLAMA.batch()).backward()
            optimizer.step()
        losses[dtype] = float(loss_of(model, LLAMA.batch()).detach())
    start = float(loss_of(LLAMA.model(), LLAMA.batch()).detach())
    assert abs(losses[torch.bfloat16] - losses[torch.float32]) < 0.1 * (start - losses[torch.float32])


@pytest.mark.parametrize("groups", [2, 4])
def test_dora_on_a_grouped_convolution_means_what_it_means_in_peft(groups: int) -> None:
    outputs, gradients = [], []
    for library in LIBRARIES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=groups), nn.Flatten(), nn.LazyLinear(2))
        x = torch.randn(3, 8, 6, 6)
        model(x)
        config = library.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"])
        adapted_model = randomize(library, library.get_peft_model(model, config))
        y = adapted_model(x)
        y.square().mean().backward()
        outputs.append(y)
        gradients.append([p.grad for p in adapted_model.parameters() if p.requires_grad])
    assert_near(*outputs)
    for ours, theirs in zip(*gradients, strict=True):
        assert_near(ours, theirs)


def magnitudes(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    tensors = adapter_tensors(slimtune, model, adapter)
    return {name: tensor for name, tensor in tensors.items() if "magnitude" in name}


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_combined_directions_are_peft_s_and_magnitudes_are_not_lost(how: str) -> None:
    """peft leaves the magnitudes of what it combines at those of the base."""
    ours, theirs = two(slimtune, LLAMA), two(peft, LLAMA)
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "other"], [0.7, -0.2], "mixed", combination_type=how)
    found, expected = (adapter_tensors(library, m, "mixed") for library, m in ((slimtune, ours), (peft, theirs)))
    assert found.keys() == expected.keys()
    norms = {name: tensor for name, tensor in expected.items() if "magnitude" in name}
    one, other, mixed = (magnitudes(ours, name) for name in ("default", "other", "mixed"))
    assert_all_near(mixed, {k: n + 0.7 * (one[k] - n) - 0.2 * (other[k] - n) for k, n in norms.items()}, 1e-5)
    for name in found:
        if "lora_B" in name:
            a, b = name.replace("lora_B", "lora_A"), name
            assert_near(found[b] @ found[a], expected[b] @ expected[a], 1e-5)


def test_combined_with_itself_it_is_itself() -> None:
    model = two(slimtune, LLAMA)
    model.set_adapter("other")
    expected = predict(model, LLAMA.batch())
    model.add_weighted_adapter(["other"], [1.0], "same")
    model.add_weighted_adapter(["other", "other"], [0.25, 0.75], "halves", combination_type="cat")
    for name in ("same", "halves"):
        model.set_adapter(name)
        assert_near(predict(model, LLAMA.batch()), expected)


def test_it_is_not_combined_with_plain_lora() -> None:
    model = two(slimtune, LLAMA)
    model.add_adapter("plain", slimtune.LoraConfig(**LLAMA.options()))
    with pytest.raises(slimtune.errors.ConfigError, match="with and without DoRA"):
        model.add_weighted_adapter(["default", "plain"], [0.5, 0.5], "mixed")
