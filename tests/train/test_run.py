"""A run keeps watch: over numbers that are none, over deltas that rest, and over the model it was given."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from slimtune import LoraConfig, get_peft_model
from slimtune.data.batches import Encoded
from slimtune.data.encode import encode
from slimtune.data.rows import Conversation
from slimtune.errors import TrainingError
from slimtune.recipe.training import TrainSettings
from slimtune.train.checks import DivergedError, InterruptedRunError, trainable
from slimtune.train.loop import Outcome, fine_tune
from small_text_model import orders, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def examples(count: int = 16) -> list[Encoded]:
    rows = [Conversation.model_validate({"messages": order.messages()}) for order in orders(count)]
    return encode(rows, TOKENIZER, 512).examples


def adopted(**options: Any) -> Any:
    return get_peft_model(tiny_model(), LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options))


def train(
    model: Any, folder: Path, learn_from: list[Encoded] | None = None, resume: bool = False, **settings: Any
) -> tuple[Outcome, str]:
    screen = Console(record=True, width=200, quiet=False, file=(folder / "screen.txt").open("w"))
    chosen = TrainSettings(**{"learning_rate": 0.01, "max_steps": 6, "batch_size": 4} | settings)
    outcome = fine_tune(model, TOKENIZER, learn_from or examples(), chosen, folder, screen, resume=resume)
    return outcome, screen.export_text()


def test_tokens_and_steps_are_counted_without_padding(tmp_path: Path) -> None:
    data = examples(16)
    outcome, _ = train(adopted(), tmp_path, data, max_steps=4)
    assert outcome.steps == 4
    assert outcome.tokens == sum(len(example.input_ids) for example in data)


def test_the_base_is_as_it_was_and_its_settings_too(tmp_path: Path) -> None:
    model = adopted()
    before = {name: p.clone() for name, p in model.named_parameters() if "deltas" not in name}
    train(model, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
    assert model.config.use_cache is True


def test_nothing_trainable_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    model = adopted()
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        train(model, tmp_path)
    with pytest.raises(TrainingError, match="nothing to train"):
        trainable(model)


def test_a_delta_that_gets_no_gradient_is_named(tmp_path: Path) -> None:
    model = adopted()
    model.register_parameter("forgotten", nn.Parameter(torch.ones(3)))
    _, shown = train(model, tmp_path)
    assert "no gradient reached forgotten" in shown


def test_every_delta_of_a_healthy_run_learns(tmp_path: Path) -> None:
    _, shown = train(adopted(), tmp_path)
    assert "warning" not in shown


def test_a_run_in_which_nothing_moves_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="none of the 28 trainable tensors has moved"):
        train(adopted(), tmp_path, learning_rate=1e-45, scheduler="constant")


def test_a_loss_that_is_not_a_number_puts_the_last_good_weights_back(tmp_path: Path) -> None:
    """The update of the third step ruins the weights; the fourth loss tells; those before the third come back."""
    model = adopted()
    seen: list[dict[str, torch.Tensor]] = []
    parameters = trainable(model)

    def spoil(module: Any, *_: Any) -> None:
        if module.training:
            seen.append({name: p.detach().clone() for name, p in parameters.items()})
            if len(seen) == 4:
                with torch.no_grad():
                    next(iter(parameters.values())).fill_(float("nan"))

    model.model.register_forward_pre_hook(spoil)
    with pytest.raises(DivergedError, match=r"loss became nan in step 4.*learning rate") as caught:
        train(model, tmp_path)
    assert caught.value.kept_steps == 2
    assert all(torch.equal(seen[2][name], p) for name, p in parameters.items())
    assert len((tmp_path / "loss.jsonl").read_text().splitlines()) == 3


def test_a_gradient_that_is_not_a_number_never_reaches_the_weights(tmp_path: Path) -> None:
    model = adopted()
    calls = 0

    def ruin(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * float("inf") if calls == 3 else gradient

    next(p for name, p in trainable(model).items() if "lora_B" in name).register_hook(ruin)
    with pytest.raises(DivergedError, match="gradient"):
        train(model, tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_control_c_writes_a_checkpoint_after_the_step_and_says_how_to_go_on(tmp_path: Path) -> None:
    model, steps = adopted(), 0

    def interrupt(module: Any, *_: Any) -> None:
        nonlocal steps
        steps += module.training
        if steps == 4:
            signal.raise_signal(signal.SIGINT)

    hook = model.model.register_forward_pre_hook(interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRunError, match=r"SIGINT after step 4 of 6.*--resume") as caught:
        train(model, tmp_path)
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert len((tmp_path / "loss.jsonl").read_text().splitlines()) == 4
    hook.remove()
    outcome, shown = train(model, tmp_path, resume=True)
    assert "going on after step 4" in shown
    assert outcome.steps == 6


def test_a_second_control_c_stops_at_once(tmp_path: Path) -> None:
    model = adopted()

    def interrupt(module: Any, *_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    model.model.register_forward_pre_hook(interrupt)
    with pytest.raises(InterruptedRunError, match="stopped at once"):
        train(model, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_each_line_of_the_loss_file_tells_a_step(tmp_path: Path) -> None:
    outcome, _ = train(adopted(), tmp_path, scheduler="linear", warmup=0)
    lines = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] == outcome.final_loss
    rates = [line["learning_rate"] for line in lines]
    assert rates == sorted(rates, reverse=True)


def test_a_run_of_one_step_learns(tmp_path: Path) -> None:
    model = adopted()
    train(model, tmp_path, examples(4), max_steps=1)
    (line,) = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert line["learning_rate"] == 0.01
    assert any(parameter.any() for name, parameter in trainable(model).items() if "lora_B" in name)


def test_the_loss_is_transformers_own(tmp_path: Path) -> None:
    """The mean over the learned tokens of the whole batch."""
    data = examples(4)
    outcome, _ = train(adopted(), tmp_path, data, max_steps=1, batch_size=4)
    from slimtune.data.batches import PadRight

    batch = PadRight(TOKENIZER.pad_token_id)(data)
    with torch.no_grad():
        expected = tiny_model()(**batch).loss.item()
    assert outcome.final_loss == pytest.approx(expected, rel=1e-5)
