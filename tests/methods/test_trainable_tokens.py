"""Trained rows against the formula in float64, where they share, where they clash, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimtune
from kinds import Host
from slimtune.errors import ConfigError, TargetError
from tensors import adapter_tensors, assert_near, predict, randomize, trainable
from zoo import LLAMA, TIED_LLAMA, VIT

TOKENS = [9, 2, 5]


def attach(module: nn.Module, tokens: list[int] = TOKENS, **options: Any) -> Any:
    config = slimtune.TrainableTokensConfig(token_indices=tokens, target_modules=["site"], **options)
    return slimtune.get_peft_model(Host(module).double(), config)


def test_an_embedding_looks_trained_tokens_up_in_the_rows() -> None:
    model = randomize(slimtune, attach(nn.Embedding(11, 6)))
    (rows,) = adapter_tensors(slimtune, model).values()
    weight = model.site.weight.clone()
    weight[TOKENS] = rows
    ids = torch.arange(11).view(1, 11)
    assert torch.equal(model(ids), F.embedding(ids, weight))


def test_an_output_layer_projects_onto_the_rows_and_keeps_its_bias() -> None:
    model = randomize(slimtune, attach(nn.Linear(6, 11)))
    (rows,) = adapter_tensors(slimtune, model).values()
    weight = model.site.weight.detach().clone()
    weight[TOKENS] = rows
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert_near(model(x), F.linear(x, weight, model.site.bias), 1e-12)


def test_gradients_are_those_of_the_whole_matrix() -> None:
    torch.manual_seed(0)
    model = attach(nn.Embedding(11, 6, padding_idx=2))
    ids, g = torch.randint(0, 11, (4, 9)), torch.randn(4, 9, 6, dtype=torch.float64)
    model(ids).backward(g)
    whole = model.site.weight.detach().clone().requires_grad_()
    F.embedding(ids, whole, padding_idx=2).backward(g)
    assert whole.grad is not None
    (own,) = [p for p in model.parameters() if p.requires_grad]
    assert_near(own.grad, whole.grad[TOKENS], 1e-12)
    assert not own.grad[TOKENS.index(2)].any()


def test_init_weights_false_draws_the_rows() -> None:
    model = attach(nn.Embedding(11, 6), init_weights=False)
    (rows,) = adapter_tensors(slimtune, model).values()
    assert not torch.isclose(rows, model.site.weight[TOKENS]).any()


def test_tied_weights_share_their_rows_and_stay_tied_when_merged() -> None:
    config = slimtune.TrainableTokensConfig(token_indices=TOKENS)
    model = randomize(slimtune, slimtune.get_peft_model(TIED_LLAMA.model(), config))
    assert model.get_nb_trainable_parameters()[0] == len(TOKENS) * 32
    expected = predict(model, TIED_LLAMA.batch())
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings is True
    assert_near(predict(merged, TIED_LLAMA.batch()), expected)


def test_two_adapters_are_active_together_if_their_tokens_differ() -> None:
    model = slimtune.get_peft_model(TIED_LLAMA.model(), slimtune.TrainableTokensConfig(token_indices=[9, 2]))
    model.add_adapter("other", slimtune.TrainableTokensConfig(token_indices=[5, 6]))
    model.add_adapter("clashing", slimtune.TrainableTokensConfig(token_indices=[6, 9]))
    for seed, name in enumerate(model.peft_config):
        randomize(slimtune, model, name, seed)
    model.set_adapter(["default", "other"])
    unmerged = predict(model, TIED_LLAMA.batch())
    model.merge_adapter()
    assert_near(predict(model, TIED_LLAMA.batch()), unmerged)
    model.unmerge_adapter()
    with pytest.raises(ConfigError, match="each train their own copy"):
        model.set_adapter(["default", "clashing"])


class Positions(nn.Embedding):
    """Looks up something else than what it is given."""

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(mask.cumsum(-1))


@pytest.mark.parametrize(
    ("module", "error", "says"),
    [
        (nn.Conv1d(4, 8, 1), TargetError, "embeddings and output layers"),
        (Positions(11, 6), TargetError, "a forward of its own"),
        (nn.Embedding(11, 6, max_norm=1.0), ConfigError, "max_norm"),
        (nn.Embedding(8, 6), ConfigError, r"token 9 is beyond the 8 rows of 'site'"),
    ],
)
def test_modules_that_do_not_go(module: nn.Module, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        attach(module)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [([], "is empty"), ([3, 3], "token 3 twice"), ([-1], "from 0"), ([1.5], "found 1.5"), ("7", "found '7'")],
)
def test_tokens_that_are_none(tokens: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        attach(nn.Embedding(11, 6), tokens)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trainable_token_indices": {"embed_token": [1]}}, "did you mean 'embed_tokens'"),
        ({"trainable_token_indices": [1, 1]}, "token 1 twice"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "trains it whole"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "two of target_modules"),
    ],
)
def test_tokens_beside_lora_that_do_not_go(options: dict[str, Any], says: str) -> None:
    base = LLAMA.model()
    with pytest.raises((ConfigError, TargetError), match=says):
        slimtune.get_peft_model(base, slimtune.LoraConfig(**{"target_modules": ["q_proj"], **options}))
    assert type(base).__mro__[0].__name__ == "LlamaForCausalLM"
    assert not hasattr(base, "peft_config")


def test_a_model_without_tokens_has_none_to_train() -> None:
    with pytest.raises(TargetError):
        slimtune.get_peft_model(VIT.model(), slimtune.TrainableTokensConfig(token_indices=[1]))


def test_rows_of_a_batch_have_each_their_own_tokens() -> None:
    model = slimtune.get_peft_model(TIED_LLAMA.model(), slimtune.TrainableTokensConfig(token_indices=[9, 50, 20]))
    model.add_adapter("other", slimtune.TrainableTokensConfig(token_indices=[50, 60]))
    for seed, name in enumerate(model.peft_config):
        randomize(slimtune, model, name, seed)
    ids = TIED_LLAMA.batch()["input_ids"]
    mixed = predict(model, {"input_ids": ids}, adapter_names=["other", "__base__"])
    model.set_adapter("other")
    assert_near(mixed[:1], predict(model, {"input_ids": ids[:1]}))
    with model.disable_adapter():
        assert_near(mixed[1:], predict(model, {"input_ids": ids[1:]}))


def test_the_rows_of_a_16_bit_base_are_in_float32_and_start_without_a_change() -> None:
    base = TIED_LLAMA.model().bfloat16()
    expected = predict(base, TIED_LLAMA.batch())
    model = slimtune.get_peft_model(base, slimtune.TrainableTokensConfig(token_indices=[50, 7, 20]))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert torch.equal(predict(model, TIED_LLAMA.batch()), expected)
    assert predict(randomize(slimtune, model), TIED_LLAMA.batch()).dtype == torch.bfloat16


def test_a_step_keeps_nothing_of_the_size_of_the_embedding() -> None:
    model = slimtune.get_peft_model(TIED_LLAMA.model(), slimtune.TrainableTokensConfig(token_indices=[50, 7, 20]))
    embedding = model.model.embed_tokens
    made: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: made.append(t.shape) or t, lambda t: t):
        embedding(TIED_LLAMA.batch()["input_ids"])
    assert made
    assert embedding.weight.shape not in made
