"""LayerNorm tuning does what it does in peft."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import slimtune
from beside_peft import Case, check_forward_and_files, check_generation, check_gradients, check_three_steps
from tensors import adapter_tensors, assert_near, plain, predict, trainable
from zoo import BERT, GEMMA3, GPT2, LLAMA, T5, VIT, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LIBRARIES = (slimtune, peft)
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
HEADS = {"modules_to_save": ["classifier"]}
CASES = {
    "llama": Case("LNTuningConfig", LLAMA, {"target_modules": NORMS}),
    "gemma3": Case("LNTuningConfig", GEMMA3, {"target_modules": ".*norm"}),
    "gpt2": Case("LNTuningConfig", GPT2, {"target_modules": ["ln_1", "ln_2", "ln_f"]}),
    "bert": Case("LNTuningConfig", BERT, {"target_modules": ["LayerNorm"], **HEADS}),
    "t5": Case("LNTuningConfig", T5, {"target_modules": ["layer_norm", "final_layer_norm"]}),
    "vit": Case("LNTuningConfig", VIT, {"target_modules": ["layernorm_before", "layernorm_after"], **HEADS}),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
def test_forward_and_files_agree(case: Case, tmp_path: Path) -> None:
    check_forward_and_files(case, tmp_path)


@each_case
def test_gradients_agree(case: Case) -> None:
    check_gradients(case)


@each_case
def test_three_steps_agree(case: Case) -> None:
    check_three_steps(case)


@each_case
def test_merged_models_agree(case: Case) -> None:
    """Not tensor by tensor: peft leaves the wrappers of new heads in the merged model."""
    ours, theirs = (case.tuned(library).merge_and_unload() for library in LIBRARIES)
    assert_near(predict(ours, case.batch()), predict(theirs, case.batch()))


def test_generation_agrees() -> None:
    check_generation("LNTuningConfig", target_modules=NORMS)


def test_the_config_has_peft_s_fields_and_defaults() -> None:
    ours, theirs = (dict(library.LNTuningConfig().to_dict()) for library in LIBRARIES)
    shared = ours.keys() & theirs.keys() - {"peft_version"}
    assert shared >= {"target_modules", "exclude_modules", "modules_to_save"}
    assert {name: plain(ours[name]) for name in shared} == {name: plain(theirs[name]) for name in shared}


@pytest.mark.parametrize("specimen", [LLAMA, GPT2, T5], ids=lambda specimen: specimen.name)
def test_the_default_is_that_of_peft_s_table(specimen: Specimen) -> None:
    ours, theirs = (lib.get_peft_model(specimen.model(), lib.LNTuningConfig()) for lib in LIBRARIES)
    assert adapter_tensors(slimtune, ours).keys() == adapter_tensors(peft, theirs).keys()


def test_the_copies_have_the_dtype_of_the_base_as_in_peft() -> None:
    for library in LIBRARIES:
        model = library.get_peft_model(LLAMA.model().to(torch.bfloat16), library.LNTuningConfig(target_modules=NORMS))
        assert {parameter.dtype for parameter in trainable(model).values()} == {torch.bfloat16}
