"""A run is on one device: where several GPUs are visible it says so, and another than the first is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainingArguments

from slimtune import LoraConfig, get_peft_model
from slimtune.data.batches import Encoded, Objective, PadRight
from slimtune.errors import ConfigError
from slimtune.recipe.training import TrainSettings
from slimtune.train.arguments import check_device, use_one_gpu
from slimtune.train.loop import fine_tune
from slimtune.train.trainer import TrainerSpec, supervised
from small_text_model import tiny_model, tiny_tokenizer


def seeing_four(**options: Any) -> TrainingArguments:
    """As transformers fills them in where four GPUs are visible to one process."""
    arguments = TrainingArguments(**options)
    arguments._n_gpu = 4
    return arguments


def test_one_of_several_gpus_trains_and_it_is_said(tmp_path: Path) -> None:
    tokenizer, screen = tiny_tokenizer(), Console(record=True, width=300, file=io.StringIO())
    plain = supervised(Objective(PadRight(tokenizer.pad_token_id)))
    examples = [Encoded([5, 6, 7, 8], [-100, 6, 7, 8])] * 12
    seen: list[int] = []
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.register_forward_pre_hook(
        lambda module, _, given: seen.append(len(given["input_ids"])),
        with_kwargs=True,  # type: ignore[arg-type]
    )
    # What rows share is tried before, by passes of its own.
    settings = TrainSettings(max_steps=3, batch_size=2, share_prefixes=False)
    kind = TrainerSpec(plain.trainer, seeing_four)
    outcome = fine_tune(model, tokenizer, examples, settings, tmp_path, screen, spec=kind)
    assert outcome.tokens == 3 * 2 * 4
    assert seen == [2, 2, 2]
    assert "4 GPUs are visible, of which cpu trains; CUDA_VISIBLE_DEVICES chooses" in screen.export_text()


def test_with_one_nothing_is_said(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert use_one_gpu(arguments, lambda what: pytest.fail(what)) is arguments


@pytest.mark.parametrize(("visible", "name"), [(None, "1"), ("", "1"), ("4,6", "6"), ("5", "1")])
def test_another_gpu_is_refused_with_the_way_to_have_it(
    visible: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=f"not cuda:1; set CUDA_VISIBLE_DEVICES={name} and pass cuda"):
        check_device("cuda:1")
    assert [check_device(device) for device in ("cpu", "cuda", "cuda:0", "mps")] == ["cpu", "cuda", "cuda", "mps"]
