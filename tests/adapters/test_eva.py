"""EVA: directions and ranks from data, as in peft."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import peft
import pytest
import torch
from sklearn.decomposition import IncrementalPCA
from torch import Tensor, nn

import slimtune
from slimtune.errors import ConfigError
from slimtune.methods.lora import eva as inits
from tensors import adapter_tensors, assert_near, assert_same, loss_of, predict, trainable
from zoo import BERT, GPT2, LLAMA, T5, VIT, Specimen, token_ids

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def text(batches: int = 1) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    found = []
    for _ in range(batches):
        ids = token_ids(8, 16)
        mask = torch.ones_like(ids)
        mask[:, 13:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids % 5 == 0, -100)})
    return found


def attach(library: ModuleType, specimen: Specimen, eva: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(3)
    config = {"r": 4, "init_lora_weights": "eva", "eva_config": library.EvaConfig(**eva)}
    return library.get_peft_model(specimen.model(), library.LoraConfig(**specimen.options(**config, **options)))


def started(library: ModuleType, specimen: Specimen, batches: Any, eva: dict[str, Any], **options: Any) -> Any:
    model = attach(library, specimen, eva, **options)
    quiet = {"show_progress_bar": False} if library is peft else {}
    library.initialize_lora_eva_weights(model, batches, **quiet)
    return model


def directions(library: ModuleType, model: Any) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in adapter_tensors(library, model).items() if "lora_A" in key}


SETTLED = {"rho": 1.0, "tau": 0.999999}


@pytest.mark.parametrize("eva", [SETTLED, SETTLED | {"whiten": True}, SETTLED | {"use_label_mask": False}])
@pytest.mark.parametrize("specimen", [LLAMA, GPT2], ids=lambda specimen: specimen.name)
def test_directions_are_peft_s(specimen: Specimen, eva: dict[str, Any]) -> None:
    """On one batch over and over, until they have settled; a direction has no sign."""
    ours, theirs = (directions(lib, started(lib, specimen, text(), eva)) for lib in (slimtune, peft))
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert_near(torch.cosine_similarity(ours[key], expected).abs(), torch.ones(len(expected)), 2e-3, key)
        # The lengths of whitened ones depend on how often the batch was read, and fall with the singular values.
        lengths = ours[key].norm(dim=1)
        if eva.get("whiten"):
            assert torch.equal(lengths, lengths.sort().values)
            assert lengths[0] < lengths[-1]
        else:
            assert_near(lengths, torch.ones(len(expected)))


@pytest.mark.parametrize("adjust", [True, False])
def test_ranks_move_as_in_peft(adjust: bool) -> None:
    """Which of the layers that read the same gets a rank more is a matter of rounding; how many there are is not."""
    found = []
    for library in (slimtune, peft):
        model = started(library, LLAMA, text(), {"rho": 2.0, "adjust_scaling_factors": adjust})
        counts: Counter[str] = Counter()
        for key, tensor in directions(library, model).items():
            group = "qkv" if any(f"{n}_proj" in key for n in "qkv") else "mlp" if "gate" in key or "up" in key else key
            counts[f"{key.split('layers.')[1][0]} {group}"] += len(tensor)
        found.append(counts)
        assert sum(counts.values()) == 4 * 14
        assert bool(model.peft_config["default"].alpha_pattern) == adjust
    assert found[0] == found[1]
    assert set(found[0].values()) != {4}


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_the_start_is_the_base_and_every_delta_learns(rho: float, tmp_path: Path) -> None:
    model = started(slimtune, LLAMA, text(3), {"rho": rho}, bias="none")
    assert torch.equal(predict(model, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()))
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    assert len(before) == len(adapter_tensors(slimtune, model))
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model.train(), LLAMA.batch()).backward()
        optimizer.step()
    assert [name for name, p in trainable(model).items() if torch.equal(p, before[name])] == []
    model.save_pretrained(tmp_path)
    for library in (slimtune, peft):
        reread = library.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
        assert_near(predict(reread, LLAMA.batch()), predict(model, LLAMA.batch()))


class Two(nn.Module):
    """Two layers, and nothing to tell them apart by but their names."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(x) + self.wide(x)


def test_a_layer_without_a_rank_loses_its_delta() -> None:
    config = slimtune.LoraConfig(
        r=2, init_lora_weights="eva", eva_config={"rho": 2.0}, target_modules=["narrow", "wide"], bias="lora_only"
    )
    model: Any = slimtune.get_peft_model(Two(), config)
    shares = {"narrow": torch.empty(0, 8), "wide": torch.linalg.qr(torch.randn(8, 4)).Q.t()}
    slimtune.initialize_lora_eva_weights(model, eva_state_dict=shares)
    kept = adapter_tensors(slimtune, model)
    assert sorted(key for key in kept if "lora_A" in key) == ["base_model.model.wide.lora_A.weight"]
    assert torch.equal(kept["base_model.model.wide.lora_A.weight"], shares["wide"])
    assert config.target_modules == {"wide"}
    assert config.rank_for("wide") == 4
    assert model.wide.deltas["default"].scaling == 8 / 2


def test_incremental_analysis_is_scikit_learn_s() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(300, 12)) * np.linspace(5, 0.1, 12) + rng.normal(size=12)).astype(np.float32)
    ours, theirs = inits.IncrementalPCA(4), IncrementalPCA(n_components=4)
    for batch in np.split(rows, 5):
        ours.update(torch.from_numpy(batch))
        theirs.partial_fit(batch)
    cosines = (ours.directions_KI * torch.from_numpy(theirs.components_)).sum(1).abs()
    assert_near(cosines, torch.ones(4), 1e-4)
    assert_near(ours.singular_K, torch.from_numpy(theirs.singular_values_), 1e-4)
    assert_near(ours.shares_K, torch.from_numpy(theirs.explained_variance_ratio_), 1e-3)


@pytest.mark.parametrize("specimen", [BERT, T5, VIT], ids=lambda specimen: specimen.name)
def test_other_models_start_by_it(specimen: Specimen) -> None:
    torch.manual_seed(1)
    batch = specimen.batch()
    batches = [{key: torch.cat([value] * 6) for key, value in batch.items()}]
    targets = [name for name in specimen.lora["target_modules"] if name != "projection"]
    model = started(slimtune, specimen, batches, {"rho": 1.5}, target_modules=targets)
    assert_near(predict(model, batch), predict(specimen.model(), batch), 1e-6)


def test_data_that_varies_in_few_directions_come_to_an_end() -> None:
    row = {key: value[:1].repeat(8, 1)[:, :10] for key, value in text()[0].items()}
    model = started(slimtune, LLAMA, [row], {"rho": 2.0, "use_label_mask": False})
    assert torch.equal(predict(model, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()))


def test_it_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    first, second = (started(slimtune, LLAMA, text(2), {}) for _ in range(2))
    assert_same(directions(slimtune, first), directions(slimtune, second))
    model, batches = attach(slimtune, LLAMA, {"rho": 1.0}), text(2)
    state = torch.get_rng_state()
    slimtune.initialize_lora_eva_weights(model, batches)
    assert torch.equal(torch.get_rng_state(), state)


def test_dora_and_heads_go_along() -> None:
    model = started(slimtune, BERT, [{k: torch.cat([v] * 6) for k, v in BERT.batch().items()}], {}, use_dora=True)
    assert torch.equal(predict(model, BERT.batch()), predict(BERT.model(), BERT.batch()))
    assert any("classifier" in name for name in trainable(model))


def mistaken(mistake: str) -> None:
    model = attach(slimtune, LLAMA, {})
    start = slimtune.initialize_lora_eva_weights
    if mistake == "no-eva":
        start(slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig()), text())
    elif mistake == "no-data":
        start(model)
    elif mistake == "empty":
        start(model, [])
    elif mistake == "short":
        start(model, [{key: value[:1, :5] for key, value in text()[0].items()}])
    elif mistake == "unknown-layer":
        start(model, eva_state_dict={"model.layers.0.self_attn.q_prj": torch.zeros(4, 32)})
    elif mistake == "trained":
        with torch.no_grad():
            model.get_parameter("model.layers.0.self_attn.q_proj.deltas.default.lora_B").add_(1)
        start(model, text())


@pytest.mark.parametrize(
    ("mistake", "words"),
    [("no-eva", "doesn't start by EVA"), ("no-data", "give one of them"), ("empty", "no batch"), ("short", "no batch"),
     ("unknown-layer", "did you mean"), ("trained", "trained already")],
)  # fmt: skip
def test_a_mistake_is_one_sentence(mistake: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mistaken(mistake)
