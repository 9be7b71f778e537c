"""Optimizers by name: they learn, go on where they stopped, keep the state that they say, refuse in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from typer.testing import CliRunner

import slimtune
from quantizers import QUANTIZERS, Quantizer
from slimtune.cli import app
from slimtune.data.batches import Encoded, PadRight
from slimtune.data.encode import encode
from slimtune.data.rows import Conversation
from slimtune.errors import MissingDependencyError, TrainingError
from slimtune.recipe.optimizers import OFFLOADED, OPTIMIZERS, PAGED, TORCHAO, check_runs
from slimtune.recipe.training import TrainSettings
from slimtune.train.checks import trainable
from slimtune.train.loop import fine_tune
from slimtune.train.optimizer import OffloadedAdamW
from small_text_model import orders, save_base, tiny_model, tiny_tokenizer, write_lines
from tensors import assert_same, copies

TOKENIZER = tiny_tokenizer()
RATES = {"sgd": 3.0, "adagrad": 0.05, "adafactor": 0.01, "rmsprop": 3e-3}
ON_THE_CPU = [name for name in OPTIMIZERS if name not in (*PAGED, OFFLOADED)]


def examples(count: int = 16) -> list[Encoded]:
    rows = [Conversation.model_validate({"messages": order.messages()}) for order in orders(count)]
    return encode(rows, TOKENIZER, 512).examples


def adopted() -> Any:
    """Each factor has 4,096 numbers, from which on a state is kept in few bits."""
    torch.manual_seed(0)
    config = slimtune.LoraConfig(r=32, target_modules=["q_proj", "o_proj"], lora_alpha=64)
    return slimtune.get_peft_model(tiny_model(hidden_size=128), config)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_it_learns(name: str, tmp_path: Path) -> None:
    rate = RATES.get(name, 1e-3 if "lion" in name or "rmsprop" in name else 1e-2)
    settings = TrainSettings(rate, max_steps=12, batch_size=8, optim=name, warmup=0, scheduler="constant")
    # torchao's compiled step takes a quarter of a minute to compile; it is the same without.
    with (tmp_path / "screen").open("w") as file, torch.compiler.set_stance("force_eager"):
        fine_tune(adopted(), TOKENIZER, examples(8), settings, tmp_path, Console(file=file))
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in (tmp_path / "loss.jsonl").open()]
    assert losses[-1] < 0.9 * losses[0]


def run(model: Any, folder: Path, steps: int, resume: bool = False, **options: Any) -> Trainer:
    """transformers' own Trainer, as it is."""
    arguments = {
        "optim": "adamw_8bit", "learning_rate": 1e-2, "max_steps": steps, "per_device_train_batch_size": 4,
        "save_steps": 2, "report_to": "none", "use_cpu": True, "remove_unused_columns": False,
        "lr_scheduler_type": "constant", "disable_tqdm": True,
    }  # fmt: skip
    trainer_options = {"optimizer_cls_and_kwargs": options.pop("optimizer_cls_and_kwargs", None)}
    args = TrainingArguments(str(folder), **{**arguments, **options})
    collate = PadRight(0)
    trainer = Trainer(model, args, train_dataset=examples(), data_collator=collate, **trainer_options)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


CONTINUED: dict[str, dict[str, Any]] = {
    name: {"optim": name} for name in ("adamw_8bit", "ademamix_8bit", "adafactor")
} | {OFFLOADED: {"optimizer_cls_and_kwargs": (OffloadedAdamW, {"lr": 1e-2})}}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CONTINUED)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    options = CONTINUED[name]
    whole = adopted()
    run(whole, tmp_path / "whole", 4, **options)
    run(adopted(), tmp_path / "cut", 2, **options)
    resumed = adopted()
    run(resumed, tmp_path / "cut", 4, resume=True, **options)
    assert_same(dict(trainable(resumed)), dict(trainable(whole)))


def state_bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


@pytest.mark.parametrize(("name", "least", "most"), [("adamw_torch", 8.0, 8.01), ("adamw_8bit", 2.0, 2.6)])
def test_the_bytes_of_state_for_each_parameter(name: str, least: float, most: float, tmp_path: Path) -> None:
    """8 bits twice, and for each tensor two code books of 1 KB and a scale for each block of 256."""
    model = adopted()
    trainer = run(model, tmp_path, 1, optim=name, save_strategy="no")
    states = trainer.optimizer.state  # type: ignore[union-attr]
    count = sum(parameter.numel() for parameter in trainable(model).values())
    assert least <= sum(state_bytes(state.values()) for state in states.values()) / count <= most
    if name == "adamw_8bit":
        assert {state["state1"].dtype for state in states.values()} == {torch.uint8}


def test_8_bits_go_where_32_bits_go() -> None:
    """The steps of the 8-bit state stay within a few hundredths of the whole way."""
    torch.manual_seed(1)
    start, target = torch.randn(64, 64), torch.randn(64, 64)
    ends = []
    for make in (torch.optim.AdamW, bnb.optim.AdamW8bit):
        weight = nn.Parameter(start.clone())
        chosen: Any = make([weight], lr=1e-2)
        for _ in range(60):
            chosen.zero_grad()
            (weight - target).square().sum().backward()
            chosen.step()
        ends.append(weight.detach())
    assert (ends[0] - start).norm() > 10
    assert (ends[1] - ends[0]).norm() < 0.05 * (ends[0] - start).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_offloaded_one_is_torch_s_step_for_step(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    start = [torch.randn(7, 5).to(dtype), torch.randn(5).to(dtype)]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(8)]
    ends = []
    for kind, options in ((torch.optim.AdamW, {"fused": True}), (OffloadedAdamW, {})):
        parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "lr": 3e-3}]
        made: Any = kind(groups, lr=1e-2, weight_decay=0.0, **options)
        schedule = torch.optim.lr_scheduler.LinearLR(made, 1.0, 0.1, 8)
        for number, step in enumerate(gradients):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            made.step()
            schedule.step()
            if number == 3:
                stored, made = made.state_dict(), kind(made.param_groups, lr=1e-2, **options)
                made.load_state_dict(stored)
                schedule.optimizer = made
        ends.append({str(i): parameter.detach() for i, parameter in enumerate(parameters)})
    assert_same(ends[1], ends[0])
    assert not torch.equal(ends[0]["0"], start[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_offloaded_state_is_in_main_memory(tmp_path: Path) -> None:
    model, beside = tiny_model().cuda(), tiny_model().cuda()
    made, plain = (kind(m.parameters(), lr=1e-2) for kind, m in ((OffloadedAdamW, model), (torch.optim.AdamW, beside)))
    ids = torch.randint(4, 500, (2, 9), device="cuda")
    for _ in range(3):
        for one, chosen in ((model, made), (beside, plain)):
            chosen.zero_grad()
            one(ids, labels=ids).loss.backward()
            chosen.step()
    made.load_state_dict(made.state_dict())
    assert {tensor.device.type for state in made.state.values() for tensor in state.values()} == {"cpu"}
    for ours, theirs in zip(model.parameters(), beside.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", [*PAGED, OFFLOADED])
def test_on_cuda_the_others_learn_too(name: str, tmp_path: Path) -> None:
    settings = TrainSettings(1e-3 if "lion" in name else 1e-2, max_steps=12, batch_size=8, optim=name, warmup=0)
    with (tmp_path / "screen").open("w") as file:
        fine_tune(adopted().cuda(), TOKENIZER, examples(8), settings, tmp_path, Console(file=file))
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in (tmp_path / "loss.jsonl").open()]
    assert losses[-1] < 0.9 * losses[0]


def test_the_groups_of_lora_plus_are_kept(tmp_path: Path) -> None:
    """B learns faster than A by the ratio, whatever the optimizer; a step of Lion is the rate itself."""
    model = adopted()
    before = copies(dict(trainable(model)))
    settings = TrainSettings(
        1e-3, max_steps=2, batch_size=8, optim="lion_8bit", lora_plus_ratio=16, warmup=0, scheduler="constant"
    )
    with (tmp_path / "screen").open("w") as file:
        fine_tune(model, TOKENIZER, examples(8), settings, tmp_path, Console(file=file))
    moved = {name: float((tensor - before[name]).detach().abs().max()) for name, tensor in trainable(model).items()}
    for name, far in moved.items():
        # In the first step A has no gradient, for B is zero.
        assert far == pytest.approx(2 * 16e-3 if "lora_B" in name else 1e-3, rel=0.01)


@pytest.mark.parametrize("four_bit", [q for q in QUANTIZERS if q.name == "nf4-double"], ids=repr)
def test_transformers_trainer_with_8_bits_on_a_quantized_base(four_bit: Quantizer, tmp_path: Path) -> None:
    model = four_bit.model(tiny_model(hidden_size=128))
    model = slimtune.get_peft_model(model, slimtune.LoraConfig(r=32, target_modules=["q_proj", "o_proj"]))
    before = copies(dict(model.named_parameters()))
    trainer = run(model, tmp_path / "run", 8, logging_steps=1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


def test_every_name_but_one_is_transformers() -> None:
    assert set(OPTIMIZERS) - {OFFLOADED} <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamw_8bt", "did you mean 'adamw_8bit'"),
        ("galore_adamw", "no optimizer 'galore_adamw'; pass one of"),
        ("paged_adamw_8bit", "a CUDA device and main memory, and the model is on cpu; pass training.optim=adamw_8bit"),
        (OFFLOADED, "would change nothing: the model is on the CPU"),
    ],
)
def test_on_the_command_line_a_mistake_is_told_before_the_model_is_loaded(
    name: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_text("no model")
    data = write_lines(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    command = ["train", str(tmp_path / "base"), str(data), "--output", str(tmp_path / "out"), "model.device=cpu"]
    result = CliRunner().invoke(app, [*command, f"training.optim={name}"])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for library in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=r"slimtune\[quantized\]"):
        check_runs("adamw_8bit", "cpu")
    with pytest.raises(MissingDependencyError, match=r"slimtune\[torchao\]"):
        check_runs(TORCHAO[0], "cuda")
    check_runs("adafactor", "cpu")
    monkeypatch.undo()
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(TrainingError, match="no-compiler"):
        check_runs(TORCHAO[0], "cpu")


def test_the_command_line_trains_with_it_and_the_card_says_so(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    data = write_lines(tmp_path / "rows.jsonl", *({"messages": order.messages()} for order in orders(8)))
    command = ["train", str(base), str(data), "--output", str(tmp_path / "out"), "--max-steps", "2", "model.device=cpu"]
    result = CliRunner().invoke(app, [*command, "training.optim=adamw_8bit"])
    assert result.exit_code == 0, result.output
    assert "| optim | adamw_8bit |" in (tmp_path / "out" / "README.md").read_text()
