"""LoRA on `nn.MultiheadAttention`: what peft computes, its files, and what torch's own encoders make of it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slimtune
from slimtune.errors import ConfigError, TargetError
from tensors import adapter_gradients, adapter_tensors, assert_all_near, assert_near, assert_same, copies, randomize

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Attending(nn.Module):
    """Attention over itself and over something else, of different widths, between two linear layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.begin = nn.Linear(8, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **options)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(12, 2, 20, batch_first=True) for _ in range(2)])
        self.end = nn.Linear(12, 5)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        h = self.begin(x)
        other = h if memory is None else self.begin(memory)
        h = h + self.attention(h, other, other, need_weights=False)[0]
        for block in self.blocks:
            h = block(h)
        return self.end(h)


def base(**options: Any) -> Any:
    torch.manual_seed(3)
    return Attending(**options).eval()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(4)).to(dtype)


CASES: dict[str, dict[str, Any]] = {
    "both-kinds": {"target_modules": ["attention", "self_attn"]},
    "beside-linear-layers": {"target_modules": ["attention", "begin", "linear1"]},
    "a-rank-of-its-own": {"target_modules": ["self_attn", "attention"], "rank_pattern": {"attention": 2}},
    "gaussian": {"target_modules": ["attention"], "init_lora_weights": "gaussian", "use_rslora": True},
}
each_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def tuned(library: ModuleType, options: dict[str, Any], **of_base: Any) -> Any:
    config = library.LoraConfig(r=4, lora_alpha=6, **copy.deepcopy(options))
    return randomize(library, library.get_peft_model(base(**of_base), config)).eval()


@each_case
def test_outputs_and_files_agree_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = tuned(slimtune, options), tuned(peft, options)
    assert_same(adapter_tensors(slimtune, ours), adapter_tensors(peft, theirs))
    x = inputs()
    # Without gradients peft's answer is another one: the fast path of torch's encoder layer goes past its wrapper.
    expected = theirs(x)
    assert (expected - base()(x)).abs().max() > 1e-2
    for run in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with run():
            assert_near(ours(x), expected)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    assert_same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")))
    read_by_peft = peft.PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True).eval()
    assert_near(read_by_peft(x), expected)
    assert_near(slimtune.PeftModel.from_pretrained(base(), tmp_path / "theirs")(x), expected)


@each_case
def test_its_gradients_are_those_of_what_it_computes(options: dict[str, Any]) -> None:
    model = tuned(slimtune, options).to(torch.float64)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def outputs(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(trained, values, strict=True)), inputs(torch.float64))

    assert torch.autograd.gradcheck(outputs, tuple(trained.values()), fast_mode=True)


@each_case
def test_gradients_and_merges_agree(options: dict[str, Any]) -> None:
    gradients, merged = [], []
    for library in (slimtune, peft):
        model = tuned(library, options).to(torch.float64).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for block in (m for m in model.modules() if isinstance(m, nn.MultiheadAttention)):
            block.dropout = 0.0
        model(inputs(torch.float64)).square().mean().backward()
        gradients.append(copies(adapter_gradients(library, model)))
        merged.append(dict(model.merge_and_unload().state_dict()))
    ours, theirs = gradients
    assert theirs != {}
    # peft adds the output layer's change twice, and lets the gradient through once.
    assert_all_near(ours, {name: (1 + ("out_proj" in name)) * tensor for name, tensor in theirs.items()}, 1e-6)
    assert_all_near(*merged, 1e-6)


def test_two_adapters_at_once_add_up_and_switching_gives_the_base_back() -> None:
    options = CASES["both-kinds"]
    model, x = tuned(slimtune, options), inputs()
    first = model(x)
    model.add_adapter("other", slimtune.LoraConfig(r=2, **options))
    randomize(slimtune, model, "other", seed=5)
    assert torch.equal(model(x), first)
    model.set_adapter(["default", "other"])
    both = model(x)
    assert_near(both, copy.deepcopy(model).merge_and_unload()(x), 1e-5)
    model.set_adapter("other")
    assert (model(x) - both).abs().max() > 1e-3
    with model.disable_adapter(), torch.no_grad():
        assert_near(model(x), base()(x), 1e-6)
        untouched = base().requires_grad_(False)
        assert torch.equal(model(x), untouched(x))
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same(dict(model.unload().state_dict()), dict(base().state_dict()))


def test_adapters_of_it_are_combined() -> None:
    options, x = CASES["both-kinds"], inputs()
    model = tuned(slimtune, options)
    model.add_adapter("other", slimtune.LoraConfig(r=2, **options))
    randomize(slimtune, model, "other", seed=5)
    model.set_adapter(["default", "other"])
    both = model(x)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    assert_near(model(x), both)


def test_in_16_bits_its_factors_are_float32_and_learn() -> None:
    model = slimtune.get_peft_model(base().to(torch.bfloat16), slimtune.LoraConfig(target_modules=["attention"]))
    delta = model.attention.deltas["default"]
    assert {p.dtype for p in (*delta.parameters(), *model.attention.out_proj.deltas.parameters())} == {torch.float32}
    model.train()(inputs(torch.bfloat16)).float().square().mean().backward()
    assert delta.lora_B.grad.abs().max() > 0
    assert model.attention.out_proj.deltas["default"].lora_B.grad.abs().max() > 0


def test_a_stored_dropout_is_read_for_inference_alone(tmp_path: Path) -> None:
    """`peft` takes it and drops nothing."""
    options = {**CASES["both-kinds"], "lora_dropout": 0.5}
    theirs = tuned(peft, options)
    theirs.save_pretrained(tmp_path)
    assert_near(slimtune.PeftModel.from_pretrained(base(), tmp_path)(inputs()), theirs(inputs()))
    with pytest.raises(ConfigError, match="nothing to drop"):
        slimtune.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "takes plain LoRA"),
    "bias": ({"bias": "all"}, "takes plain LoRA"),
    "lora-bias": ({"lora_bias": True}, "takes plain LoRA"),
    "start": ({"init_lora_weights": "olora"}, "has no form for"),
    "dropout": ({"lora_dropout": 0.1}, "nothing to drop"),
    "inside": ({"target_modules": ["attention.out_proj"]}, "never calls"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_has_no_such_form_is_refused_and_changes_nothing(mistake: str) -> None:
    options, words = MISTAKES[mistake]
    model = base()
    with pytest.raises((ConfigError, TargetError), match=words):
        slimtune.get_peft_model(model, slimtune.LoraConfig(**{"target_modules": ["attention"], **options}))
    assert type(model.attention) is nn.MultiheadAttention


def test_keys_of_another_width_are_refused() -> None:
    with pytest.raises(TargetError, match="another width"):
        slimtune.get_peft_model(base(kdim=6, vdim=6), slimtune.LoraConfig(target_modules=["attention"]))


def test_rows_of_one_batch_share_it() -> None:
    model = tuned(slimtune, CASES["both-kinds"])
    model.add_adapter("other", slimtune.LoraConfig(r=2, **CASES["both-kinds"]))
    with pytest.raises(ConfigError, match="all rows of a batch share"):
        model(inputs(), adapter_names=["default", "other"])


def test_a_bias_that_no_call_reads_is_refused_where_all_are_to_be_trained() -> None:
    with pytest.raises(TargetError, match=r"attention\.out_proj' without effect"):
        slimtune.get_peft_model(base(), slimtune.LoraConfig(r=2, target_modules=["begin"], bias="all"))
    model = slimtune.get_peft_model(base(), slimtune.LoraConfig(r=2, target_modules=["begin"], bias="lora_only"))
    model.train()(inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
