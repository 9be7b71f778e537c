"""Single weights left out: exactly as many as asked, where the method's paper says, and nothing else changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from slimtune.bases import base_of
from slimtune.cli import app
from slimtune.errors import ConfigError, DataError
from slimtune.slim.gptq import inverse_factor
from slimtune.slim.prune import PruneConfig, prune
from slimtune.slim.sparsegpt import sparsegpt
from slimtune.slim.sparsity import PATTERNS
from slimtune.slim.weights import WeightPruning, pruned_layers, zero_weights
from small_text_model import orders, save_base, write_lines
from zoo import BERT, GPT2, GPT_NEOX, LLAMA, TIED_LLAMA, VIT, Specimen

ANY = [LLAMA, TIED_LLAMA, GPT2, GPT_NEOX, BERT, VIT]
METHODS = ("magnitude", "wanda", "sparsegpt")


def batches(specimen: Specimen) -> list[dict[str, Tensor]]:
    return [{name: value for name, value in specimen.batch().items() if name != "labels"}]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: base_of(module).weight(module).detach() for name, module in pruned_layers(model).items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("specimen", ANY, ids=lambda s: s.name)
def test_so_many_are_zero_and_nothing_else_is_touched(specimen: Specimen, method: str) -> None:
    model = specimen.model()
    before = copy.deepcopy(model.state_dict())
    sparse, report = prune(model, PruneConfig(weights=WeightPruning(0.4, method=method)), batches(specimen))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layers = weights(sparse)
    for name, weight in layers.items():
        rows = method == "wanda"
        expected = weight.shape[0] * round(0.4 * weight.shape[1]) if rows else round(0.4 * weight.numel())
        assert int((weight == 0).sum()) == expected, name
        if rows:
            assert set((weight == 0).sum(1).tolist()) == {round(0.4 * weight.shape[1])}
    pruned = {f"{name}.weight" for name in layers}
    assert all(torch.equal(t, before[n]) for n, t in sparse.state_dict().items() if n not in pruned)
    if method != "sparsegpt":
        for name, weight in layers.items():
            own = weights(model)[name]
            assert torch.equal(weight[weight != 0], own[weight != 0])
    facts = report.done["weights"]
    assert facts["zeros"] == sum(int((weight == 0).sum()) for weight in layers.values())
    assert facts["value_bytes"] == 4 * (facts["weights"] - facts["zeros"])
    assert facts["index_bytes"] == -(-facts["weights"] // 8)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("specimen", [LLAMA, GPT2, BERT], ids=lambda s: s.name)
def test_a_pattern_holds_in_each_group_along_the_input(specimen: Specimen, method: str, pattern: str) -> None:
    sparse, _ = zero_weights(specimen.model(), batches(specimen), WeightPruning(pattern=pattern, method=method))
    kept, group = map(int, pattern.split(":"))
    for weight in weights(sparse).values():
        assert bool(((weight.reshape(-1, group) != 0).sum(1) == kept).all())


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_wanda_on_inputs_that_are_all_alike_is_magnitude(scope: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    flat = [{"input": torch.ones(3, 16)}]
    config = {"sparsity": 0.5, "scope": scope}
    by_wanda, _ = zero_weights(model, flat, WeightPruning(**config, method="wanda"))
    by_magnitude, _ = zero_weights(model, [], WeightPruning(**config, method="magnitude"))
    assert torch.equal(weights(by_wanda)["0"], weights(by_magnitude)["0"])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_with_inputs_that_tell_nothing_of_each_other_is_magnitude(pattern: str) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 24))
    got = sparsegpt(
        layer[0].weight, inverse_factor(torch.eye(64)), torch.zeros(64, dtype=torch.bool), 0.5, PATTERNS[pattern]
    )
    config = WeightPruning(None if PATTERNS[pattern] else 0.5, pattern, "magnitude")
    expected, _ = zero_weights(layer, [], config)
    assert torch.equal(got, weights(expected)["0"])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_on_the_calibrated_inputs_the_better_method_loses_less(pattern: str) -> None:
    torch.manual_seed(0)
    # 160 inputs, more than SparseGPT takes at once, some far larger than others and all of a few directions.
    x_TI = (torch.randn(400, 40) @ torch.randn(40, 160) + 0.3 * torch.randn(400, 160)) * torch.rand(160).exp2().pow(3)
    layer = nn.Sequential(nn.Linear(160, 48))
    lost = {}
    for method in METHODS:
        config = WeightPruning(None if PATTERNS[pattern] else 0.5, pattern, method)
        sparse, _ = zero_weights(layer, [{"input": x_TI}], config)
        lost[method] = float((sparse(x_TI) - layer(x_TI)).detach().norm())
    assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"]


def test_inputs_that_never_come_go_first() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 6, bias=False))
    x = torch.randn(50, 16)
    x[:, :8] = 0
    for method in ("wanda", "sparsegpt"):
        sparse, _ = zero_weights(layer, [{"input": x}], WeightPruning(0.5, method=method))
        torch.testing.assert_close(sparse(x), layer(x))


def test_a_share_of_the_whole_model_takes_more_where_weights_are_small() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight.data *= 0.1
    sparse, facts = zero_weights(model, [], WeightPruning(0.5, method="magnitude", scope="global"))
    first, second = ((weight == 0).float().mean() for weight in weights(sparse).values())
    assert facts["zeros"] == 256
    assert first < 0.2 < 0.8 < second


def test_equal_weights_are_counted_too() -> None:
    model = nn.Sequential(nn.Linear(10, 10))
    model[0].weight.data.fill_(1.0)
    for scope in ("matrix", "row", "global"):
        _, facts = zero_weights(model, [], WeightPruning(0.3, method="magnitude", scope=scope))
        assert facts["zeros"] == 30


def test_a_convolutional_network_is_pruned_by_magnitude() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 2))
    sparse, facts = zero_weights(model, [], WeightPruning(0.8, method="magnitude"))
    assert facts["layers"] == 2
    assert facts["zeros"] == round(0.8 * 3 * 8 * 9) + round(0.8 * 64)
    assert torch.equal(sparse[0].weight == 0, sparse[0].weight.abs() == 0)
    with pytest.raises(ConfigError, match="'0' is a convolution"):
        zero_weights(model, [{"input": torch.zeros(1, 3, 6, 4)}], WeightPruning(0.8))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sparsity": 0.0}, "between 0 and 1, found 0"),
        ({"sparsity": 1.0}, r"in \[0, 1\), found 1.0"),
        ({"sparsity": -0.1}, r"in \[0, 1\)"),
        ({}, "give one, as 0.5"),
        ({"pattern": "2:5"}, "must be one of unstructured, 2:4, 4:8"),
        ({"pattern": "2:4", "sparsity": 0.6}, "has a sparsity of 0.5"),
        ({"pattern": "2:4", "scope": "row"}, "scope would change nothing"),
        ({"sparsity": 0.5, "method": "wander"}, "did you mean 'wanda'"),
        ({"sparsity": 0.5, "method": "wanda", "scope": "global"}, "scope must be one of None, row, matrix"),
        ({"sparsity": 0.5, "ignore": "q_proj"}, "list of module names"),
    ],
)
def test_values_that_can_not_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        WeightPruning(**fields)


def test_models_that_can_not_be_pruned_so() -> None:
    model = LLAMA.model()
    with pytest.raises(DataError, match="pass batches, or method='magnitude'"):
        zero_weights(model, [], WeightPruning(0.5))
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        zero_weights(model, [], WeightPruning(0.5, method="magnitude", ignore=["q_prj"]))
    sparse, _ = zero_weights(model, [], WeightPruning(0.5, method="magnitude"))
    with pytest.raises(ConfigError, match=r"50.0% of the weights are zero already"):
        zero_weights(sparse, [], WeightPruning(0.5, method="magnitude"))
    sparser, facts = zero_weights(sparse, [], WeightPruning(0.7, method="magnitude"))
    assert facts["sparsity"] == pytest.approx(0.7, abs=0.001)
    assert all(bool((weights(sparser)[n][weight == 0] == 0).all()) for n, weight in weights(sparse).items())
    odd = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ConfigError, match="needs inputs divisible by 4, and 0 has 6"):
        zero_weights(odd, [], WeightPruning(pattern="2:4", method="magnitude"))
    with pytest.raises(ConfigError, match="no linear or convolution layer"):
        zero_weights(nn.Embedding(4, 4), [], WeightPruning(0.5, method="magnitude"))
    broken = nn.Sequential(nn.Linear(8, 8))
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(ConfigError, match="are not finite"):
            zero_weights(broken, [{"input": torch.full((2, 8), torch.nan)}], WeightPruning(0.5, method=method))


def test_a_quantized_base_is_refused() -> None:
    from slimtune.slim.quantize import QuantizeConfig, quantize_

    model = quantize_(LLAMA.model(), QuantizeConfig("W8A16"))
    with pytest.raises(ConfigError, match="weights in few bits can't be pruned"):
        prune(model, PruneConfig(weights=WeightPruning(0.5, method="magnitude")), [])


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_a_plain_model_with_zeros(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    rows = write_lines(tmp_path / "rows.jsonl", *({"messages": e.messages()} for e in orders(16)))
    arguments = ["--pattern", "2:4", "--method", "sparsegpt", "--ignore", "down_proj", "--data", rows]
    result = run("prune", base, "-o", tmp_path / "out", *arguments, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)["done"]["weights"]
    assert (facts["sparsity"], facts["pattern"], facts["method"]) == (0.5, "2:4", "sparsegpt")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in weights(model).items():
        zeros = (weight.view(-1, 4) == 0).sum(1)
        assert bool((zeros == 2).all()) != name.endswith("down_proj"), name
    assert "50.0% of" in run("prune", base, "-o", tmp_path / "more", "--sparsity", 0.5, "--data", rows).output
    idle = run("prune", base, "-o", tmp_path / "no", "--sparsity", 0.5, "--method", "magnitude", "--data", rows)
    assert idle.exit_code == 2
    assert "--data would change nothing" in " ".join(idle.output.split())
    short = write_lines(tmp_path / "short.jsonl", {"text": "too little"})
    refused = run("prune", base, "-o", tmp_path / "no", "--sparsity", 0.5, "--data", short)
    assert refused.exit_code == 2
    assert "tokens to calibrate on" in " ".join(refused.output.split())
    assert not (tmp_path / "no").exists()
