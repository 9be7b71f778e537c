"""Several adapters on one base do what they do in peft."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor, nn

import slimtune
from slimtune.errors import ConfigError
from slimtune.methods.lora.combine import mixture
from tensors import activate, adapter_tensors, assert_all_near, assert_near, predict, randomize
from zoo import BERT, GEMMA3, GPT2, LLAMA, LLAMA_LINEARS, MIXTURE, T5, VIT, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LIBRARIES = (slimtune, peft)
RANKS = {"one": 4, "two": 4, "three": 2}


def with_three(library: ModuleType, specimen: Specimen = LLAMA, **options: Any) -> nn.Module:
    """A model with the adapters one, two and three; they are different, and `one` is active."""
    model: Any = None
    for seed, (name, rank) in enumerate(RANKS.items()):
        config = library.LoraConfig(r=rank, lora_alpha=3 + seed, **specimen.options(**options))
        if model is None:
            model = library.get_peft_model(specimen.model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        randomize(library, model, name, seed=10 + seed)
    return model


def products(library: ModuleType, model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """B @ A of each site, scaled as configured: the change itself, however it was factored."""
    config = model.peft_config[adapter]
    tensors = adapter_tensors(library, model, adapter)
    scale = config.lora_alpha / config.r
    return {
        key.removesuffix(".lora_A.weight"): scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        for key in tensors
        if key.endswith("lora_A.weight")
    }


ONE_AT_A_TIME: list[list[str]] = [["one"], ["two"], ["three"]]
SEVERAL_AT_ONCE = [["one", "two"], ["two", "three", "one"]]


@pytest.mark.parametrize(
    ("specimen", "active"),
    [
        *itertools.product([LLAMA, GPT2, T5, BERT], ONE_AT_A_TIME),
        *itertools.product([LLAMA, GPT2, T5], SEVERAL_AT_ONCE),  # one adapter alone can replace a module of BERT
    ],
    ids=lambda value: getattr(value, "name", None) or "+".join(value),
)
def test_active_adapters_add_up_alike(specimen: Specimen, active: list[str]) -> None:
    outputs = []
    for library in LIBRARIES:
        model = with_three(library, specimen)
        activate(model, active)
        assert list(model.active_adapters) == active
        outputs.append(predict(model, specimen.batch()))
    assert_near(*outputs)


COMBINATIONS = {
    "linear": (["one", "two"], [0.7, 0.4], {"combination_type": "linear"}),
    "linear-negative": (["one", "two"], [0.7, -0.4], {"combination_type": "linear"}),
    "cat": (["one", "three"], [0.5, 2.0], {"combination_type": "cat"}),
    "cat-three": (["three", "two", "one"], [0.5, -1.0, 0.25], {"combination_type": "cat"}),
    "svd": (["one", "two"], [1.0, 0.5], {"combination_type": "svd"}),
    "svd-of-a-rank": (["one", "three"], [1.0, 0.5], {"combination_type": "svd", "svd_rank": 6}),
    "svd-truncated": (["one", "two", "three"], [1.0, 0.5, 0.2], {"combination_type": "svd", "svd_rank": 3}),
    "default-kind": (["one", "two"], [0.3, 0.6], {}),
    "ties": (["one", "two"], [0.7, 0.4], {"combination_type": "ties", "density": 0.5}),
    "ties-by-count": (
        ["one", "two"],
        [0.7, -0.4],
        {"combination_type": "ties", "density": 0.3, "majority_sign_method": "frequency"},
    ),
    "ties-svd": (["one", "two", "three"], [0.7, 0.4, 0.3], {"combination_type": "ties_svd", "density": 0.4}),
    "magnitude-prune": (["one", "two"], [0.7, 0.4], {"combination_type": "magnitude_prune", "density": 0.2}),
    "magnitude-prune-svd": (["one", "three"], [0.7, 0.4], {"combination_type": "magnitude_prune_svd", "density": 0.2}),
    "all-kept": (["one", "two"], [0.7, 0.4], {"combination_type": "ties", "density": 1.0}),
    "svd-options": (["one", "two"], [1.0, 0.5], {"svd_full_matrices": False, "svd_driver": None}),
}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_weighted_combinations_are_the_same_change(case: str) -> None:
    adapters, weights, options = COMBINATIONS[case]
    combined = []
    for library in LIBRARIES:
        model = with_three(library)
        model.add_weighted_adapter(adapters, weights, "mixed", **options)
        combined.append((model, products(library, model, "mixed")))
        model.set_adapter("mixed")
    (ours, our_products), (theirs, their_products) = combined
    assert len(their_products) == len(LLAMA_LINEARS) * 2
    assert_all_near(our_products, their_products, 1e-5)
    assert ours.peft_config["mixed"].r == theirs.peft_config["mixed"].r
    assert_near(predict(ours, LLAMA.batch()), predict(theirs, LLAMA.batch()))


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
def test_tensors_are_thinned_and_joined_by_the_same_draws(name: str, sign: str, density: float) -> None:
    tensors = [torch.randn(5, 7) for _ in range(3)]
    weights = [0.5, -1.0, 2.0]
    torch.manual_seed(3)
    ours = mixture(name, density, sign)(tensors, weights)
    torch.manual_seed(3)
    options = {"majority_sign_method": sign} if name.endswith("ties") else {}
    theirs = getattr(merge_utils, name)([t.clone() for t in tensors], torch.tensor(weights), density, **options)
    assert_near(ours, theirs, 1e-6)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "another way": ({"combination_type": "tie"}, "did you mean 'ties'"),
    "no density": ({"combination_type": "ties"}, r"needs density, a share in \(0, 1\], found None"),
    "a density of nothing": ({"combination_type": "dare_linear", "density": 0.0}, "needs density"),
    "a density without use": ({"combination_type": "linear", "density": 0.5}, "takes no density"),
    "another majority": ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "frequency"),
    "another option": ({"densty": 0.5}, "did you mean 'density'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_combining_are_told_and_leave_no_adapter(case: str) -> None:
    options, words = MISTAKES[case]
    model: Any = with_three(slimtune)
    with pytest.raises(ConfigError, match=words):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mixed", **options)
    assert list(model.peft_config) == list(RANKS)


@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_weighted_combinations_of_embeddings(kind: str) -> None:
    outputs = []
    for library in LIBRARIES:
        model = with_three(library, GEMMA3, target_modules=["embed_tokens"])
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "mixed", combination_type=kind)
        model.set_adapter("mixed")
        outputs.append(predict(model, GEMMA3.batch()))
    assert_near(*outputs)


def test_cat_is_exactly_the_weighted_sum() -> None:
    model = with_three(slimtune)
    model.add_weighted_adapter(["one", "three"], [0.5, 2.0], "mixed", combination_type="cat")
    mixed, one, three = (products(slimtune, model, name) for name in ("mixed", "one", "three"))
    assert_all_near(mixed, {key: 0.5 * one[key] + 2.0 * three[key] for key in one}, 1e-6)


ROWS = ["one", "__base__", "two", "three", "one"]


def five_rows(specimen: Specimen) -> dict[str, Tensor]:
    batch = specimen.batch()
    batch.pop("labels", None)
    repeated = {key: torch.cat([value] * 3)[: len(ROWS)] for key, value in batch.items()}
    if specimen is T5:
        repeated["decoder_input_ids"] = repeated["input_ids"][:, :4]
    return repeated


def with_row_adapters(library: ModuleType, specimen: Specimen) -> nn.Module:
    # The rank in a grouped convolution is divisible by its groups; one of the three here is not.
    targets = [name for name in specimen.lora["target_modules"] if name != "grouped"]
    return with_three(library, specimen, target_modules=targets).eval()


@pytest.mark.parametrize("specimen", [LLAMA, GPT2, T5, BERT, VIT, MIXTURE], ids=lambda specimen: specimen.name)
def test_each_row_of_a_batch_has_its_own_adapter(specimen: Specimen) -> None:
    ours, theirs = (
        predict(with_row_adapters(library, specimen), five_rows(specimen), adapter_names=ROWS) for library in LIBRARIES
    )
    assert_near(ours, theirs)


def test_a_row_is_what_its_adapter_alone_would_say() -> None:
    model = with_row_adapters(slimtune, LLAMA)
    mixed = predict(model, five_rows(LLAMA), adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        single = {key: value[row : row + 1] for key, value in five_rows(LLAMA).items()}
        if name == "__base__":
            with model.disable_adapter():
                alone = predict(model, single)
        else:
            model.set_adapter(name)
            alone = predict(model, single)
        assert_near(mixed[row : row + 1], alone)


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generate_with_an_adapter_a_row(generation: dict[str, int]) -> None:
    prompts = five_rows(LLAMA)["input_ids"]
    tokens = [
        with_row_adapters(library, LLAMA).generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            adapter_names=ROWS,
            max_new_tokens=6,
            do_sample=False,
            **generation,
        )
        for library in LIBRARIES
    ]
    assert torch.equal(*tokens)


def test_an_unknown_adapter_of_a_row_is_an_error() -> None:
    for library in LIBRARIES:
        with pytest.raises(ValueError, match="fife"):
            predict(with_row_adapters(library, LLAMA), five_rows(LLAMA), adapter_names=["one", "fife"])


def test_a_wrong_number_of_rows_is_an_error() -> None:
    for library in LIBRARIES:
        with pytest.raises(ValueError):
            predict(with_row_adapters(library, LLAMA), five_rows(LLAMA), adapter_names=["one", "two"])


def test_switching_deciding_what_trains() -> None:
    for library in LIBRARIES:
        model = with_three(library)
        model.set_adapter("two")
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert names != []
        assert [name for name in names if ".two" not in name] == []


def test_deleting_the_active_adapter_activates_what_peft_activates() -> None:
    active = []
    for library in LIBRARIES:
        model = with_three(library)
        model.delete_adapter("two")
        assert list(model.peft_config) == ["one", "three"]
        model.delete_adapter("one")
        active.append(list(model.active_adapters))
    assert active[0] == active[1] == ["three"]


def test_merging_some_adapters_agrees() -> None:
    outputs = []
    for library in LIBRARIES:
        model = with_three(library)
        merged = model.merge_and_unload(adapter_names=["two", "three"])
        outputs.append(predict(merged, LLAMA.batch()))
    assert_near(*outputs)


@pytest.mark.parametrize("clamp", [0.5, 0.9, 0.99])
def test_clamped_factors_are_pefts(clamp: float) -> None:
    found = []
    for library in (slimtune, peft):
        model: Any = with_three(library)
        model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "mixed", "svd", svd_clamp=clamp)
        found.append(products(library, model, "mixed"))
    ours, theirs = found
    whole: Any = with_three(slimtune)
    whole.add_weighted_adapter(["one", "two"], [1.0, 0.5], "mixed", "svd")
    assert_all_near(ours, theirs, 1e-4)
    unclamped = products(slimtune, whole, "mixed")
    assert all((ours[name] - unclamped[name]).abs().max() > 1e-4 for name in ours)
