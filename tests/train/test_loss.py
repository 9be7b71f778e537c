"""The loss is that of every learned token of a step, however a step is cut up, and that of others who compute it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console

from slimtune import AdaLoraConfig, LoraConfig, get_peft_model
from slimtune.data.batches import Encoded, PadRight, classification
from slimtune.methods.adalora import SvdDelta
from slimtune.recipe.training import TrainSettings
from slimtune.train.checks import trainable
from slimtune.train.loop import fine_tune
from small_encoder import encoder_tokenizer, reviews, save_encoder
from small_text_model import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def uneven(count: int, seed: int = 0) -> list[Encoded]:
    """Between 3 and 90 tokens, of which between 1 and all but one are learned."""
    draw = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draw))

    examples = []
    for _ in range(count):
        length = pick(3, 90)
        ids = torch.randint(3, 500, (length,), generator=draw).tolist()
        start = pick(1, length)
        examples.append(Encoded(ids, [-100] * start + ids[start:]))
    return examples


def text_model(method: str) -> Any:
    torch.manual_seed(3)
    if method == "full":
        return tiny_model().requires_grad_(True)
    targets: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    config = AdaLoraConfig(init_r=4, target_r=2, **targets) if method == "adalora" else LoraConfig(r=4, **targets)
    return get_peft_model(tiny_model(), config)


def losses(
    model: Any, folder: Path, examples: Sequence[Any], tokenizer: Any = TOKENIZER, objective: Any = None, **given: Any
) -> torch.Tensor:
    settings = TrainSettings(**{"learning_rate": 3e-3, "max_steps": 4, "warmup": 0} | given)
    folder.mkdir()
    fine_tune(model, tokenizer, examples, settings, folder, Console(quiet=True), objective=objective)
    lines = (folder / "loss.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


@pytest.mark.parametrize("method", ["lora", "adalora", "full"])
def test_eight_batches_of_one_are_one_batch_of_eight(method: str, tmp_path: Path) -> None:
    """Twenty examples, so that the last step of an epoch has fewer."""
    found = {}
    for batch, accumulated in ((8, 1), (1, 8), (2, 4)):
        model = text_model(method)
        given = {"batch_size": batch, "gradient_accumulation": accumulated}
        found[batch] = losses(model, tmp_path / str(batch), uneven(20), **given), trainable(model)
    for batch in (1, 2):
        torch.testing.assert_close(found[batch][0], found[8][0], rtol=1e-5, atol=0)
        for name, parameter in found[batch][1].items():
            # Adam divides by the root of the squared gradient, where a rounding can grow.
            torch.testing.assert_close(parameter, found[8][1][name], rtol=1e-2, atol=2e-5)


def test_eight_texts_of_one_are_one_batch_of_eight_to_a_classifier(tmp_path: Path) -> None:
    base, tokenizer = save_encoder(tmp_path / "base"), encoder_tokenizer()
    rows = reviews(20)
    encoded = [dict(tokenizer(row["text"])) | {"labels": ["bad", "good"].index(row["label"])} for row in rows]
    found = []
    for batch in (8, 1):
        transformers.set_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        model = get_peft_model(model, LoraConfig(r=4, task_type="SEQ_CLS"))
        given = {"batch_size": batch, "gradient_accumulation": 8 // batch}
        found.append(losses(model, tmp_path / str(batch), encoded, tokenizer, classification(tokenizer), **given))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_the_curve_is_that_of_transformers_with_peft(tmp_path: Path) -> None:
    """Ten steps from the same start, in batches of uneven rows, accumulated."""
    examples = uneven(40)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
    ours = get_peft_model(tiny_model(), LoraConfig(**options))
    theirs = peft.get_peft_model(tiny_model(), peft.LoraConfig(**options))
    ours.save_pretrained(tmp_path / "start")
    theirs.load_adapter(tmp_path / "start", "default", is_trainable=True)
    given = {"batch_size": 4, "gradient_accumulation": 2, "max_steps": 10, "learning_rate": 5e-3}
    found = losses(ours, tmp_path / "ours", examples, **given)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=10,
        learning_rate=5e-3, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", seed=0, data_seed=0,
        optim="adamw_torch_fused", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(theirs, arguments, PadRight(TOKENIZER.pad_token_id), examples)  # type: ignore[arg-type]
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(expected)) == 10
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=0)


def test_the_part_of_adalora_joins_a_loss_that_is_made_of_the_logits(tmp_path: Path) -> None:
    base, tokenizer = save_encoder(tmp_path / "base"), encoder_tokenizer()
    encoded = [dict(tokenizer(row["text"])) | {"labels": int(row["label"] == "good")} for row in reviews(8)]
    found = {}
    for weight in (0.0, 0.5):
        transformers.set_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        config = AdaLoraConfig(
            init_r=4, target_r=2, target_modules=["query"], orth_reg_weight=weight, task_type="SEQ_CLS"
        )
        model = get_peft_model(model, config)
        expected = 0.5 * torch.stack([d.detach() for delta in factors(model) for d in delta.distances()]).mean()
        given = {"batch_size": 4, "gradient_accumulation": 2, "max_steps": 1}
        found[weight] = losses(model, tmp_path / str(weight), encoded, tokenizer, classification(tokenizer), **given)
    torch.testing.assert_close(found[0.5] - found[0.0], expected.double().reshape(1), rtol=1e-5, atol=0)


def factors(model: Any) -> list[SvdDelta]:
    return [module for module in model.modules() if isinstance(module, SvdDelta)]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_changes_no_step(method: str, tmp_path: Path) -> None:
    examples = uneven(16)
    plain, saving = (
        losses(text_model(method), tmp_path / str(on), examples, batch_size=4, gradient_checkpointing=on)
        for on in (False, True)
    )
    torch.testing.assert_close(plain, saving, rtol=1e-6, atol=0)
