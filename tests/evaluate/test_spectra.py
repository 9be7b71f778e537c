"""Spectra of tuned models: every method through the general path, intruders scaled down, what can't be taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import slimtune
from slimtune.adapters.adapter import attached
from slimtune.errors import BaseMismatchError, ConfigError, OutputExistsError
from slimtune.evaluate.domain_texts import texts
from slimtune.evaluate.intruders.scale import scaled_change, scaled_weights, scalings
from slimtune.evaluate.intruders.spectra import Spectra, measure, similarity, updates_of
from slimtune.evaluate.intruders.svd import decompose
from slimtune.evaluate.intruders.trade_off import Yardsticks
from slimtune.evaluate.intruders.updates import Updates, adapter_updates, model_updates
from slimtune.evaluate.intruders.write import mitigate
from slimtune.evaluate.tuned import Tuned
from small_text_model import save_base, tiny_model, tiny_tokenizer

LINEAR = 14
"""Of the tiny model, two blocks of seven."""
FEW = texts(limit=3)


def tuned(config: Any, size: float = 0.3, model: Any = None) -> Any:
    """The tiny model with an adapter whose every number is drawn."""
    model = model or tiny_model()
    torch.manual_seed(1)
    model = slimtune.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def updates(model: Any, **options: Any) -> Updates:
    return adapter_updates(model, model.active_adapter, **options)


METHODS = {
    "lora": slimtune.LoraConfig(r=4),
    "rslora": slimtune.LoraConfig(r=4, use_rslora=True),
    "dora": slimtune.LoraConfig(r=4, use_dora=True),
    "pissa": slimtune.LoraConfig(r=4, init_lora_weights="pissa"),
    "loha": slimtune.LoHaConfig(r=4),
    "lokr": slimtune.LoKrConfig(r=4),
    "vera": slimtune.VeraConfig(r=4),
    "adalora": slimtune.AdaLoraConfig(target_r=2, init_r=4, total_step=10),
    "ia3": slimtune.IA3Config(),
    "full-difference": slimtune.FullConfig(),
    "full-whole": slimtune.FullConfig(store="whole"),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_has_the_spectrum_of_its_merged_model(method: str) -> None:
    model = tuned(METHODS[method], 0.05)
    apart = measure(updates(model))
    merged = measure(model_updates(tiny_model(), tuned(METHODS[method], 0.05).merge_and_unload()))
    assert [one.name for one in apart.matrices] == [one.name for one in merged.matrices]
    for one, other in zip(apart.matrices, merged.matrices, strict=True):
        assert one.shape == other.shape
        n = min(len(one.values), len(other.values))
        torch.testing.assert_close(one.values[:n], other.values[:n], rtol=1e-3, atol=2e-3)
        assert one.relative_norm == pytest.approx(other.relative_norm, rel=1e-3)
        assert [i.index for i in one.intruders] == [i.index for i in other.intruders]


def test_the_figures_of_a_lora() -> None:
    found = measure(updates(tuned(slimtune.LoraConfig(r=4))))
    assert len(found.matrices) == LINEAR
    assert found.left_out == []
    for one in found.matrices:
        assert len(one.values) == 4
        assert 1 <= one.stable_rank <= one.effective_rank <= 4
    (first, *_) = found.matrices
    assert (first.name, first.layer, first.kind, first.shape) == (
        "model.layers.0.self_attn.q_proj", 0, "q_proj", (64, 64)
    )  # fmt: skip
    assert found.to_dict()["intruders"] == sum(len(one.intruders) for one in found.matrices) > 0


def test_an_untrained_adapter_has_no_spectrum() -> None:
    found = measure(updates(slimtune.get_peft_model(tiny_model(), slimtune.LoraConfig())))
    assert found.intruders == 0
    assert all((o.effective_rank, o.stable_rank, o.relative_norm) == (0, 0, 0) for o in found.matrices)


def test_overlap_with_itself_and_with_another() -> None:
    model = tuned(slimtune.LoraConfig(r=4))
    same = measure(updates(model), against=updates(model))
    other = measure(updates(model), against=updates(tuned(slimtune.FullConfig(), 0.02)))
    for one in same.matrices:
        assert one.overlap is not None
        assert (one.overlap.left, one.overlap.right) == pytest.approx((1, 1), abs=1e-5)
        assert one.overlap.directions == 4
    for one in other.matrices:
        assert one.overlap is not None
        assert one.overlap.left < 0.5
    queries = tuned(slimtune.LoraConfig(r=4, target_modules=["q_proj"]))
    some = measure(updates(model), against=updates(queries))
    assert len(some.only_here) == LINEAR - 2
    assert sum(one.overlap is not None for one in some.matrices) == 2
    with pytest.raises(BaseMismatchError, match="same base"):
        measure(updates(model), against=updates(tuned(slimtune.LoraConfig(r=4), model=tiny_model(hidden_size=32))))


def test_a_quantized_base_is_what_its_codes_stand_for(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    quantized, _ = slimtune.load(str(folder), device="cpu", dtype="float32", quantize="nf4")
    found = measure(updates(tuned(slimtune.LoraConfig(r=4), model=quantized)))
    plain, _ = slimtune.load(str(folder), device="cpu", dtype="float32", quantize="nf4")
    plain = tuned(slimtune.LoraConfig(r=4), model=plain).merge_and_unload()
    expanded, _ = slimtune.load(str(folder), device="cpu", dtype="float32", quantize="nf4")
    expanded = slimtune.get_peft_model(expanded, slimtune.LoraConfig()).merge_and_unload()
    merged = measure(model_updates(expanded, plain))
    assert len(found.matrices) == LINEAR
    for one, other in zip(found.matrices, merged.matrices, strict=True):
        torch.testing.assert_close(one.values, other.values[:4], rtol=1e-3, atol=1e-3)
        assert [i.index for i in one.intruders] == [i.index for i in other.intruders]


def test_weights_that_lie_the_other_way_round() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    before = transformers.GPT2LMHeadModel(config).eval()
    after = transformers.GPT2LMHeadModel(config).eval()
    after.load_state_dict(before.state_dict())
    new = torch.zeros(48)
    new[-1] = 1.0
    with torch.no_grad():
        after.transformer.h[0].attn.c_attn.weight += 100 * torch.outer(torch.randn(16), new)
    (one,) = measure(model_updates(before, after)).matrices
    assert one.shape == (48, 16)
    assert one.effective_rank == pytest.approx(1, abs=1e-3)
    (matrix,) = model_updates(before, after).matrices
    left = decompose(matrix.read().after).left[:, 0]
    assert abs(float(left @ new)) > 0.99


def test_experts_are_matrices_of_their_own() -> None:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    found = measure(updates(tuned(slimtune.LoraConfig(r=2, target_parameters=["experts.down_proj"]), model=model)))
    assert [one.name for one in found.matrices] == [f"model.layers.0.mlp.experts.down_proj[{e}]" for e in range(3)]
    assert all(one.effective_rank <= 2.001 for one in found.matrices)


def test_embeddings_and_heads_only_when_asked() -> None:
    model = tuned(slimtune.LoraConfig(r=4, modules_to_save=["lm_head", "embed_tokens"]), 0.05)
    found = measure(updates(model))
    assert sorted(found.left_out) == ["lm_head", "model.embed_tokens"]
    assert len(found.matrices) == LINEAR
    assert len(measure(updates(model, embeddings=True)).matrices) == LINEAR + 2
    with pytest.raises(ConfigError, match="--embeddings"):
        updates(tuned(slimtune.LoraConfig(r=4, target_modules=["lm_head"])))


@pytest.mark.parametrize(
    "config",
    [
        slimtune.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        slimtune.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        slimtune.BottleneckConfig(),
        slimtune.LNTuningConfig(),
        slimtune.BitFitConfig(add_bias=True),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_methods_that_change_no_matrix_say_so(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"no update to take apart.*slimtune forgetting"):
        updates(tuned(config))


def test_models_that_are_equal_or_strangers() -> None:
    with pytest.raises(ConfigError, match="changes no weight matrix"):
        model_updates(tiny_model(), tiny_model())
    with pytest.raises(BaseMismatchError, match="--base"):
        model_updates(tiny_model(hidden_size=32), tiny_model())


def test_the_similarity_of_nothing_changed_is_the_identity() -> None:
    model = slimtune.get_peft_model(tiny_model(), slimtune.LoraConfig(r=4))
    (matrix, *_) = updates(model).matrices
    torch.testing.assert_close(similarity(matrix, 8), torch.eye(8), rtol=0, atol=1e-3)


def test_scaling_changes_the_intruders_and_nothing_else() -> None:
    weight = torch.randn(30, 20)
    whole = decompose(weight)
    b, a = scaled_change(whole, [0, 3], 0.25)
    again = torch.linalg.svdvals(weight + b @ a)
    expected = whole.values.clone()
    expected[[0, 3]] *= 0.25
    torch.testing.assert_close(again, expected.sort(descending=True).values, rtol=1e-4, atol=1e-4)
    same_b, same_a = scaled_change(whole, [0, 3], 1.0)
    assert not (same_b @ same_a).any()


# What is written ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


def saved(base: Path, folder: Path, config: Any) -> Tuned:
    model, tokenizer = slimtune.load(str(base), device="cpu")
    tuned(config, model=model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Tuned.find(str(folder), device="cpu")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


def expected_logits(what: Tuned, factor: float) -> tuple[torch.Tensor, Spectra]:
    """By hand: the merged model with its weights replaced."""
    found = measure(updates_of(what))
    weights = scaled_weights(scalings(updates_of(what), found, factor))
    model = what.load()[0].merge_and_unload() if what.is_adapter else what.load()[0]
    for path, weight in weights.items():
        model.get_submodule(path).weight.data.copy_(weight)
    return logits(model), found


LORAS = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "high": {"r": 30, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_stays_one_and_is_exact(base: Path, tmp_path: Path, name: str) -> None:
    what = saved(base, tmp_path / "a", slimtune.LoraConfig(task_type="CAUSAL_LM", **LORAS[name]))
    done = mitigate(what, 0.3, tmp_path / "scaled", Yardsticks(FEW))
    expected, found = expected_logits(what, 0.3)
    assert (done.kind, done.count) == ("adapter", found.intruders)
    assert done.left <= done.count
    again, _ = slimtune.load(str(tmp_path / "scaled"), device="cpu")
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-3)
    assert {site.name for site, _ in attached(again, "default")} == {
        site.name for site, _ in attached(what.load()[0], "default")
    }
    merged = mitigate(what, 0.3, tmp_path / "merged", Yardsticks(FEW), as_model=True)
    assert merged.kind == "model"
    plain, _ = slimtune.load(str(tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-3, atol=1e-3)
    assert done.outside is not None
    assert merged.outside is not None
    assert done.outside.scaled.difference == pytest.approx(merged.outside.scaled.difference, abs=1e-3)


def test_losses_are_those_of_what_was_written(base: Path, tmp_path: Path) -> None:
    from slimtune.evaluate.forgetting import measure as forgetting

    what = saved(base, tmp_path / "a", slimtune.LoraConfig(r=4, task_type="CAUSAL_LM"))
    done = mitigate(what, 0.5, tmp_path / "scaled", Yardsticks(FEW, {"mine": ["two large lattes for Maria"]}))
    assert done.outside is not None
    assert done.task is not None
    again = forgetting(Tuned.find(str(tmp_path / "scaled"), device="cpu"), FEW)
    assert again.difference == pytest.approx(done.outside.scaled.difference, abs=1e-5)
    assert forgetting(what, FEW).difference == pytest.approx(done.outside.tuned.difference, abs=1e-5)
    steps = done.outside.scaled.difference - done.outside.tuned.difference
    assert done.outside.change.difference == pytest.approx(steps, abs=1e-9)
    assert done.task.change.domains["mine"].before == done.task.tuned.domains["mine"].after


def test_dora_and_whole_models_become_plain_models(base: Path, tmp_path: Path) -> None:
    what = saved(base, tmp_path / "dora", slimtune.LoraConfig(r=4, use_dora=True, task_type="CAUSAL_LM"))
    done = mitigate(what, 0.5, tmp_path / "dora-scaled", Yardsticks(FEW))
    assert (done.kind, done.why_model) == ("model", "DoRA has no form for it")
    expected, _ = expected_logits(what, 0.5)
    torch.testing.assert_close(
        logits(slimtune.load(str(tmp_path / "dora-scaled"), device="cpu")[0]), expected, rtol=1e-3, atol=1e-3
    )
    whole = tmp_path / "whole"
    what.load()[0].merge_and_unload().save_pretrained(whole)
    tiny_tokenizer().save_pretrained(whole)
    full = mitigate(Tuned.find(str(whole), str(base), device="cpu"), 0.5, tmp_path / "whole-scaled", Yardsticks(FEW))
    assert full.count == done.count
    torch.testing.assert_close(
        logits(slimtune.load(str(tmp_path / "whole-scaled"), device="cpu")[0]), expected, rtol=1e-3, atol=1e-3
    )


def test_nothing_to_scale_writes_nothing(base: Path, tmp_path: Path) -> None:
    what = saved(base, tmp_path / "a", slimtune.LoraConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match=r"no intruder dimensions.*raise --epsilon"):
        mitigate(what, 0.5, tmp_path / "scaled", Yardsticks(FEW), epsilon=0.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    with pytest.raises(OutputExistsError):
        mitigate(what, 0.5, tmp_path / "a", Yardsticks(FEW))
