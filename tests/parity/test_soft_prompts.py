"""Prompt tuning, P-tuning and prefix tuning against peft: outputs, gradients, steps, files and generated tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import slimtune
from tensors import adapter_tensors, assert_all_near, assert_near, assert_same, loss_of, predict, randomize, trainable
from zoo import BERT, GEMMA3, GPT2, GPT_NEOX, LLAMA, QWEN2, T5, Specimen, bart

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
SOFT_PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "p-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 24}),
    "p-lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected-prefix": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 24}),
}
PLAIN = ["prompt", "prefix"]


BART = Specimen("bart", lambda: bart(forced_eos_token_id=None), T5.inputs)
SPECIMENS = [LLAMA, QWEN2, GPT2, GPT_NEOX, GEMMA3, BERT, T5, BART]
each_specimen = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
each_method = pytest.mark.parametrize("method", SOFT_PROMPTS)


def attach(library: ModuleType, method: str, model: nn.Module, name: str) -> Any:
    config, options = SOFT_PROMPTS[method]
    task = TASKS.get(name, "CAUSAL_LM")
    made = getattr(library, config)(num_virtual_tokens=5, task_type=task, **copy.deepcopy(options))
    return library.get_peft_model(model, made)


def pair(method: str, specimen: Specimen) -> tuple[Any, Any]:
    """The same adapter of slimtune and of peft, in training."""
    ours = randomize(slimtune, attach(slimtune, method, specimen.model(), specimen.name))
    theirs = attach(peft, method, specimen.model(), specimen.name)
    tensors = adapter_tensors(slimtune, ours)
    encoder = {
        key.removeprefix("prompt_encoder."): t for key, t in tensors.items() if key.startswith("prompt_encoder.")
    }
    if encoder:
        theirs.prompt_encoder["default"].load_state_dict(encoder)
        tensors["prompt_embeddings"] = theirs.prompt_encoder["default"].embedding.weight
    peft.set_peft_model_state_dict(theirs, tensors)
    return ours.train(), theirs.train()


def by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters under names that both libraries give them."""
    found = {}
    for name, parameter in trainable(model).items():
        if "prompt_encoder" in name or "deltas" in name:
            parts = name.split(".")
            inside = parts[parts.index("default") + 1 :]
            inside = inside[1:] if inside[0] in ("encoder", "whole") else inside
            place = parts[0] if parts[0] == "classifier" else ""
            last = ".".join(inside)
            found[f"{place}{'embedding.weight' if last == 'prompt_embeddings' else last}"] = parameter
        else:
            found["classifier" + name.rpartition(".")[2]] = parameter
    return found


@each_specimen
@each_method
def test_outputs_and_gradients(method: str, specimen: Specimen) -> None:
    ours, theirs = pair(method, specimen)
    assert_near(predict(ours, specimen.batch()), predict(theirs, specimen.batch()))
    losses, gradients = [], []
    for model in (ours.train(), theirs.train()):
        loss = loss_of(model, specimen.batch())
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in by_name(model).items() if p.grad is not None})
    assert_near(*losses)
    assert_all_near(*gradients)
    assert any(gradient.any() for name, gradient in gradients[1].items() if "classifier" not in name)


@pytest.mark.parametrize("specimen", [LLAMA, GPT2, BERT, T5], ids=lambda specimen: specimen.name)
@each_method
def test_three_steps(method: str, specimen: Specimen) -> None:
    found = []
    for model in pair(method, specimen):
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model, specimen.batch())
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
        assert len({float(loss) for loss in losses}) == 4
        found.append((torch.stack(losses), {name: p.detach() for name, p in by_name(model).items()}))
    (our_losses, ours), (their_losses, theirs) = found
    assert_near(our_losses, their_losses)
    assert_all_near(ours, theirs)


@each_specimen
@each_method
def test_peft_reads_what_slimtune_writes(method: str, specimen: Specimen, tmp_path: Path) -> None:
    ours, _ = pair(method, specimen)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert_near(predict(theirs, specimen.batch()), predict(ours, specimen.batch()))


@each_specimen
@each_method
def test_slimtune_reads_what_peft_writes(method: str, specimen: Specimen, tmp_path: Path) -> None:
    _, theirs = pair(method, specimen)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = slimtune.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert_near(predict(ours, specimen.batch()), predict(theirs, specimen.batch()))
    ours.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert_same(again, load_file(tmp_path / "adapter_model.safetensors"))


@each_specimen
@pytest.mark.parametrize("method", PLAIN)
def test_the_files_hold_the_same(method: str, specimen: Specimen, tmp_path: Path) -> None:
    ours, theirs = pair(method, specimen)
    written, fields = [], []
    for library, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / library, save_embedding_layers=False)
        written.append(load_file(tmp_path / library / "adapter_model.safetensors"))
        fields.append(peft.PeftConfig.from_pretrained(tmp_path / library).to_dict())
    assert_same(*written)
    names = ["token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "num_virtual_tokens"]
    assert [fields[0][name] for name in names] == [fields[1][name] for name in names]


@pytest.mark.parametrize("specimen", [LLAMA, GPT2, GEMMA3, T5, BART], ids=lambda specimen: specimen.name)
@pytest.mark.parametrize("method", ["prompt", "p-mlp", "prefix"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens(method: str, specimen: Specimen, beams: int) -> None:
    ids = specimen.batch()["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "num_beams": beams}
    ours, theirs = (model.eval().generate(**inputs, **options) for model in pair(method, specimen))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_mask", [True, False])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_segments_and_masks_of_an_encoder(method: str, use_mask: bool) -> None:
    ids = BERT.batch()["input_ids"]
    batch = {"input_ids": ids, "token_type_ids": (torch.arange(7) > 3).long().expand(2, -1)}
    if use_mask:
        batch["attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    ours, theirs = pair(method, BERT)
    assert_near(predict(ours, batch), predict(theirs, batch))


@pytest.mark.parametrize("method", ["prompt", "p-mlp", "prefix"])
def test_other_tasks_of_an_encoder(method: str) -> None:
    """A backbone alone, and answers to questions."""
    config = BERT.model().config
    config.num_labels = 2
    ids = BERT.batch()["input_ids"]
    question: dict[str, Tensor] = {
        "input_ids": ids,
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 4]),
    }
    for task, kind, batch in (
        ("FEATURE_EXTRACTION", transformers.BertModel, {"input_ids": ids}),
        ("QUESTION_ANS", transformers.BertForQuestionAnswering, question),
    ):
        name, options = SOFT_PROMPTS[method]
        found = []
        for library in (slimtune, peft):
            torch.manual_seed(0)
            model = kind(config).eval()
            made = getattr(library, name)(num_virtual_tokens=5, task_type=task, inference_mode=True, **options)
            found.append(library.get_peft_model(model, made))
        ours, theirs = found
        prompt = {"prompt_embeddings": adapter_tensors(slimtune, ours)["prompt_embeddings"]}
        theirs.prompt_encoder["default"].embedding.load_state_dict({"weight": prompt["prompt_embeddings"]})
        with torch.no_grad():
            our_outputs, their_outputs = ours(**batch), theirs(**batch)
        for name_of_output in ("last_hidden_state", "start_logits", "end_logits", "loss"):
            if getattr(their_outputs, name_of_output, None) is not None:
                assert_near(our_outputs[name_of_output], their_outputs[name_of_output], 1e-5, name_of_output)


@pytest.mark.parametrize("specimen", [LLAMA, BERT], ids=lambda specimen: specimen.name)
def test_peft_reads_a_prefix_that_began_as_words(specimen: Specimen, tmp_path: Path) -> None:
    """The fields that peft doesn't know say only where training began."""
    ours = slimtune.get_peft_model(specimen.model(), slimtune.PrefixTuningConfig(prefix_init="SAMPLE_VOCAB"))
    ours.save_pretrained(tmp_path)
    assert slimtune.PeftConfig.from_pretrained(tmp_path).prefix_init == "SAMPLE_VOCAB"
    theirs = peft.PeftModel.from_pretrained(specimen.model(), tmp_path)
    assert_near(predict(theirs, specimen.batch()), predict(ours, specimen.batch()))


@pytest.mark.parametrize("method", SOFT_PROMPTS)
def test_a_task_that_nobody_named_is_found_and_stored(method: str, tmp_path: Path) -> None:
    """Without it peft would not put a prompt in front."""
    config, options = SOFT_PROMPTS[method]
    for specimen, task in ((LLAMA, "CAUSAL_LM"), (BERT, "SEQ_CLS"), (T5, "SEQ_2_SEQ_LM")):
        ours = slimtune.get_peft_model(specimen.model(), getattr(slimtune, config)(**options))
        ours.save_pretrained(tmp_path / specimen.name)
        theirs = peft.PeftModel.from_pretrained(specimen.model(), tmp_path / specimen.name)
        assert theirs.active_peft_config.task_type == task
        assert_near(predict(theirs, specimen.batch()), predict(ours, specimen.batch()))
