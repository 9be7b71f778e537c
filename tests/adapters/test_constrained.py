"""The constraint on the merged weight: what is trained is what is merged, for every method that folds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import slimtune
from slimtune import ConstraintConfig, PeftModel, get_peft_model
from slimtune.bases import base_of
from slimtune.core.config import PeftConfig, methods
from slimtune.core.constrained import Constrained, Grid
from slimtune.core.frozen import Site, walk
from slimtune.errors import AdapterFileError, BaseMismatchError, ConfigError
from slimtune.serve.convert import convert_to_lora
from slimtune.slim.weights import WeightPruning, pruned_layers, zero_weights
from zoo import GPT2, LLAMA, VOCABULARY

METHODS: dict[str, PeftConfig] = {
    "lora": slimtune.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"),
    "lora with biases": slimtune.LoraConfig(
        r=4, init_lora_weights=False, target_modules="all-linear", bias="lora_only", lora_bias=False
    ),
    "dora": slimtune.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", use_dora=True),
    "pissa": slimtune.LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear"),
    "some layers": slimtune.LoraConfig(r=4, init_lora_weights=False, target_modules=["query_key_value"]),
    "adalora": slimtune.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules="all-linear"),
    "vera": slimtune.VeraConfig(r=8, init_weights=False, target_modules="all-linear"),
    "loha": slimtune.LoHaConfig(r=4, init_weights=False, target_modules="all-linear"),
    "lokr": slimtune.LoKrConfig(r=4, init_weights=False, target_modules="all-linear"),
    "ia3": slimtune.IA3Config(),
    "bitfit": slimtune.BitFitConfig(),
    "ln tuning": slimtune.LNTuningConfig(),
    "full": slimtune.FullConfig(),
    "full, stored whole": slimtune.FullConfig(store="whole"),
}
CONSTRAINTS: dict[str, ConstraintConfig] = {
    "mask": ConstraintConfig(mask=True),
    "int4": ConstraintConfig(num_bits=4, group_size=32),
    "int8": ConstraintConfig(num_bits=8),
    "both": ConstraintConfig(mask=True, num_bits=4, group_size=32),
    "learned": ConstraintConfig(num_bits=4, group_size=32, learn_scales=True),
}


def neox(dtype: torch.dtype = torch.float32) -> nn.Module:
    """With biases, and widths that groups divide; half of its weights in each row are zero."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config).eval()
    return zero_weights(model, [], WeightPruning(pattern="2:4", method="magnitude"))[0].to(dtype)


def tuned(name: str, constraint: ConstraintConfig | None, dtype: torch.dtype = torch.float32) -> Any:
    """A model with an adapter that changes something everywhere."""
    config = copy.deepcopy(METHODS[name])
    config.constraint = constraint  # type: ignore[attr-defined]
    torch.manual_seed(1)
    model = get_peft_model(neox(dtype), config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter_name.endswith("scales"):
            parameter.data += 0.02 * torch.randn(parameter.shape)
    return model.eval()


def ids() -> Tensor:
    torch.manual_seed(2)
    return torch.randint(4, VOCABULARY, (3, 9))


def log_probabilities(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits.double().log_softmax(-1)


def largest_kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).max())


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.weight.detach() for name, module in pruned_layers(model).items()}  # type: ignore[misc]


def test_all_methods_that_fold_are_here() -> None:
    tried = {config.peft_type for config in METHODS.values()}
    left = set(methods()) - tried
    assert left == {
        "BOTTLENECK", "LAST_LAYER", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "TRAINABLE_TOKENS"
    }, left  # fmt: skip


@pytest.mark.parametrize(
    ("constraint", "dtype"),
    [
        *((name, torch.float32) for name in CONSTRAINTS if name != "learned"),
        *((name, torch.bfloat16) for name in ("mask", "learned")),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_is_what_is_merged(name: str, constraint: str, dtype: torch.dtype) -> None:
    base = matrices(neox(dtype))
    config = CONSTRAINTS[constraint]
    model = tuned(name, config, dtype)
    trained = log_probabilities(model)
    merged = model.merge_and_unload()
    assert largest_kl(trained, log_probabilities(merged)) <= 1e-6
    for path, weight in matrices(merged).items():
        if config.mask:
            assert torch.equal(weight == 0, (weight == 0) | (base[path] == 0)), path
            if config.num_bits is None and "full" not in name:
                assert int((weight == 0).sum()) == int((base[path] == 0).sum()), path
        if config.num_bits == 4:
            levels = [len(set(group.tolist())) for row in weight for group in row.split(32)]
            assert max(levels) <= 16, path


@pytest.mark.parametrize("name", METHODS)
def test_held_to_nothing_it_learns_as_without(name: str) -> None:
    plain, held = tuned(name, None), tuned(name, None)
    for _, module in walk(held):
        for adapter, delta in getattr(module, "deltas", {}).items():
            if base_of(module).kind == "linear":
                module.deltas[adapter] = Constrained(delta, {}, base_of(module))
    batch = {"input_ids": ids(), "labels": ids()}
    gradients = []
    for model in (plain, held):
        model(**batch).loss.backward()
        gradients.append({n.replace("inner.", ""): p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for path, gradient in gradients[0].items():
        if gradient is None:  # of what only a penalty of the trainer reaches
            assert gradients[1][path] is None, path
        else:
            torch.testing.assert_close(gradients[1][path], gradient, rtol=1e-4, atol=1e-6, msg=path)


@pytest.mark.parametrize("name", ["lora", "lora with biases", "some layers", "pissa", "adalora", "bitfit"])
def test_straight_through_a_grid_the_short_way_learns_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, losses = [], []
    for is_short in (True, False):
        if not is_short:
            monkeypatch.setattr(Constrained, "_is_straight", False)
        model = tuned(name, CONSTRAINTS["int4"])
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        losses.append(loss)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert torch.equal(*losses)
    for path, gradient in gradients[0].items():
        if gradient is None:
            assert gradients[1][path] is None, path
        else:
            torch.testing.assert_close(gradients[1][path], gradient, rtol=1e-4, atol=1e-6, msg=path)


@pytest.mark.parametrize("constraint", ["both", "learned"])
@pytest.mark.parametrize("name", METHODS)
def test_it_comes_back_from_its_folder(name: str, constraint: str, tmp_path: Path) -> None:
    model = tuned(name, CONSTRAINTS[constraint])
    expected = log_probabilities(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(neox(), tmp_path)
    assert torch.equal(log_probabilities(again), expected)
    assert again.peft_config["default"].constraint == CONSTRAINTS[constraint]
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == f"CONSTRAINED_{METHODS[name].peft_type}"


@pytest.mark.parametrize("constraint", ["int4", "int8", "both", "learned"])
@pytest.mark.parametrize("name", ["lora", "some layers", "bitfit", "full"])
def test_merged_into_codes_it_is_the_one_that_was_trained(name: str, constraint: str, tmp_path: Path) -> None:
    model = tuned(name, CONSTRAINTS[constraint], torch.bfloat16)
    trained = log_probabilities(model)
    packed = model.merge_and_unload(requantize=True)
    names = {path for path, module in packed.named_modules() if type(module).__name__.startswith("LinearInt")}
    assert names == set(pruned_layers(neox()))
    assert largest_kl(trained, log_probabilities(packed)) <= 1e-6
    packed.save_pretrained(tmp_path)
    again, _ = slimtune.load(str(tmp_path))
    assert largest_kl(trained, log_probabilities(again)) <= 1e-6
    assert type(again.get_submodule(min(names))).__name__ == f"LinearInt{CONSTRAINTS[constraint].num_bits}"


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
def test_on_a_base_in_codes_a_merge_into_them_loses_nothing(scheme: str, tmp_path: Path) -> None:
    size = {"W4A16": 32, "W8A16": None}[scheme]
    base = slimtune.quantize_(neox(torch.bfloat16), slimtune.QuantizeConfig(scheme, method="rtn", group_size=size))
    untouched = copy.deepcopy(base)
    config = {"num_bits": int(scheme[1]), "group_size": size}
    model = get_peft_model(base, slimtune.LoraConfig(target_modules="all-linear", constraint=config))
    # An adapter that changes nothing yet has the very codes of the base.
    assert torch.equal(log_probabilities(model), log_probabilities(untouched))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    trained = log_probabilities(model)
    assert largest_kl(trained, log_probabilities(untouched)) > 1e-4
    packed = model.merge_and_unload(requantize=True)
    assert largest_kl(trained, log_probabilities(packed)) <= 1e-6
    packed.save_pretrained(tmp_path)
    assert largest_kl(trained, log_probabilities(slimtune.load(str(tmp_path))[0])) <= 1e-6


def test_a_step_of_learning_moves_what_is_trained_and_no_zero() -> None:
    model = tuned("lora", CONSTRAINTS["learned"])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert any(name.endswith("scales") for name in before)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_learned_scales_lessen_the_error_of_the_grid() -> None:
    """The slope of a scale is that of the rounding error between two codes."""
    torch.manual_seed(0)
    module = nn.Linear(32, 4, bias=False)
    site = Site("", module, base_of(module))
    held = Grid(site, 4, 32, learns=True)
    held.initialise(site)
    held.scales.data *= 1.5
    optimizer = torch.optim.Adam([held.scales], lr=1e-3)
    errors = []
    for _ in range(200):
        error = (held.hold(module.weight.detach(), module.weight) - module.weight.detach()).square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.7 * errors[0]


def test_the_gradient_of_a_scale_is_that_of_the_paper() -> None:
    """Esser et al. 2020, arXiv:1902.08153: sum of g dq/ds over a group of n, over sqrt(n q_max)."""
    torch.manual_seed(0)
    module = nn.Linear(32, 2, bias=False)
    site = Site("", module, base_of(module))
    held = Grid(site, 4, 32, learns=True)
    held.initialise(site)
    held.scales.data *= 0.8  # so that the largest weights lie beyond the codes
    weight = module.weight.detach()
    g = torch.randn_like(weight)
    held.hold(weight, module.weight).mul(g).sum().backward()
    scales, expected = held.scales.detach().to(torch.bfloat16).flatten().tolist(), torch.zeros(2)  # as they are stored
    for row in range(2):
        for w, slope in zip(weight[row].tolist(), g[row].tolist(), strict=True):
            ratio = w / scales[row]
            inside = -8 <= ratio <= 7
            expected[row] += slope * (round(ratio) - ratio if inside else min(max(round(ratio), -8), 7))
    torch.testing.assert_close(held.scales.grad.flatten(), expected / (32 * 7) ** 0.5, rtol=1e-4, atol=1e-5)


def test_a_base_with_other_zeros_is_refused(tmp_path: Path) -> None:
    tuned("lora", CONSTRAINTS["mask"]).save_pretrained(tmp_path)
    other = neox()
    layer = next(iter(pruned_layers(other).values()))
    layer.weight.data[0, (layer.weight[0] == 0).nonzero()[0]] = 1.0  # type: ignore[index, operator, union-attr]
    with pytest.raises(BaseMismatchError, match="trained with zeros that"):
        PeftModel.from_pretrained(other, tmp_path)


def test_it_stands_beside_no_other_adapter_on_a_layer() -> None:
    model = tuned("lora", CONSTRAINTS["mask"])
    model.add_adapter("plain", slimtune.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="can't be active together"):
        model.set_adapter(["default", "plain"])
    with pytest.raises(ConfigError, match="can't be active together"):
        model.set_adapter(["plain", "default"])
    held = log_probabilities(model)
    model.set_adapter("plain")
    free = log_probabilities(model)
    # Rows of one batch under each of them.
    with torch.no_grad():
        mixed = model(input_ids=ids(), adapter_names=["default", "plain", "default"]).logits.double().log_softmax(-1)
    torch.testing.assert_close(mixed[[0, 2]], held[[0, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], free[1], rtol=1e-5, atol=1e-5)


def test_a_convolution_keeps_its_zeros() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 3))
    base = zero_weights(base, [], WeightPruning(0.5, method="magnitude"))[0]
    zeros = {name: p == 0 for name, p in base.named_parameters()}
    model = get_peft_model(
        base, slimtune.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, constraint={"mask": True})
    )
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    expected.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert all(torch.equal(p == 0, zeros[name]) for name, p in merged.named_parameters() if p.ndim > 1)


def test_gpt2_merges_into_codes(tmp_path: Path) -> None:
    config = {"num_bits": 8}
    model = get_peft_model(GPT2.model(), slimtune.LoraConfig(r=2, init_lora_weights=False, constraint=config))
    expected = log_probabilities(model)
    packed = model.merge_and_unload(requantize=True)
    assert largest_kl(expected, log_probabilities(packed)) <= 1e-6
    assert sum(type(module).__name__ == "LinearInt8" for module in packed.modules()) == 8


def test_gpt2_keeps_its_zeros() -> None:
    base = zero_weights(GPT2.model(), [], WeightPruning(0.5, method="magnitude"))[0]
    before = {name: base_of(module).weight(module) == 0 for name, module in pruned_layers(base).items()}
    model = get_peft_model(base, slimtune.LoraConfig(r=2, init_lora_weights=False, constraint={"mask": True}))
    expected = log_probabilities(model)
    merged = model.merge_and_unload()
    assert largest_kl(expected, log_probabilities(merged)) <= 1e-6
    assert all(torch.equal(base_of(m).weight(m) == 0, before[n]) for n, m in pruned_layers(merged).items())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_bits": 3}, "num_bits must be 4 or 8, found 3"),
        ({"num_bits": 4, "group_size": 48}, "group_size must be one of 32, 64, 128, 256"),
        ({"num_bits": 8, "group_size": 64}, "8 bits have a scale a row"),
        ({"group_size": 64}, "is of 4 bits"),
        ({"learn_scales": True}, "learn_scales would change nothing"),
        ({"ignore": ["q_proj"]}, "ignore would change nothing"),
        ({"mask": 1}, "mask must be one of True, False"),
        ({"masks": True}, "has no field 'masks'"),
    ],
)
def test_values_that_can_not_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        slimtune.LoraConfig(constraint=fields)


def test_what_can_not_be_constrained() -> None:
    def attach(model: nn.Module, kind: type[Any] = slimtune.LoraConfig, **fields: Any) -> Any:
        return get_peft_model(model, kind(**fields))

    mask, int4 = {"mask": True}, {"num_bits": 4}
    with pytest.raises(ConfigError, match="the model has none; prune it first"):
        attach(LLAMA.model(), constraint=mask)
    with pytest.raises(ConfigError, match=r"leave those layers out with constraint\.ignore"):
        attach(LLAMA.model(), constraint=int4)
    with pytest.raises(ConfigError, match="lora_dropout has no place"):
        attach(neox(), constraint=mask, lora_dropout=0.1)
    with pytest.raises(ConfigError, match="EVA changes the ranks"):
        attach(neox(), constraint=mask, init_lora_weights="eva")
    attach(neox(), slimtune.BottleneckConfig, constraint=mask)  # which changes no weight
    quantized = slimtune.quantize_(neox(), slimtune.QuantizeConfig("W8A16"))
    with pytest.raises(ConfigError, match="stored as int8, and a constraint is one on weights in 16 or 32 bits"):
        attach(quantized, constraint=mask)
    with pytest.raises(ConfigError, match=r"on another grid .* int8; set constraint.num_bits=8"):
        attach(quantized, constraint={"num_bits": 4, "group_size": 32})
    left = attach(neox(), constraint={"num_bits": 4, "group_size": 32, "ignore": ["dense_4h_to_h"]})
    constrained = [path for path, module in left.named_modules() if isinstance(module, Constrained)]
    assert constrained
    assert not any("dense_4h_to_h" in path for path in constrained)


def test_adalora_shares_its_ranks_out() -> None:
    model = tuned("adalora", CONSTRAINTS["mask"]).train()
    for step in range(10):
        model(input_ids=ids(), labels=ids()).loss.backward()
        model.update_and_allocate(step)
        model.zero_grad()
    assert model.peft_config["default"].rank_pattern
    trained = log_probabilities(model.eval())
    assert largest_kl(trained, log_probabilities(model.merge_and_unload())) <= 1e-6


def test_plain_adapters_are_stored_as_ever(tmp_path: Path) -> None:
    tuned("lora", None).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "constraint" not in stored
    assert stored["peft_type"] == "LORA"


def test_peft_refuses_the_file(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tuned("lora", CONSTRAINTS["mask"]).save_pretrained(tmp_path)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(neox(), tmp_path)


def test_it_is_not_written_as_a_plain_lora(tmp_path: Path) -> None:
    tuned("vera", CONSTRAINTS["mask"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="merge it first"):
        convert_to_lora(tmp_path / "adapter", tmp_path / "lora")
