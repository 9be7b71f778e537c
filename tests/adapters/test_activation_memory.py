"""Frozen norms and gated activations keep less for the backward pass, and compute what they did to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

import slimtune
from slimtune.adapters import activation_memory as frugal
from slimtune.adapters.activation_memory import FrozenNorm, GateActivation
from slimtune.ops.autograd import made_again, maker_of
from slimtune.ops.frozen_norm import FORMULAS, formula_of, frozen_norm
from slimtune.ops.gated import LazyActivation
from slimtune.plan.memory_tracker import MemoryTracker
from tensors import adapter_gradients, assert_all_near, copies, loss_of, randomize
from zoo import BERT, GEMMA3, LLAMA, QWEN2, T5, Specimen

WIDTH = 24
NORMS = {
    "llama": (lambda: LlamaRMSNorm(WIDTH, 1e-5), FORMULAS[0]),
    "t5": (lambda: T5LayerNorm(WIDTH, 1e-5), FORMULAS[0]),
    "olmo": (lambda: Olmo2RMSNorm(WIDTH, 1e-5), FORMULAS[1]),
    "gemma": (lambda: Gemma3RMSNorm(WIDTH, 1e-5), FORMULAS[2]),
}
DTYPES = {"float32": (torch.float32, 2e-6), "bfloat16": (torch.bfloat16, 2.0**-7)}
GATED = [LLAMA, QWEN2, GEMMA3]
each_norm = pytest.mark.parametrize("kind", NORMS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_gated = pytest.mark.parametrize("specimen", GATED, ids=lambda specimen: specimen.name)


def norm(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    module: Any = NORMS[kind][0]()
    nn.init.normal_(module.weight, 0.8, 0.4)
    return module.to(dtype).requires_grad_(False)


def input_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return (3 * torch.randn(shape)).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)


def tuned(specimen: Specimen, **options: Any) -> Any:
    config = slimtune.LoraConfig(r=4, **specimen.options(**options))
    return randomize(slimtune, slimtune.get_peft_model(specimen.model(), config)).train()


def parts(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


@each_norm
def test_a_norm_is_known_by_what_it_computes(kind: str) -> None:
    formula = formula_of(norm(kind, torch.bfloat16))
    assert formula is not None
    assert (formula.offset, formula.rounds_first) == NORMS[kind][1]


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.PReLU(WIDTH),
        Qwen3NextRMSNormGated(WIDTH), nn.Linear(WIDTH, 1, bias=False),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_what_computes_something_else_is_left_alone(module: nn.Module) -> None:
    assert formula_of(module) is None


def test_a_class_that_changes_the_formula_is_another_norm() -> None:
    class Clipped(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states).clamp(max=1.0)

    assert formula_of(Clipped(WIDTH)) is None
    assert formula_of(LlamaRMSNorm(WIDTH)) is not None


@each_norm
@each_dtype
def test_a_norm_and_its_gradient(kind: str, dtype: str) -> None:
    torch_dtype, tolerance = DTYPES[dtype]
    module = norm(kind, torch_dtype)
    x, g = input_and_gradient((2, 5, WIDTH), torch_dtype)
    expected = module(x)
    (expected_gradient,) = torch.autograd.grad(expected, x, g)
    formula = formula_of(module)
    assert formula is not None
    y = frozen_norm(x, module.weight, getattr(module, formula.epsilon), formula)
    assert torch.equal(y, expected)
    node = maker_of(y)
    assert torch.equal(made_again(node), expected)
    assert node.output is not None
    (gradient,) = torch.autograd.grad(y, x, g)
    assert node.output is None
    assert gradient.dtype == torch_dtype
    assert (gradient - expected_gradient).float().norm() <= tolerance * expected_gradient.float().norm()


def test_trying_a_class_is_no_part_of_what_others_count() -> None:
    class Untried(LlamaRMSNorm):
        pass

    module, tracker = Untried(WIDTH), MemoryTracker()
    with tracker:
        assert formula_of(module) is not None
    assert not tracker.operations


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2", "quick_gelu"])
@pytest.mark.parametrize("lazy_first", [True, False])
@each_dtype
def test_a_gated_product_and_its_gradients(activation: str, lazy_first: bool, dtype: str) -> None:
    torch_dtype, _ = DTYPES[dtype]
    function = ACT2FN[activation]
    (gate, g), (up, _) = (input_and_gradient((2, 5, WIDTH), torch_dtype) for _ in range(2))
    up = (up * 0.5).detach().requires_grad_()
    expected = function(gate) * up
    expected_gradients = torch.autograd.grad(expected, (gate, up), g)
    lazy: Any = LazyActivation(gate, function)
    y = lazy * up if lazy_first else up * lazy
    assert torch.equal(y, expected)
    assert [tensor.data_ptr() for tensor in y.grad_fn.saved_tensors] == [gate.data_ptr(), up.data_ptr()]
    assert torch.equal(made_again(maker_of(y)), expected)
    for gradient, wanted in zip(torch.autograd.grad(y, (gate, up), g), expected_gradients, strict=True):
        assert torch.equal(gradient, wanted)


def test_any_other_use_makes_it_the_activation() -> None:
    gate, _ = input_and_gradient((2, WIDTH), torch.float32)
    real = torch.nn.functional.silu(gate)

    def lazy() -> Any:
        return LazyActivation(gate, torch.nn.functional.silu)

    layer = nn.Linear(WIDTH, 3)
    assert torch.equal(layer(lazy()), layer(real))
    assert torch.equal(lazy() * 2, real * 2)
    assert torch.equal(lazy() * real[0], real * real[0])
    assert torch.equal(lazy() * lazy(), real * real)
    assert torch.equal(lazy()[0] + 1, real[0] + 1)
    assert torch.equal(torch.cat([lazy(), real]), torch.cat([real, real]))
    assert torch.equal(nn.Dropout(0.0)(lazy()), real)
    assert lazy().shape == real.shape


@each_gated
def test_a_model_s_gradients_are_those_of_its_own_forwards(specimen: Specimen, monkeypatch: Any) -> None:
    model, batch = tuned(specimen), specimen.batch()
    assert parts(model, FrozenNorm)
    assert parts(model, GateActivation)
    loss = loss_of(model, batch)
    loss.backward()
    found = copies(adapter_gradients(slimtune, model))
    model.zero_grad()
    monkeypatch.setattr(frugal, "_passes_gradients", lambda *inputs: False)
    plain = loss_of(model, batch)
    plain.backward()
    assert torch.equal(loss, plain)
    assert_all_near(found, adapter_gradients(slimtune, model), 1e-5)


def test_what_is_looked_at_is_a_tensor() -> None:
    model, seen = tuned(LLAMA), []
    for module in parts(model, GateActivation):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    loss_of(model, LLAMA.batch()).backward()
    assert seen
    assert all(type(output) is Tensor for output in seen)


def test_layers_that_read_a_norm_don_t_save_its_output(monkeypatch: Any) -> None:
    model = tuned(LLAMA, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    outputs: dict[str, Any] = {}
    norms = parts(model, FrozenNorm)
    original = type(norms[0]).forward

    def watched(self: Any, x: Any) -> Any:
        outputs[str(id(self))] = y = original(self, x)
        return y

    monkeypatch.setattr(type(norms[0]), "forward", watched)
    loss = loss_of(model, LLAMA.batch())
    kept: set[int] = set()
    waiting, met = [loss.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        kept |= {t.data_ptr() for t in getattr(node, "saved_tensors", ()) or () if t is not None}
        waiting += [following for following, _ in node.next_functions]
    layer_norms = [y for y in outputs.values() if type(y.grad_fn).__name__ == "_FrozenNormBackward"]
    assert len(layer_norms) >= 4
    read_by_layers = layer_norms[:-1]  # the last one is read by the head
    assert not kept & {y.data_ptr() for y in read_by_layers}


def test_inputs_by_name_and_others_go_to_the_module_itself() -> None:
    model = tuned(LLAMA)
    x, _ = input_and_gradient((1, 3, 32), torch.float32)
    norm, activation = parts(model, FrozenNorm)[0], parts(model, GateActivation)[0]
    assert torch.equal(norm(hidden_states=x), norm(x))
    assert torch.equal(activation(input=x), activation(x) + 0)
    with pytest.raises(TypeError):
        norm(x, x)


def test_unloading_gives_the_classes_back() -> None:
    model = LLAMA.model()
    before = [type(module) for module in model.modules()]
    plain = tuned(LLAMA).unload()
    assert [type(module) for module in plain.modules()] == before


def test_a_norm_that_is_trained_takes_its_own_forward() -> None:
    for config in (slimtune.LNTuningConfig(target_modules=["input_layernorm"]), slimtune.FullConfig()):
        model = slimtune.get_peft_model(LLAMA.model(), config).train()
        loss_of(model, LLAMA.batch()).backward()
        trained = [p for name, p in model.named_parameters() if "input_layernorm" in name and p.requires_grad]
        assert trained
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_a_copy_is_as_frugal() -> None:
    model = copy.deepcopy(tuned(LLAMA))
    y = parts(model, FrozenNorm)[0](torch.randn(1, 3, 32, requires_grad=True))
    assert type(y.grad_fn).__name__ == "_FrozenNormBackward"


def test_an_activation_without_a_gate_stays_as_it_is() -> None:
    assert not parts(tuned(T5), GateActivation)
    assert parts(tuned(T5), FrozenNorm)
    assert not parts(tuned(BERT), GateActivation)


def test_the_gates_of_t5(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    config.decoder_start_token_id = 0
    model = slimtune.get_peft_model(
        transformers.T5ForConditionalGeneration(config), slimtune.LoraConfig(r=4, target_modules=["wi_0", "wi_1", "wo"])
    )
    randomize(slimtune, model).train()
    batch = T5.batch()
    assert len(parts(model, GateActivation)) == 4
    torch.manual_seed(3)  # of the dropout
    loss_of(model, batch).backward()
    found = copies(adapter_gradients(slimtune, model))
    model.zero_grad()
    monkeypatch.setattr(frugal, "_passes_gradients", lambda *inputs: False)
    torch.manual_seed(3)
    loss_of(model, batch).backward()
    assert_all_near(found, adapter_gradients(slimtune, model), 1e-6)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_layer_behind_a_gelu_doesn_t_save_its_input(approximate: str) -> None:
    x, _ = input_and_gradient((2, 5, WIDTH), torch.float32)
    activated = torch.nn.functional.gelu(x * 2, approximate=approximate)
    assert torch.equal(made_again(maker_of(activated)), activated)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(approximate), nn.Linear(WIDTH, 3))
    model = slimtune.get_peft_model(model, slimtune.LoraConfig(r=2, target_modules=["0", "2"]))
    randomize(slimtune, model).train()
    hidden = model[1](model[0](x))
    y = model[2](hidden)
    assert hidden.data_ptr() not in {
        t.data_ptr() for t in y.grad_fn.next_functions[0][0].saved_tensors if t is not None
    }
