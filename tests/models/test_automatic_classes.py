"""`AutoPeftModelFor...` loads the base that an adapter names, with the adapter on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import slimtune
from slimtune.errors import AdapterFileError
from tensors import assert_near, predict, randomize, trainable
from zoo import BERT, LLAMA, MIXTURE, T5, Specimen


def bert_for(task: str) -> Any:
    """BERT with the head of another task, its weights drawn from the same seed."""
    torch.manual_seed(0)
    config = BERT.model().config
    config.num_labels = 2  # as many as there are ends to an answer
    return getattr(transformers, task)(config).eval()


TASKS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "AutoPeftModelForCausalLM": (LLAMA.model, "CAUSAL_LM", {"target_modules": ["q_proj"]}),
    "AutoPeftModelForSeq2SeqLM": (T5.model, "SEQ_2_SEQ_LM", {"target_modules": ["q"]}),
    "AutoPeftModelForSequenceClassification": (BERT.model, "SEQ_CLS", {"target_modules": ["query"]}),
    "AutoPeftModelForTokenClassification": (
        lambda: bert_for("BertForTokenClassification"),
        "TOKEN_CLS",
        {"target_modules": ["query"]},
    ),
    "AutoPeftModelForQuestionAnswering": (
        lambda: bert_for("BertForQuestionAnswering"),
        "QUESTION_ANS",
        {"target_modules": ["query"]},
    ),
    "AutoPeftModelForFeatureExtraction": (
        lambda: bert_for("BertModel"),
        "FEATURE_EXTRACTION",
        {"target_modules": ["query"]},
    ),
}


def batch_for(model: Any) -> dict[str, torch.Tensor]:
    batch = {"input_ids": LLAMA.batch()["input_ids"]}
    return {**batch, "decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else batch


def first_output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch_for(model))[0]


def saved(folder: Path, base: Any, **options: Any) -> Any:
    """An adapter in `folder/adapter` for a base in `folder/base`."""
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = randomize(slimtune, slimtune.get_peft_model(base, slimtune.LoraConfig(r=4, **options)))
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("name", [*TASKS, "AutoPeftModel"])
def test_base_and_adapter_in_one_call(name: str, tmp_path: Path) -> None:
    build, task_type, options = TASKS.get(name, TASKS["AutoPeftModelForCausalLM"])
    model = saved(tmp_path, build(), task_type=task_type, **options)
    reread = getattr(slimtune, name).from_pretrained(tmp_path / "adapter")
    assert isinstance(reread, slimtune.PeftModel)
    assert isinstance(reread, type(build()))
    assert trainable(reread) == {}
    assert torch.equal(first_output(reread), first_output(model))
    # The class without a task takes only adapters without a task in peft.
    theirs = getattr(peft, name if name in TASKS else "AutoPeftModelForCausalLM").from_pretrained(tmp_path / "adapter")
    assert_near(first_output(reread), first_output(theirs))


@pytest.mark.parametrize("specimen", [LLAMA, BERT, T5], ids=lambda specimen: specimen.name)
def test_without_a_task_the_config_names_the_class(specimen: Specimen, tmp_path: Path) -> None:
    model = saved(tmp_path, specimen.model(), **specimen.options(task_type=None))
    reread = slimtune.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(predict(reread, specimen.batch()), predict(model, specimen.batch()))


def test_arguments_of_both_halves(tmp_path: Path) -> None:
    saved(tmp_path, LLAMA.model(), **LLAMA.options())
    model = slimtune.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", adapter_name="mine", is_trainable=True, dtype=torch.bfloat16
    )
    assert model.active_adapters == ["mine"]
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


def test_an_adapter_without_its_base(tmp_path: Path) -> None:
    saved(tmp_path, LLAMA.model(), **LLAMA.options())
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(AdapterFileError, match="base"):
        slimtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_a_base_that_is_gone(tmp_path: Path) -> None:
    saved(tmp_path, LLAMA.model(), **LLAMA.options())
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="base"):
        slimtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_a_config_cannot_choose_what_code_is_imported(tmp_path: Path) -> None:
    model = slimtune.get_peft_model(MIXTURE.model(), slimtune.LoraConfig(r=4, **MIXTURE.options()))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    for mapping in (None, {"base_model_class": "system", "parent_library": "os"}):
        content = {**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path)}
        file.write_text(json.dumps({**content, "auto_mapping": mapping or content["auto_mapping"]}))
        with pytest.raises(AdapterFileError):
            slimtune.AutoPeftModel.from_pretrained(tmp_path)
