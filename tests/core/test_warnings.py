"""A warning points at the line of the user's that led to it, whichever public call lies between."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimtune
from quantizers import QUANTIZERS
from tensors import randomize
from zoo import LLAMA, VOCABULARY

LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def tuned(**options: Any) -> Any:
    return slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(**{**LORA, **options}))


def resized(folder: Path) -> Any:
    LLAMA.model().save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    return model


def merged_twice(folder: Path) -> None:
    model = tuned()
    model.merge_adapter()
    model.merge_adapter()


def merged_in_codes(folder: Path) -> None:
    model = slimtune.get_peft_model(QUANTIZERS[0].model(LLAMA.model()), slimtune.LoraConfig(**LORA))
    randomize(slimtune, model).merge_and_unload(requantize=True)


def stored(folder: Path, **options: Any) -> Path:
    tuned(**options).save_pretrained(folder / "adapter")
    return folder / "adapter"


def uncast(folder: Path) -> None:
    with slimtune.disable_input_dtype_casting(tuned()):
        pass


def compiled(folder: Path) -> None:
    model = torch.compile(tuned())
    slimtune.prepare_model_for_compiled_hotswap(model, check_compiled="warn")


def of_another_shape(folder: Path) -> None:
    model = tuned(r=4)
    slimtune.set_peft_model_state_dict(
        model, slimtune.load_peft_weights(str(stored(folder))), ignore_mismatched_sizes=True
    )


CALLS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a-rank": ("the rank 999 is beyond", lambda folder: tuned(r=999)),
    "a-rank-of-an-added-adapter": (
        "the rank 999 is beyond",
        lambda folder: tuned().add_adapter("b", slimtune.LoraConfig(**{**LORA, "r": 999})),
    ),
    "a-second-adapter": (
        "has an adapter 'default' already",
        lambda folder: slimtune.get_peft_model(tuned(), slimtune.LoraConfig(**LORA)),
    ),
    "ties": ("ensure_weight_tying=True changes nothing", lambda folder: tuned(ensure_weight_tying=True)),
    "a-second-merge": ("already merged", merged_twice),
    "a-merge-into-codes": ("merged into quantized weights", merged_in_codes),
    "new-tokens": (
        "the embeddings were resized",
        lambda folder: slimtune.get_peft_model(resized(folder), slimtune.LoraConfig(**LORA)),
    ),
    "new-tokens-of-an-added-adapter": (
        "the embeddings were resized",
        lambda folder: slimtune.inject_adapter_in_model(slimtune.LoraConfig(**LORA), resized(folder)),
    ),
    "new-tokens-saved": (
        "saved whole",
        lambda folder: slimtune.get_peft_model(resized(folder), slimtune.LoraConfig(**LORA)).save_pretrained(folder),
    ),
    "an-option-of-loading": (
        "no effect on loading",
        lambda folder: slimtune.PeftModel.from_pretrained(LLAMA.model(), stored(folder), device_map="cpu"),
    ),
    "an-option-of-loading-another": (
        "no effect on loading",
        lambda folder: tuned().load_adapter(stored(folder), "b", device_map="cpu"),
    ),
    "casting": ("no effect: the base sees", uncast),
    "a-compiled-model": ("compiled already", compiled),
    "another-shape": ("in another shape", of_another_shape),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_warning_points_at_the_caller(case: str, tmp_path: Path) -> None:
    words, call = CALLS[case]
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        call(tmp_path)
    places = {warning.filename for warning in given if words in str(warning.message)}
    assert places == {__file__}


def test_all_warnings_are_given_by_the_one_function_that_knows_the_caller() -> None:
    package = Path(slimtune.__file__).parent
    with_own = {path.name for path in package.rglob("*.py") if "warnings.warn(" in path.read_text()}
    assert with_own == {"errors.py"}
