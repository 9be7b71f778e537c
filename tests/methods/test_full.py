"""Full tuning as an adapter: everything is trained, what is tied stays tied, and the base comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import slimtune
from slimtune.errors import ConfigError, TargetError
from tensors import (
    adapter_tensors,
    assert_all_near,
    assert_near,
    assert_same,
    copies,
    loss_of,
    predict,
    randomize,
    trainable,
)
from zoo import GPT2, LLAMA, SPECIMENS, T5, TIED_LLAMA, VIT, Specimen

STORES = ("difference", "whole")
each_store = pytest.mark.parametrize("store", STORES)
each_specimen = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)


def attach(specimen: Specimen, store: str = "difference", **options: Any) -> Any:
    return slimtune.get_peft_model(specimen.model(), slimtune.FullConfig(store=store, **options))


def tuned(specimen: Specimen, store: str = "difference", seed: int = 2, **options: Any) -> Any:
    return randomize(slimtune, attach(specimen, store, **options), seed=seed).eval()


@each_store
@each_specimen
def test_every_parameter_of_the_base_is_trained_once(specimen: Specimen, store: str) -> None:
    model = attach(specimen, store)
    base = sum(parameter.numel() for parameter in specimen.model().parameters())
    assert model.get_nb_trainable_parameters() == (base, 2 * base)


@each_store
@each_specimen
def test_steps_are_those_of_plain_full_tuning(specimen: Specimen, store: str) -> None:
    model, plain = attach(specimen, store).double().train(), specimen.model().double().train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in specimen.batch().items()}
    for trained in (model, plain):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(trained, batch).backward()
            optimizer.step()
    merged = model.merge_and_unload()
    # Causal models compute their loss in float32.
    assert_all_near(copies(dict(merged.named_parameters())), copies(dict(plain.named_parameters())), 1e-5)


@each_store
@pytest.mark.parametrize("specimen", [TIED_LLAMA, T5, GPT2], ids=lambda specimen: specimen.name)
def test_tied_weights_stay_tied_through_save_load_and_merge(specimen: Specimen, store: str, tmp_path: Path) -> None:
    model = tuned(specimen, store)
    expected = predict(model, specimen.batch())
    model.save_pretrained(tmp_path / "adapter")
    stored = sum(tensor.numel() for tensor in adapter_tensors(slimtune, model).values())
    assert stored == sum(parameter.numel() for parameter in specimen.model().parameters())
    reread = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path / "adapter")
    assert torch.equal(predict(reread, specimen.batch()), expected)
    merged = reread.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert len(list(merged.parameters())) == len(list(specimen.model().parameters()))
    merged.save_pretrained(tmp_path / "merged")
    plain = type(specimen.model()).from_pretrained(tmp_path / "merged").eval()
    assert_near(predict(plain, specimen.batch()), expected)
    assert plain.config.tie_word_embeddings is True


@pytest.mark.parametrize("name", ["embeddings.cls_token", "embeddings.position_embeddings"])
def test_a_parameter_without_a_layer_of_its_own_is_trained(name: str) -> None:
    model = attach(VIT).train()
    loss_of(model, VIT.batch()).backward()
    module, _, parameter = name.rpartition(".")
    delta = model.vit.get_submodule(module).deltas["default"]
    assert delta.difference[parameter].grad.any()


class Scaled(nn.Module):
    """A model whose root has a parameter, and statistics that training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.scale


@each_store
def test_the_root_s_own_parameters_and_running_statistics_belong_to_the_adapter(store: str, tmp_path: Path) -> None:
    base, x = Scaled(), torch.randn(8, 3) + 5
    expected = base.eval()(x)
    model = slimtune.get_peft_model(base, slimtune.FullConfig(store=store)).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
    (model(x) - 1).square().sum().backward()
    optimizer.step()
    changed = model.eval()(x)
    assert (changed - expected).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.save_pretrained(tmp_path)
    reread = slimtune.PeftModel.from_pretrained(Scaled(), tmp_path)
    assert torch.equal(reread(x), changed)
    assert_near(reread.merge_and_unload()(x), changed)


@each_store
def test_a_named_module_means_everything_inside_of_it(store: str, tmp_path: Path) -> None:
    model = tuned(LLAMA, store, target_modules=["mlp"], exclude_modules=["layers.0.mlp"])
    modules = {name.partition(".deltas.")[0] for name in trainable(model)}
    assert modules == {f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    model.save_pretrained(tmp_path)
    reread = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
    assert_same(adapter_tensors(slimtune, reread), adapter_tensors(slimtune, model))


def test_narrowed_to_one_end_of_a_tie_the_other_stays() -> None:
    model = tuned(TIED_LLAMA, target_modules=["lm_head"])
    before = TIED_LLAMA.model().get_input_embeddings().weight
    unmerged = predict(model, TIED_LLAMA.batch())
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert merged.config.tie_word_embeddings is False
    assert_near(predict(merged, TIED_LLAMA.batch()), unmerged)


def test_a_difference_is_float32_on_a_16_bit_base_and_merges_to_the_bit() -> None:
    model = slimtune.get_peft_model(LLAMA.model().bfloat16(), slimtune.FullConfig())
    randomize(slimtune, model)
    assert {tensor.dtype for tensor in adapter_tensors(slimtune, model).values()} == {torch.float32}
    unmerged = predict(model, LLAMA.batch())
    assert unmerged.dtype == torch.bfloat16
    assert torch.equal(predict(model.merge_and_unload(), LLAMA.batch()), unmerged)


def test_a_copy_has_the_dtype_of_the_base() -> None:
    model = slimtune.get_peft_model(LLAMA.model().bfloat16(), slimtune.FullConfig(store="whole"))
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.bfloat16}


def two(specimen: Specimen, store: str = "difference") -> Any:
    model = tuned(specimen, store)
    model.add_adapter("other", slimtune.FullConfig(store=store))
    return randomize(slimtune, model, "other", seed=5)


def test_the_head_is_stored_whole_for_a_base_that_comes_with_another_draw_of_it(tmp_path: Any) -> None:
    model = tuned(VIT)
    model.save_pretrained(tmp_path)
    base = VIT.model()
    torch.nn.init.normal_(base.classifier.weight)
    reread = slimtune.PeftModel.from_pretrained(base, tmp_path)
    assert_near(predict(reread, VIT.batch()), predict(model, VIT.batch()))


@pytest.mark.parametrize("specimen", [TIED_LLAMA, T5], ids=lambda specimen: specimen.name)
def test_differences_are_task_vectors(specimen: Specimen) -> None:
    """Arithmetic on what was learned: theta = theta_0 + 0.5 tau_1 - 0.25 tau_2."""
    model = two(specimen)
    model.add_weighted_adapter(["default", "other"], [0.5, -0.25], "mixed")
    own, one, other = (
        dict(specimen.model().named_parameters()),
        *(copies(dict(adapted.named_parameters())) for adapted in (merged(specimen, 2), merged(specimen, 5))),
    )
    model.set_adapter("mixed")
    expected = {name: p + 0.5 * (one[name] - p) - 0.25 * (other[name] - p) for name, p in own.items()}
    assert_all_near(copies(dict(model.merge_and_unload().named_parameters())), copies(expected), 1e-5)


def merged(specimen: Specimen, seed: int) -> Any:
    return tuned(specimen, seed=seed).merge_and_unload()


def test_active_differences_add_up() -> None:
    model = two(TIED_LLAMA)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear")
    model.set_adapter(["default", "other"])
    together = predict(model, TIED_LLAMA.batch())
    model.set_adapter("sum")
    assert_near(predict(model, TIED_LLAMA.batch()), together)


@each_store
def test_rows_of_one_batch_can_not_have_weights_of_their_own(store: str) -> None:
    """T5's position bias is looked up once for all rows."""
    model = two(T5, store)
    batch = {"input_ids": T5.batch()["input_ids"], "decoder_input_ids": T5.batch()["labels"]}
    with pytest.raises(ConfigError, match="a batch of their own"):
        model(**batch, adapter_names=["default", "other"])


def test_copies_neither_add_up_nor_work_together() -> None:
    model = two(LLAMA, "whole")
    with pytest.raises(ConfigError, match="store='difference'"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    with pytest.raises(ConfigError, match="can't be active together"):
        model.set_adapter(["default", "other"])


def test_differences_of_other_modules_do_not_combine() -> None:
    model = tuned(LLAMA, target_modules=["mlp"])
    model.add_adapter("other", slimtune.FullConfig())
    with pytest.raises(ConfigError, match="same target_modules"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    """A block that is run again in backward must run with the same weights."""
    gradients = []
    for checkpointing in (False, True):
        model = tuned(LLAMA).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss_of(model, LLAMA.batch()).backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    assert_all_near(gradients[1], gradients[0])


class Recurrent(nn.Module):
    """Parameters that are read without a call."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.out = part, nn.Linear(4, 2)


@pytest.mark.parametrize(
    "part",
    [nn.LSTM(4, 4), nn.ParameterList([nn.Parameter(torch.ones(4))]), nn.MultiheadAttention(4, 2)],
    ids=lambda part: type(part).__name__,
)
def test_parameters_that_no_call_reads_are_refused_not_forgotten(part: nn.Module) -> None:
    with pytest.raises(TargetError, match="exclude_modules"):
        slimtune.get_peft_model(Recurrent(part), slimtune.FullConfig())
    model = slimtune.get_peft_model(Recurrent(part), slimtune.FullConfig(exclude_modules=["part"]))
    assert {name.partition(".")[0] for name in trainable(model)} == {"out"}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"store": "hole"}, ConfigError, "did you mean 'whole'"),
        ({"target_modules": ["act_fn"]}, TargetError, "nothing to train"),
        ({"target_modules": ["mpl"]}, TargetError, "did you mean 'mlp'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        slimtune.get_peft_model(LLAMA.model(), slimtune.FullConfig(**options))


def test_a_tuned_model_answers_through_generate() -> None:
    model = tuned(LLAMA)
    ids = LLAMA.batch()["input_ids"]
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(input_ids=ids, **settings)
    plain: transformers.PreTrainedModel = model.merge_and_unload()
    assert torch.equal(plain.generate(input_ids=ids, **settings), tokens)


class WithBuffers(nn.Module):
    """A parameter, a statistic that is stored, and a constant that isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("running", torch.zeros(4))
        self.register_buffer("constant", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running += x.detach().mean(0)
        return x * self.gain * self.constant + self.running


@pytest.mark.parametrize("store", ["difference", "whole"])
def test_a_buffer_that_the_model_does_not_store_is_no_part_of_an_adapter(store: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), WithBuffers())
    tuned = slimtune.get_peft_model(model, slimtune.FullConfig(target_modules=["1"], store=store))
    tuned.train()(torch.ones(2, 4))
    names = {name.rpartition(".")[2] for name in adapter_tensors(slimtune, tuned)}
    assert "running" in names
    assert "constant" not in names
    assert not any("constant" in name for name, _ in tuned[1].deltas.named_buffers())
    # What is written to it later is read: nothing stands in for it.
    tuned.eval()
    before = tuned(torch.ones(2, 4)) - tuned[1].deltas["default"].running.running
    tuned[1].constant.fill_(6.0)
    assert_near(tuned(torch.ones(2, 4)) - tuned[1].deltas["default"].running.running, 3 * before)
    assert not tuned[1].running.any()
