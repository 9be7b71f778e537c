"""Each task's model: every method that attaches by default trains there and comes back, new heads with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import slimtune
from kinds import NEEDED
from slimtune.core.config import methods
from slimtune.errors import ConfigError, TargetError
from tensors import adapter_tensors, assert_near, randomize, trainable
from zoo import BERT, LLAMA, T5, VIT, Specimen, bart, seq2seq_batch, token_ids

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def bert_for(task: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config: Any = BERT.build().config  # type: ignore[assignment]
        config.num_labels = 2  # as many as there are ends to an answer
        return getattr(transformers, task)(config)

    return build


def span_batch() -> dict[str, Tensor]:
    return {"input_ids": token_ids(), "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])}


def tag_batch() -> dict[str, Tensor]:
    return {"input_ids": token_ids(), "labels": torch.randint(0, 2, (2, 7))}


@dataclass(frozen=True)
class Task:
    """A model for a task, which `AutoPeftModel` class loads it, and what of it is a new head."""

    specimen: Specimen
    auto_class: str
    head: str | None = None


TASKS = {
    "causal": Task(LLAMA, "AutoPeftModelForCausalLM"),
    "sequence-classification": Task(BERT, "AutoPeftModelForSequenceClassification", "classifier"),
    "token-classification": Task(
        Specimen("bert-tokens", bert_for("BertForTokenClassification"), tag_batch),
        "AutoPeftModelForTokenClassification",
        "classifier",
    ),
    "question-answering": Task(
        Specimen("bert-spans", bert_for("BertForQuestionAnswering"), span_batch),
        "AutoPeftModelForQuestionAnswering",
        "qa_outputs",
    ),
    "feature-extraction": Task(
        Specimen("bert-features", bert_for("BertModel"), lambda: {"input_ids": token_ids()}),
        "AutoPeftModelForFeatureExtraction",
    ),
    "seq2seq-t5": Task(T5, "AutoPeftModelForSeq2SeqLM"),
    "seq2seq-bart": Task(Specimen("bart", bart, seq2seq_batch), "AutoPeftModelForSeq2SeqLM"),
    "image-classification": Task(VIT, "AutoPeftModel", "classifier"),
}
HEADED = {name: task for name, task in TASKS.items() if task.head}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def config_of(method: str) -> Any:
    return methods()[method](**NEEDED.get(method, {}))


def outputs(model: Any, task: Task) -> Tensor:
    """All that a model is asked for, in one row."""
    with torch.no_grad():
        found = model.eval()(**task.specimen.batch())
    if "start_logits" in found:
        return torch.cat([found.start_logits, found.end_logits])
    return found.logits if "logits" in found else found[0]


def loss_of(model: Any, task: Task) -> Tensor:
    found = model(**task.specimen.batch())
    return found.loss if "loss" in found and found.loss is not None else found[0].square().mean()


def with_another_head(task: Task) -> Any:
    """The base as it is loaded again: a head that it wasn't trained with is drawn anew."""
    model = task.specimen.model()
    torch.manual_seed(99)
    for parameter in model.get_submodule(task.head).parameters() if task.head else ():
        nn.init.normal_(parameter)
    return model


@functools.cache
def applicable() -> list[tuple[str, str]]:
    """The pairs of a method and a task on whose model the method's defaults attach."""
    found = []
    for method in sorted(methods()):
        for name, task in TASKS.items():
            try:
                slimtune.get_peft_model(task.specimen.model(), config_of(method))
            except (TargetError, ConfigError):
                continue
            found.append((method, name))
    return found


def test_lora_attaches_for_every_task() -> None:
    assert {name for method, name in applicable() if method == "LORA"} == set(TASKS)


@pytest.mark.parametrize(("method", "name"), applicable(), ids="-".join)
def test_a_step_changes_the_outputs_and_comes_back_from_disk(method: str, name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    torch.manual_seed(3)
    model = slimtune.get_peft_model(task.specimen.model(), config_of(method))
    before = outputs(model, task)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
    for _ in range(2):  # at the first one, a factor that starts at zero keeps the other's gradient at zero
        optimizer.zero_grad()
        loss_of(model.train(), task).backward()
        optimizer.step()
    after = outputs(model, task)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    reread = slimtune.PeftModel.from_pretrained(with_another_head(task), tmp_path)
    assert_near(outputs(reread, task), after)


@pytest.mark.parametrize("name", HEADED)
def test_a_new_head_is_always_trained_and_stored(name: str, tmp_path: Path) -> None:
    task = HEADED[name]
    for method in sorted({method for method, on in applicable() if on == name}):
        model = slimtune.get_peft_model(task.specimen.model(), config_of(method))
        of_the_head = {key for key in adapter_tensors(slimtune, model) if f"{task.head}." in key}
        shapes = [p.shape for p in task.specimen.model().get_submodule(str(task.head)).parameters()]
        assert len(of_the_head) == len(shapes), method
        assert any(f"{task.head}.deltas." in parameter for parameter in trainable(model)), method


@each_task
def test_without_a_task_type_base_and_adapter_load_in_one_call(task: Task, tmp_path: Path) -> None:
    """The config names the model's own class, by which slimtune and peft find it; peft's classes take it too."""
    base: Any = with_another_head(task)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = randomize(slimtune, slimtune.get_peft_model(base, slimtune.LoraConfig(r=4)))
    model.save_pretrained(tmp_path / "adapter")
    expected = outputs(model, task)
    for name in {task.auto_class, "AutoPeftModel"}:
        reread = getattr(slimtune, name).from_pretrained(tmp_path / "adapter")
        assert type(reread).__name__ == type(base).__name__
        assert torch.equal(outputs(reread, task), expected)
        assert_near(outputs(getattr(peft, name).from_pretrained(tmp_path / "adapter"), task), expected)
