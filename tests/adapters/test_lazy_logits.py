"""In training with labels a causal model's loss is computed in chunks: the same loss, without the logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import slimtune
from slimtune.adapters.lazy_logits import LazyLogits
from tensors import adapter_gradients, assert_all_near, assert_near, copies, loss_of, predict, randomize
from zoo import BERT, GEMMA3, GPT2, GPT_NEOX, LLAMA, QWEN2, T5, TIED_LLAMA, VOCABULARY, Specimen, llama, token_ids

CAUSAL = [LLAMA, TIED_LLAMA, QWEN2, GPT2, GPT_NEOX, GEMMA3, T5]
each_causal = pytest.mark.parametrize("specimen", CAUSAL, ids=lambda specimen: specimen.name)


def tuned(specimen: Specimen, **options: Any) -> Any:
    config = slimtune.LoraConfig(r=4, **specimen.options(**options))
    return randomize(slimtune, slimtune.get_peft_model(specimen.model(), config)).train()


def both_ways(model: Any, batch: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Loss and gradients without the logits and with them."""
    found = []
    for return_logits in (False, True):
        model.return_logits = return_logits
        model.zero_grad()
        output = model(**batch)
        assert (output.logits is None) is not return_logits
        output.loss.backward()
        found.append((output.loss.detach(), copies(adapter_gradients(slimtune, model))))
    return found


def with_ignored_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    labels = batch["labels"].clone()
    labels[0, :3] = -100
    return {**batch, "labels": labels}


@each_causal
def test_loss_and_gradients_are_the_model_s_own(specimen: Specimen) -> None:
    for batch in (specimen.batch(), with_ignored_labels(specimen.batch())):
        (loss, gradients), (expected, expected_gradients) = both_ways(tuned(specimen), batch)
        assert_near(loss, expected, 1e-6)
        assert_all_near(gradients, expected_gradients, 1e-5)


def test_a_vocabulary_and_a_batch_of_many_chunks() -> None:
    torch.manual_seed(0)
    config = slimtune.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = randomize(slimtune, slimtune.get_peft_model(llama(vocab_size=5003), config)).train()
    ids = torch.randint(4, 5003, (7, 301))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    (loss, gradients), (expected, expected_gradients) = both_ways(model, {"input_ids": ids, "labels": labels})
    assert_near(loss, expected, 1e-6)
    assert_all_near(gradients, expected_gradients, 1e-5)


def test_the_trainer_s_count_of_items_divides_the_loss() -> None:
    """Under gradient accumulation the sum is divided by the tokens of all its parts."""
    batch = {**with_ignored_labels(LLAMA.batch()), "num_items_in_batch": torch.tensor(40)}
    (loss, gradients), (expected, expected_gradients) = both_ways(tuned(LLAMA), batch)
    assert_near(loss, expected, 1e-6)
    assert_all_near(gradients, expected_gradients, 1e-5)
    without = {key: value for key, value in batch.items() if key != "num_items_in_batch"}
    assert not torch.isclose(both_ways(tuned(LLAMA), without)[0][0], loss)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["head-adapted", "head-trained", "embedding-trained"],
)
@pytest.mark.parametrize("specimen", [LLAMA, TIED_LLAMA], ids=lambda specimen: specimen.name)
def test_a_head_that_learns_gets_its_gradients(specimen: Specimen, options: dict[str, Any]) -> None:
    model = tuned(specimen, **options)
    plain = copy.deepcopy(model)
    plain.return_logits = True
    found = []
    for each in (model, plain):
        loss = loss_of(each, specimen.batch())
        loss.backward()
        found.append((loss.detach(), copies(adapter_gradients(slimtune, each))))
    assert_near(found[0][0], found[1][0], 1e-6)
    assert_all_near(found[0][1], found[1][1], 1e-5)


def test_nothing_is_supervised_or_everything_is() -> None:
    batch = LLAMA.batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model = tuned(LLAMA)
    losses = []
    for return_logits in (False, True):
        model.return_logits = return_logits
        losses.append(model(**batch).loss.detach())
    torch.testing.assert_close(losses[0], losses[1], equal_nan=True)


LAZY: dict[str, Callable[[Any], Any]] = {
    "as-they-are": lambda logits: logits,
    "float": lambda logits: logits.float(),
    "contiguous": lambda logits: logits.contiguous(),
    "to-a-dtype": lambda logits: logits.to(torch.float64),
    "to-their-device": lambda logits: logits.to(logits.device),
    "shifted": lambda logits: logits[..., :-1, :],
    "flattened": lambda logits: logits.reshape(-1, logits.size(-1)),
    "viewed": lambda logits: logits.view(-1, VOCABULARY),
    "viewed-by-a-shape": lambda logits: logits.view((logits.shape[0] * logits.shape[1], VOCABULARY)),
}
COMPUTED: dict[str, Callable[[Any], Any]] = {
    "to-a-device-by-name": lambda logits: logits.to(device="cpu"),
    "a-part-of-the-vocabulary": lambda logits: logits[..., :5],
    "one-position": lambda logits: logits[:, -1],
    "reshaped-otherwise": lambda logits: logits.reshape(-1),
    "a-product": lambda logits: logits * 2,
    "a-probability": lambda logits: logits.softmax(-1),
}


@pytest.mark.parametrize("use", [*LAZY, *COMPUTED])
def test_what_is_done_to_lazy_logits_is_done_to_the_logits(use: str) -> None:
    """Computed or not: the same numbers, dtype, shape and device."""
    head = tuned(LLAMA).lm_head
    hidden = torch.randn(2, 7, head.in_features)
    own = head(hidden).detach()
    done = {**LAZY, **COMPUTED}[use]
    result, expected = done(LazyLogits(hidden, head, head)), done(own)
    assert isinstance(result, LazyLogits) is (use in LAZY)
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(result.computed().detach() if use in LAZY else result.detach(), expected)


@each_causal
def test_evaluation_returns_logits(specimen: Specimen) -> None:
    model = tuned(specimen).eval()
    output = model(**specimen.batch())
    assert output.logits is not None
    assert output.logits.shape[-1] == VOCABULARY
    with torch.no_grad():
        assert model.train()(**specimen.batch()).logits is not None


def test_without_labels_logits_are_real_tensors() -> None:
    batch = LLAMA.batch()
    del batch["labels"]
    output = tuned(LLAMA)(**batch)
    assert type(output.logits) is torch.Tensor
    assert output.loss is None


def test_models_with_other_losses_keep_their_logits() -> None:
    output = tuned(BERT)(**BERT.batch())
    assert output.logits.shape == (2, 3)


def test_tuples_are_as_long_as_without() -> None:
    model = tuned(LLAMA)
    expected = model.eval()(**LLAMA.batch())
    loss, *_ = model.train()(**LLAMA.batch(), return_dict=False)
    assert_near(loss.detach(), expected.loss.detach(), 1e-5)


def test_label_smoothing_and_own_losses_on_logits_still_work() -> None:
    model = tuned(LLAMA)
    model.return_logits = True
    output = model(**LLAMA.batch())
    torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), token_ids().flatten(), label_smoothing=0.1
    ).backward()
    assert all(gradient.any() for gradient in adapter_gradients(slimtune, model).values())


def test_disabled_adapters_and_the_base_say_the_same_loss() -> None:
    model = tuned(LLAMA)
    base = LLAMA.model()
    with torch.no_grad():
        expected = base(**LLAMA.batch()).loss
    with model.disable_adapter():
        assert_near(model(**LLAMA.batch()).loss.detach(), expected, 1e-6)
    assert predict(model, LLAMA.batch()).shape[-1] == VOCABULARY
