"""(IA)^3 does what it does in peft."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest

import slimtune
from beside_peft import Agreement, Case, check_generation
from tensors import activate, adapter_tensors, assert_all_near, assert_near, plain, predict, randomize
from zoo import BERT, GPT2, GPT_NEOX, LLAMA, MIXTURE, T5, TIED_LLAMA, VIT, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LIBRARIES = (slimtune, peft)
PAPER = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def case(specimen: Specimen, targets: Any, feedforward: Any) -> Case:
    heads = ["classifier"] if specimen.fresh else None
    options = {"target_modules": targets, "feedforward_modules": feedforward, "modules_to_save": heads}
    return Case("IA3Config", specimen, options)


CASES = {
    "llama": Case("IA3Config", LLAMA, PAPER),
    "gpt2": case(GPT2, ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": case(BERT, ["key", "output.dense"], ["output.dense"]),
    "bert-by-expression": case(BERT, ".*(key|intermediate.dense)", ".*intermediate.dense"),
    "t5": case(T5, ["k", "v", "wo"], ["wo"]),
    "vit": case(VIT, ["k_proj", "projection", "fc2"], ["fc2", "projection"]),
    # Not the one-dimensional convolution, which peft doesn't take.
    "mixture": case(MIXTURE, ["conv2d", "grouped", "shared", "out"], ["grouped", "out"]),
    "grouped-output": case(MIXTURE, ["grouped"], []),
    "tied-head": case(TIED_LLAMA, ["q_proj", "lm_head"], ["lm_head"]),
}


class TestAgreement(Agreement):
    cases = CASES
    # peft's merge of a tied head changes the embedding too.
    merged = {name: case for name, case in CASES.items() if name != "tied-head"}


def test_generation_agrees() -> None:
    check_generation("IA3Config", **PAPER)


def test_the_config_has_peft_s_fields_and_defaults() -> None:
    ours, theirs = (dict(library.IA3Config().to_dict()) for library in LIBRARIES)
    shared = ours.keys() & theirs.keys() - {"peft_version"}
    assert shared >= {"target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}
    assert {name: plain(ours[name]) for name in shared} == {name: plain(theirs[name]) for name in shared}


@pytest.mark.parametrize("specimen", [LLAMA, GPT2, GPT_NEOX, T5], ids=lambda specimen: specimen.name)
def test_the_default_is_that_of_peft_s_table_where_this_has_the_paper_s(specimen: Specimen, tmp_path: Path) -> None:
    ours, theirs = (lib.get_peft_model(specimen.model(), lib.IA3Config()) for lib in LIBRARIES)
    assert adapter_tensors(slimtune, ours).keys() == adapter_tensors(peft, theirs).keys()
    randomize(slimtune, ours).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["feedforward_modules"]
    reread = peft.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert_near(predict(reread, specimen.batch()), predict(ours, specimen.batch()))


@pytest.mark.parametrize("targets", [None, ["dense", "key"], "all-linear"], ids=str)
def test_peft_reads_which_targets_are_scaled_on_their_input(targets: Any, tmp_path: Path) -> None:
    """BERT calls layers of both sorts `dense`."""
    config = slimtune.IA3Config(target_modules=targets, modules_to_save=["classifier"])
    ours = randomize(slimtune, slimtune.get_peft_model(BERT.model(), config))
    ours.save_pretrained(tmp_path)
    for library in LIBRARIES:
        reread = library.PeftModel.from_pretrained(BERT.model(), tmp_path)
        assert_near(predict(reread, BERT.batch()), predict(ours, BERT.batch()))


def two(library: ModuleType) -> Any:
    model = CASES["llama"].tuned(library)
    model.add_adapter("other", library.IA3Config(**PAPER))
    return randomize(library, model, "other", seed=7)


def test_active_adapters_multiply_alike() -> None:
    outputs = []
    for library in LIBRARIES:
        model = two(library)
        activate(model, ["default", "other"])
        outputs.append(predict(model, LLAMA.batch()))
    assert_near(*outputs)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.5]], ids=str)
def test_weighted_sums_agree(weights: list[float]) -> None:
    outputs, tensors = [], []
    for library in LIBRARIES:
        model = two(library)
        model.add_weighted_adapter(["default", "other"], weights, "mixed")
        model.set_adapter("mixed")
        outputs.append(predict(model, LLAMA.batch()))
        tensors.append(adapter_tensors(library, model, "mixed"))
    assert_near(*outputs)
    assert_all_near(*tensors, 1e-6)
