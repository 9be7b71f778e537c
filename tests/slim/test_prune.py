"""Structured pruning: what is left is what was there, in every architecture, and loads as any model."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner, Result

from slimtune.cli import app
from slimtune.errors import ConfigError, DataError, MissingDependencyError
from slimtune.models.load import load_model
from slimtune.slim.prune import KINDS, PruneConfig, calibration, prune
from slimtune.slim.structure import Structure, importance
from slimtune.slim.weights import WeightPruning
from small_text_model import orders, save_base, tiny_model, write_lines
from zoo import BERT, GEMMA3, GPT2, GPT_NEOX, LLAMA, QWEN2, T5, TIED_LLAMA, VIT, VOCABULARY, Specimen, causal_batch

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
MISTRAL = Specimen("mistral", lambda: MistralForCausalLM(MistralConfig(**SMALL, head_dim=8)), causal_batch)
QWEN3 = Specimen("qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)), causal_batch)
PHI3 = Specimen("phi3", lambda: Phi3ForCausalLM(Phi3Config(**SMALL)), causal_batch)
ANY = [LLAMA, TIED_LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA3, PHI3, GPT2, GPT_NEOX, BERT, VIT]
GROUPED = [TIED_LLAMA, QWEN3, MISTRAL]


def batches(specimen: Specimen) -> list[dict[str, Tensor]]:
    return [{name: value for name, value in specimen.batch().items() if name != "labels"}]


def answer(model: Any, specimen: Specimen) -> Tensor:
    with torch.no_grad():
        return model(**batches(specimen)[0])[0]


def reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("specimen", ANY, ids=lambda s: s.name)
def test_without_the_least_neurons_it_computes_what_zeros_in_their_place_would(
    specimen: Specimen, tmp_path: Path
) -> None:
    model = specimen.model()
    smaller, report = prune(model, PruneConfig(ffn=0.5), batches(specimen))
    structure = Structure.of(model)
    zeroed = copy.deepcopy(model)
    for block, scores in zip(
        structure.blocks, importance(structure, batches(specimen), "feed_forward_out"), strict=True
    ):
        left = report.done["ffn"]["feed-forward neurons"]
        gone = scores.topk(len(scores) - left, largest=False).indices
        layer = zeroed.get_submodule(structure.only(block, "feed_forward_out"))
        (layer.weight.data if hasattr(layer, "nf") else layer.weight.data.T)[gone] = 0
    again = reloaded(smaller, tmp_path)
    torch.testing.assert_close(answer(again, specimen), answer(zeroed, specimen), rtol=1e-4, atol=1e-5)
    assert report.parameters < report.parameters_before


@pytest.mark.parametrize("specimen", ANY, ids=lambda s: s.name)
def test_without_a_layer_it_computes_what_skipping_it_would(specimen: Specimen, tmp_path: Path) -> None:
    model = specimen.model()
    smaller, report = prune(model, PruneConfig(layers=1), batches(specimen))
    structure = Structure.of(model)
    (gone,) = report.done["layers"]["left out"]
    block = structure.blocks[gone].module
    plain = answer(model, specimen)

    def skip(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    block.register_forward_hook(skip, with_kwargs=True)
    again = reloaded(smaller, tmp_path)
    torch.testing.assert_close(answer(again, specimen), answer(model, specimen), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answer(again, specimen), plain)
    assert min(report.done["layers"]["block_influence"]) == report.done["layers"]["block_influence"][gone]


@pytest.mark.parametrize("specimen", GROUPED, ids=lambda s: s.name)
def test_without_a_group_of_heads_it_computes_what_zeros_in_their_place_would(
    specimen: Specimen, tmp_path: Path
) -> None:
    model = specimen.model()
    smaller, _ = prune(model, PruneConfig(kv_heads=1), batches(specimen))
    structure, zeroed = Structure.of(model), copy.deepcopy(model)
    groups = model.config.num_key_value_heads
    for block, scores in zip(structure.blocks, importance(structure, batches(specimen), "attention_out"), strict=True):
        width = len(scores) // groups
        left = int(scores.reshape(groups, width).square().sum(-1).argmax())
        weight = zeroed.get_submodule(structure.only(block, "attention_out")).weight.data
        kept = weight[:, left * width : (left + 1) * width].clone()
        weight.zero_()
        weight[:, left * width : (left + 1) * width] = kept
    again = reloaded(smaller, tmp_path)
    assert again.config.num_key_value_heads == 1
    torch.testing.assert_close(answer(again, specimen), answer(zeroed, specimen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("specimen", "config", "said"),
    [
        (LLAMA, {"layers": 2}, "from 1 to 1 of this model's 2"),
        (LLAMA, {"layers": 0}, "from 1 to 1"),
        (LLAMA, {"ffn": 1.0}, "between 0 and 1"),
        (LLAMA, {"ffn": 0.0}, "between 0 and 1"),
        (TIED_LLAMA, {"kv_heads": 2}, "of this model's 2"),
        (GPT2, {"kv_heads": 1}, "its config can't say that there are fewer"),
        (BERT, {"kv_heads": 1}, "its config can't say that there are fewer"),
        (T5, {"layers": 1}, "2 lists of layers"),
    ],
)
def test_what_is_refused(specimen: Specimen, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prune(specimen.model(), PruneConfig(**config), batches(specimen))
    with pytest.raises(ConfigError, match="nothing was said"):
        PruneConfig()


def test_every_field_of_the_config_has_its_kind() -> None:
    assert set(KINDS) == set(PruneConfig.__dataclass_fields__)


class Network(nn.Module):
    """Two convolutions beside each other, added up, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.norm(self.first(pixels)).relu()
        return self.head((x + self.second(x)).mean((2, 3)))


def test_channels_go_with_all_that_depends_on_them() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    network, batch = Network().eval(), {"pixels": torch.randn(2, 3, 8, 8)}
    smaller, report = prune(network, PruneConfig(channels=0.5), [batch])
    assert report.done["channels"] == {"channels": 16, "of": 32}
    assert (smaller.first.out_channels, smaller.second.in_channels, smaller.head.in_features) == (8, 8, 8)
    assert smaller(**batch).shape == (2, 5)
    assert network.first.out_channels == 16


@pytest.mark.parametrize(("share", "said"), [(0.0, "between 0 and 1"), (1.5, "between 0 and 1"), (True, "between")])
def test_a_share_of_channels_out_of_range(share: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prune(Network(), PruneConfig(channels=share), [{"pixels": torch.randn(2, 3, 8, 8)}])


def test_what_loses_no_channels() -> None:
    with pytest.raises(ConfigError, match="0 convolutions, and channels are those between several"):
        prune(LLAMA.model(), PruneConfig(channels=0.5), batches(LLAMA))
    with pytest.raises(DataError, match="traced with a batch"):
        prune(Network(), PruneConfig(channels=0.5), [])


def test_without_torch_pruning_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingDependencyError, match=r"slimtune\[pruning\]"):
        prune(Network(), PruneConfig(channels=0.5), [{"pixels": torch.randn(2, 3, 8, 8)}])


@pytest.mark.soak
def test_minilm_loses_layers_neurons_and_weights() -> None:
    model, tokenizer = load_model("minilm-l6-v2", None)
    texts = calibration(model, tokenizer)[:6]

    def embedded(of: Any) -> Tensor:
        with torch.no_grad():
            return torch.stack([of(**text)[0].mean(1)[0] for text in texts])

    before, alike = embedded(model), {}
    for name, config in {
        "layers": PruneConfig(layers=5),
        "ffn": PruneConfig(ffn=0.75),
        **{method: PruneConfig(weights=WeightPruning(0.5, method=method)) for method in ("magnitude", "wanda")},
    }.items():
        smaller, _ = prune(model, config, texts)
        alike[name] = float(torch.cosine_similarity(embedded(smaller), before).mean())
    assert min(alike["layers"], alike["ffn"]) > 0.8
    assert alike["magnitude"] < alike["wanda"]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_a_plain_model_and_distill_recovers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = save_base(tmp_path / "base", num_hidden_layers=3, intermediate_size=128)
    rows = write_lines(tmp_path / "rows.jsonl", *({"messages": e.messages()} for e in orders(16)))
    pruned = tmp_path / "pruned"
    result = run("prune", base, "-o", pruned, "--layers", 2, "--ffn", 0.75, "--kv-heads", 1, "--data", rows, "--json")
    assert result.exit_code == 0, result.output
    config = json.loads((pruned / "config.json").read_text())
    assert [config[n] for n in ("num_hidden_layers", "intermediate_size", "num_key_value_heads")] == [2, 96, 1]
    assert (
        json.loads((pruned / "slim_report.json").read_text())["parameters"] == json.loads(result.stdout)["parameters"]
    )
    assert "already holds" in run("prune", base, "-o", pruned, "--layers", 2).output
    out = tmp_path / "out"
    more = ["--method", "full", "--lr", 0.002, "--max-steps", 20, "--alpha", 1, "--no-plan", "--batch-size", 4]
    result = run("distill", base, pruned, "--data", rows, "-o", out, *more)
    assert result.exit_code == 0, result.output
    losses = [json.loads(line)["loss"] for line in (out / "loss.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2


def test_an_encoder_folder_is_pruned_by_the_shipped_texts(tmp_path: Path) -> None:
    from small_encoder import save_encoder

    save_encoder(tmp_path / "base", num_hidden_layers=3, max_position_embeddings=128)
    result = run("prune", tmp_path / "base", "-o", tmp_path / "out", "--layers", 1)
    assert result.exit_code == 0, result.output
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_hidden_layers == 1


def test_weights_that_an_adapter_or_few_bits_hold_are_refused() -> None:
    from slimtune import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig())
    with pytest.raises(ConfigError, match="merge it first"):
        prune(model, PruneConfig(layers=1), [])
