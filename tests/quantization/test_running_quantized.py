"""Quantized models run in all ways: compiled, checkpointed, in autocast, cast, copied, evaluated before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import slimtune
from quantizers import QUANTIZERS, Quantizer, expanded, four_bit
from slimtune.bases.bitsandbytes import Linear4bit, Linear8bit
from tensors import (
    adapter_gradients,
    assert_all_near,
    assert_near,
    copies,
    loss_of,
    predict,
    randomize,
    relative_error,
    trainable,
)
from zoo import LLAMA, LLAMA_LINEARS, QUANTIZED, Specimen, llama

CONFIG: dict[str, Any] = {"r": 4, "target_modules": LLAMA_LINEARS}
OF_BNB = [specimen for specimen in QUANTIZED if "torchao" not in specimen.name]
each_quantizer = pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if "torchao" not in q.name], ids=repr)
each_specimen = pytest.mark.parametrize("specimen", OF_BNB, ids=lambda specimen: specimen.name)
each_form = pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])


def tuned(specimen: Specimen, **options: Any) -> Any:
    config = slimtune.LoraConfig(**CONFIG, **options)
    return randomize(slimtune, slimtune.get_peft_model(specimen.model(), config))


def step(model: Any, run: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a step."""
    model.zero_grad()
    loss = loss_of((model if run is None else run).train(), LLAMA.batch())
    loss.backward()
    assert [name for name, p in trainable(model).items() if p.grad is None] == []
    return loss.detach(), copies(adapter_gradients(slimtune, model))


def on_expanded_weights(specimen: Specimen, **options: Any) -> Any:
    """The same model and adapter in floating point."""
    dense = specimen.model()
    for path, layer in list(dense.named_modules()):
        if isinstance(layer, Linear4bit | Linear8bit):
            dense.set_submodule(path, expanded(layer))
    return randomize(slimtune, slimtune.get_peft_model(dense, slimtune.LoraConfig(**CONFIG, **options)))


@each_specimen
@each_form
def test_a_step_is_that_on_the_expanded_weights(specimen: Specimen, options: dict[str, Any]) -> None:
    """To the rounding of float32."""
    (loss, gradients), (expected, wanted) = (
        step(tuned(specimen, **options)),
        step(on_expanded_weights(specimen, **options)),
    )
    assert_near(loss, expected, 1e-6)
    assert_all_near(gradients, wanted, 1e-5)


@pytest.fixture
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("fresh_compiler")
@each_quantizer
@each_form
def test_a_compiled_layer_is_one_graph_with_the_same_gradients(quantizer: Quantizer, options: dict[str, Any]) -> None:
    config = slimtune.LoraConfig(r=2, target_modules=["0"], **options)
    model = randomize(slimtune, slimtune.get_peft_model(nn.Sequential(quantizer.linear(12, 7)), config)).train()
    x, found = torch.randn(3, 12), []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": leaf.grad} | copies(adapter_gradients(slimtune, model)))
    assert_all_near(found[1], found[0], 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model() -> None:
    model = tuned(next(specimen for specimen in OF_BNB if specimen.name == "llama-in-nf4-double"), use_dora=True)
    expected, wanted = step(model)
    loss, gradients = step(model, torch.compile(model, backend="aot_eager"))
    assert_near(loss, expected, 1e-6)
    assert_all_near(gradients, wanted, 1e-5)


@each_specimen
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpointed(specimen: Specimen, use_reentrant: bool) -> None:
    forms: list[dict[str, Any]] = [{"lora_dropout": 0.3}, {"use_dora": True}]
    for options in forms:
        model = tuned(specimen, **options)
        torch.manual_seed(4)
        _, wanted = step(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(4)
        _, gradients = step(model)
        assert_all_near(gradients, wanted, 1e-5)


@each_specimen
@each_form
def test_autocast(specimen: Specimen, options: dict[str, Any]) -> None:
    found = []
    for model in (tuned(specimen, **options), on_expanded_weights(specimen, **options)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.eval()(input_ids=LLAMA.batch()["input_ids"]).logits
            found.append((logits, *step(model)))
    (logits, loss, gradients), (wanted_logits, wanted_loss, wanted) = found
    assert logits.dtype == torch.bfloat16
    assert_near(logits, wanted_logits, 1e-6)
    assert_near(loss, wanted_loss, 1e-6)
    assert_all_near(gradients, wanted, 1e-5)


@each_specimen
@each_form
def test_inference_mode(specimen: Specimen, options: dict[str, Any]) -> None:
    model = tuned(specimen, **options)
    expected = predict(model, LLAMA.batch())
    with torch.inference_mode():
        assert torch.equal(model(**LLAMA.batch()).logits, expected)
    step(model)  # nothing of it is left over that a step would trip over


@each_specimen
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast(specimen: Specimen, dtype: torch.dtype) -> None:
    """Codes stay what they are; all other parameters follow."""
    model = tuned(specimen)
    codes = {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    cast = model.to(dtype)
    assert len(codes) == 14
    assert all(torch.equal(cast.get_parameter(name), own) for name, own in codes.items())
    assert {p.dtype for n, p in cast.named_parameters() if n not in codes} == {dtype}
    assert predict(cast, LLAMA.batch()).dtype == dtype
    step(cast)


@each_quantizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_layer_rounds_its_output_alone(quantizer: Quantizer, dtype: torch.dtype) -> None:
    site = quantizer.linear(80, 48).to(dtype)
    x = torch.randn(5, 80).to(dtype)
    y = site(x)
    assert y.dtype == dtype
    assert_near(y, expanded(site).double()(x.double()), torch.finfo(dtype).eps)


@each_quantizer
def test_copies_keep_no_part_of_the_original(quantizer: Quantizer) -> None:
    model = slimtune.get_peft_model(quantizer.model(llama()), slimtune.LoraConfig(**CONFIG))
    twin = copy.deepcopy(model)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert storages.isdisjoint(p.untyped_storage().data_ptr() for p in twin.parameters())
    for module in twin.modules():
        if isinstance(module, Linear4bit):
            assert module.quant_state is module.weight.quant_state
            assert module.weight.module is module


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-double"])
def test_a_model_that_bitsandbytes_has_evaluated(double: bool) -> None:
    """On CPUs with AVX512-BF16 it has repacked its weights: they are put back, with maxima rounded to bfloat16."""

    def fresh() -> Any:
        torch.manual_seed(0)
        model = llama(hidden_size=128, intermediate_size=256)
        return Quantizer("", four_bit("nf4", double=double)).model(model).eval()

    batch = LLAMA.batch()
    evaluated = fresh()
    theirs = predict(evaluated, batch)
    config = slimtune.LoraConfig(**CONFIG)
    model = slimtune.get_peft_model(evaluated, copy.deepcopy(config))
    ours = predict(model, batch)
    exact = predict(slimtune.get_peft_model(fresh(), copy.deepcopy(config)), batch)
    assert relative_error(ours, exact) < 0.02
    assert relative_error(theirs, exact) < 0.02
    step(randomize(slimtune, model))
    states = [m.state_dict() for m in (model.unload(), fresh())]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        if name.endswith("absmax") and not double:
            assert_near(states[0][name].float(), tensor.float(), 2**-8)
        elif "absmax" not in name and "quant_state" not in name:
            assert torch.equal(states[0][name], tensor), name
    again = fresh()
    slimtune.bases.claim(again)
    again.load_state_dict(states[0])
    assert torch.equal(predict(again, batch), ours)
