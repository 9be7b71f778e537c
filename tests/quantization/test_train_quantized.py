"""Trainers take a quantized base with an adapter; what it is stored as is told in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import slimtune
from slimtune import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from small_text_model import save_base
from tensors import trainable

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz")

KINDS = ("nf4", "int8")
IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


def quantized(base: Path, kind: str = "nf4") -> tuple[Any, Any]:
    return slimtune.load(base, dtype="bfloat16", quantize=kind)


def adapted(model: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM"))


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.02,
        "save_steps": 3, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False,
    }  # fmt: skip


def assert_learned(trainer: Any, folder: Path) -> None:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    stored = load_file(folder / "checkpoint-3" / "adapter_model.safetensors")
    assert all("lora_" in name for name in stored)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert all(tensor.any() for tensor in stored.values())
    # What lies beside it for transformers is the adapter once more.
    assert sum(file.stat().st_size for file in (folder / "checkpoint-3").glob("model*.safetensors")) < 300_000


class TestTrainers:
    @pytest.mark.parametrize("kind", KINDS)
    def test_transformers_trainer(self, kind: str, base: Path, tmp_path: Path) -> None:
        model = adapted(quantized(base, kind)[0])
        rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 12
        trainer = transformers.Trainer(model, transformers.TrainingArguments(**arguments(tmp_path)), train_dataset=rows)
        trainer.train()
        assert_learned(trainer, tmp_path)

    @pytest.mark.parametrize("kind", KINDS)
    def test_trl_leaves_the_adapter_in_float32(self, kind: str, base: Path, tmp_path: Path) -> None:
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        model, tokenizer = quantized(base, kind)
        rows = datasets.Dataset.from_list([{"text": "two large lattes for maria please"}] * 12)
        trainer = trl.SFTTrainer(
            adapted(model), trl.SFTConfig(**arguments(tmp_path)), train_dataset=rows, processing_class=tokenizer
        )
        assert {parameter.dtype for parameter in trainable(trainer.model).values()} == {torch.float32}
        trainer.train()
        assert_learned(trainer, tmp_path)

    def test_without_an_adapter_it_is_refused_as_ever(self, base: Path, tmp_path: Path) -> None:
        model = adapted(quantized(base)[0]).unload()
        assert model.is_quantized
        assert model.is_loaded_in_4bit
        settings = transformers.TrainingArguments(**arguments(tmp_path))
        with pytest.raises(ValueError, match="purely quantized"):
            transformers.Trainer(model, settings, train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}])


class TestPreparing:
    def gradients(self, model: Any) -> dict[str, torch.Tensor]:
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return {name: parameter.grad for name, parameter in trainable(model).items()}

    @pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
    def test_checkpointed_gradients_are_the_same_and_nothing_is_cast(
        self, options: dict[str, Any] | None, base: Path
    ) -> None:
        expected = self.gradients(adapted(quantized(base)[0]))
        model = quantized(base)[0]
        before = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.named_parameters()}
        assert prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options) is model
        assert {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.named_parameters()} == before
        assert not trainable(model)
        assert model.is_gradient_checkpointing
        found = self.gradients(adapted(model))
        assert sorted(found) == sorted(expected)
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), name

    def test_without_checkpointing(self, base: Path) -> None:
        model = prepare_model_for_kbit_training(quantized(base)[0], use_gradient_checkpointing=False)
        assert not model.is_gradient_checkpointing
        assert not trainable(model)


class TestParts:
    @pytest.mark.parametrize("kind", KINDS)
    def test_all_that_is_stored_is_told(self, kind: str, base: Path, tmp_path: Path) -> None:
        model = quantized(base, kind)[0]
        parts = slimtune.parts(model)
        assert parts.rows[kind].modules == {"linear layer": 14}
        assert parts.rows["bfloat16"].modules == {"embedding": 1, "norm": 5, "linear layer": 1}
        model.save_pretrained(tmp_path / "saved")
        stored = load_file(tmp_path / "saved" / "model.safetensors")
        packed = [name for name in stored if "_proj." in name]
        # A table of 256 entries that all scales of scales share is written once a module, a state as text beside it.
        extra = {"weight_format", "bitsandbytes__nf4"}
        told = sum(stored[name].nbytes for name in packed if name.rpartition(".")[2] not in extra)
        assert parts.rows[kind].bytes == pytest.approx(told, abs=14 * 1024)
        rest = sum(tensor.nbytes for name, tensor in stored.items() if name not in packed)
        assert parts.rows["bfloat16"].bytes == rest
        assert f"14 linear layers in {kind}" in parts.line
        assert kind in str(parts)
        assert str(slimtune.parts(adapted(model))) == str(parts)

    def test_tied_weights_count_once(self, tmp_path: Path) -> None:
        model = slimtune.load(save_base(tmp_path / "tied", tie_word_embeddings=True))[0]
        assert slimtune.parts(model).rows["float32"].bytes == pytest.approx(
            sum(parameter.nbytes for parameter in model.parameters()), abs=1000
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_codes_count_as_the_numbers_that_they_stand_for(self, kind: str, base: Path) -> None:
        settings = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
        plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**settings))
        options: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        expected = peft.get_peft_model(plain, peft.LoraConfig(**options)).get_nb_trainable_parameters()
        model = get_peft_model(quantized(base, kind)[0], LoraConfig(**options))
        assert model.get_nb_trainable_parameters() == expected
        assert model.coverage().total == expected[1]
        assert f"float32 on {kind}" in str(model.coverage())
