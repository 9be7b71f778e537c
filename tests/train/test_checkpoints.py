"""Checkpoints are whole or not there; the best of them is written; what a run is told, it goes by after a break too."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from slimtune import AdaLoraConfig, LoraConfig, get_peft_model
from slimtune.data.encode import encode
from slimtune.data.rows import Conversation
from slimtune.errors import ConfigError, MissingDependencyError, OutputExistsError, TrainingError
from slimtune.recipe.training import SCHEDULERS, TrainSettings
from slimtune.train.checkpointing import FACTS, check_same_run, last_whole
from slimtune.train.checks import DivergedError, InterruptedRunError
from slimtune.train.loop import Outcome, fine_tune
from small_text_model import orders, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = [Conversation.model_validate({"messages": order.messages()}) for order in orders(28)]
EXAMPLES = encode(ROWS, TOKENIZER, 512).examples


def adopted(method: str = "lora") -> Any:
    torch.manual_seed(5)
    if method == "adalora":
        return get_peft_model(tiny_model(), AdaLoraConfig(init_r=4, target_r=2, target_modules=["q_proj", "v_proj"]))
    return get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))


def train(
    folder: Path,
    model: Any = None,
    resume: bool = False,
    stop_after: int | None = None,
    judge: Any = None,
    **given: Any,
) -> tuple[Outcome, Any, str]:
    """A run of 12 steps; `stop_after` sends Ctrl-C in the step of that batch."""
    model = model or adopted()
    chosen = TrainSettings(**{"learning_rate": 0.01, "max_steps": 12, "batch_size": 4} | given)
    screen = Console(record=True, width=300, file=(folder.parent / "screen.txt").open("a"))
    held_out = EXAMPLES[20:] if chosen.of_held_out else []
    with interrupted(model, stop_after):
        outcome = fine_tune(
            model, TOKENIZER, EXAMPLES[:20], chosen, folder, screen, held_out, judge=judge, resume=resume
        )
    return outcome, model, screen.export_text()


@contextmanager
def interrupted(model: Any, batch: int | None) -> Iterator[None]:
    calls = 0

    def count(module: Any, *_: Any) -> None:
        nonlocal calls
        calls += module.training and torch.is_grad_enabled()
        if calls == batch:
            signal.raise_signal(signal.SIGINT)

    hook = model.model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def adapter(model: Any, folder: Path) -> bytes:
    model.save_pretrained(folder)
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "given",
    [
        {"logging_steps": 5},
        {"gradient_accumulation": 3, "max_steps": 7, "scheduler": "cosine_with_restarts"},
        {"scheduler": "reduce_lr_on_plateau", "scheduler_options": {"patience": 0}, "eval_steps": 2},
        {"eval_steps": 5, "keep_best": "loss", "samples": 1, "scheduler": "warmup_stable_decay",
         "scheduler_options": {"num_decay_steps": 4}},
        {"eval_steps": 1, "early_stopping_patience": 3, "learning_rate": 0.3},
        {"lora_plus_ratio": 8, "optim": "adafactor"},
        {"optim": "adamw_8bit"},
        {"method": "adalora", "save_steps": 1},
        {"group_prefixes": True, "batch_size": 3},
    ],
    ids=lambda given: " ".join(map(str, given)),
)  # fmt: skip
def test_stopped_after_any_step_it_ends_the_same(given: dict[str, Any], tmp_path: Path) -> None:
    """Weights, loss.jsonl, samples.jsonl and what the outcome says, the seconds apart."""
    method = given.pop("method", "lora")
    whole, model, _ = train(tmp_path / "whole", adopted(method), **given)
    expected = adapter(model, tmp_path / "a")
    for batch in (1, 6):
        folder = tmp_path / f"after-{batch}"
        with pytest.raises(InterruptedRunError):
            train(folder, adopted(method), stop_after=batch, **given)
        outcome, model, _ = train(folder, adopted(method), resume=True, **given)
        assert adapter(model, tmp_path / "b") == expected
        for log in ("loss.jsonl", "samples.jsonl"):
            assert read(folder / log) == read(tmp_path / "whole" / log)
        seen = (outcome.steps, outcome.tokens, outcome.final_loss, outcome.eval_loss, outcome.best_step)
        assert seen == (whole.steps, whole.tokens, whole.final_loss, whole.eval_loss, whole.best_step)


def read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def test_a_run_of_an_earlier_version_knew_fewer_settings(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(tmp_path / "run", stop_after=1)
    facts = next((tmp_path / "run").glob(f"checkpoint-*/{FACTS}"))
    written = json.loads(facts.read_text())
    assert written["identity"].pop("training.group_prefixes") is False
    then, now = written["identity"], {"training.group_prefixes": False} | written["identity"]
    check_same_run(tmp_path, then, now)
    with pytest.raises(ConfigError, match=r"training\.group_prefixes was False and is True"):
        check_same_run(tmp_path, then, now | {"training.group_prefixes": True})


def test_the_best_weights_are_written_and_their_step_said(tmp_path: Path) -> None:
    """At this rate the second step is one too many."""
    # Shared prefixes draw dropout in another order.
    given = {"learning_rate": 1.0, "scheduler": "constant", "max_steps": 2, "eval_steps": 1, "share_prefixes": False}
    outcome, model, _ = train(tmp_path / "run", **given, keep_best="loss", save_total_limit=1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    first, second = (line["eval_loss"] for line in lines if "eval_loss" in line)
    assert first < second
    assert (outcome.best_step, outcome.eval_loss) == (1, first)
    last, other, _ = train(tmp_path / "other", **given)
    assert (last.best_step, last.eval_loss) == (None, second)
    _, expected, _ = train(tmp_path / "one", **given | {"max_steps": 1})
    assert adapter(model, tmp_path / "a") == adapter(expected, tmp_path / "b") != adapter(other, tmp_path / "c")


def test_best_by_a_score_of_the_task(tmp_path: Path) -> None:
    scores = iter([0.1, 0.5, 0.4, 0.3])
    outcome, _, _ = train(tmp_path / "run", eval_steps=3, keep_best="f1", judge=lambda model: {"f1": next(scores)})
    assert outcome.best_step == 6
    with pytest.raises(
        TrainingError, match="'acuracy', and the evaluation gives accuracy, loss; did you mean 'accuracy'"
    ):
        train(tmp_path / "other", eval_steps=3, keep_best="acuracy", judge=lambda model: {"accuracy": 0.0})


def test_early_stopping_counts_evaluations(tmp_path: Path) -> None:
    scores = iter([0.3, 0.5, 0.5, 0.4])
    outcome, _, _ = train(
        tmp_path / "run", eval_steps=2, keep_best="f1", early_stopping_patience=2,
        judge=lambda model: {"f1": next(scores)},
    )  # fmt: skip
    assert (outcome.steps, outcome.best_step) == (8, 4)


def test_samples_are_shown_and_written(tmp_path: Path) -> None:
    _, _, shown = train(tmp_path / "run", eval_steps=6, samples=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6] * 3 + [12] * 3
    assert json.loads(lines[0]["expected"])["name"]
    assert shown.count("answered") == 6
    assert lines[0]["prompt"].endswith("assistant")


def test_what_looks_at_held_out_examples_needs_some(tmp_path: Path) -> None:
    settings = TrainSettings(keep_best="loss", samples=2)
    with pytest.raises(ConfigError, match="keep_best, samples look at held-out examples, and there are none"):
        fine_tune(adopted(), TOKENIZER, EXAMPLES, settings, tmp_path, Console(quiet=True))


def test_checkpoints_are_rotated_and_the_last_whole_one_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, model, _ = train(run, save_steps=2, save_total_limit=3)
    expected = adapter(model, tmp_path / "a")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12", "checkpoint-8"]
    # One that was cut short, and one of which a byte has changed.
    (run / "checkpoint-12" / "manifest.json").unlink()
    damaged = run / "checkpoint-10" / "weights-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    _, model, shown = train(run, save_steps=2, save_total_limit=3, resume=True)
    assert "checkpoint-12 is passed over: FileNotFoundError" in shown
    assert "checkpoint-10 is passed over: weights-00001.safetensors doesn't match its checksum" in shown
    assert "going on after step 8" in shown
    assert adapter(model, tmp_path / "b") == expected


def test_a_run_is_not_begun_over_one_that_was_broken_off(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(tmp_path / "run", stop_after=3)
    with pytest.raises(OutputExistsError, match="a checkpoint of step 3; pass --resume"):
        train(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"training.weight_decay was 0.0 and is 0.5"):
        train(tmp_path / "run", resume=True, weight_decay=0.5)
    other = get_peft_model(tiny_model(seed=1), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    with pytest.raises(ConfigError, match="the base's weights"):
        train(tmp_path / "run", other, resume=True)


def test_a_resumed_run_that_does_not_repeat_says_so(tmp_path: Path) -> None:
    """What was written for steps after the checkpoint is held against what they come to now."""
    with pytest.raises(InterruptedRunError):
        train(tmp_path / "run", stop_after=6)
    log = tmp_path / "run" / "loss.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 7, "loss": 9.0}) + '\n{"step": 8, "lo')
    _, _, shown = train(tmp_path / "run", resume=True)
    assert "step 7 had a loss of 9.0 before the run was broken off" in shown


@pytest.mark.parametrize("full", ["files", "the file system"])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(full: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with disk(full, run) as fill:
        with pytest.raises(TrainingError, match=r"step 8 was not written: .*; that of step 4 is whole"):
            train(run, filling(fill, adopted()), save_steps=4, share_prefixes=False)
        found = last_whole(run)
        assert found is not None
        assert found.step == 4
        assert not list(run.glob("*.partial"))


def filling(fill: Any, model: Any) -> Any:
    calls = 0

    def count(module: Any, *_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            fill()

    model.model.register_forward_pre_hook(count)
    return model


@contextmanager
def disk(kind: str, folder: Path) -> Iterator[Any]:
    """Yields what fills the disk."""
    folder.mkdir()
    if kind.startswith("files"):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield lambda: _fill(folder / "filled")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_a_diverged_full_tuning_goes_back_to_its_last_checkpoint(tmp_path: Path) -> None:
    """A copy of all weights would double them, so that a checkpoint is what there is."""
    model, run, calls = tiny_model(), tmp_path / "run", 0

    def spoil(module: Any, *_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            model.lm_head.weight.data.fill_(float("nan"))

    model.model.register_forward_pre_hook(spoil)
    with pytest.raises(DivergedError, match=r"loss became nan in step 7") as caught:
        train(run, model, save_steps=2, share_prefixes=False)
    assert caught.value.kept_steps == 6
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert len((run / "loss.jsonl").read_text().splitlines()) == 6


def test_all_schedulers_of_transformers_are_there() -> None:
    from transformers import SchedulerType

    assert set(SCHEDULERS) == {kind.value for kind in SchedulerType}


def test_a_scheduler_that_lacks_its_options_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"warmup_stable_decay doesn't run with no options: .*num_decay_steps"):
        train(tmp_path / "run", scheduler="warmup_stable_decay")
    with pytest.raises(ConfigError, match=r"linear doesn't run with scheduler_options .*min_lr"):
        train(tmp_path / "run", scheduler="linear", scheduler_options={"min_lr": 1e-5})


def test_a_process_without_a_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes, and RANK.*--launch 2"):
        train(tmp_path / "run")


def test_a_tracker_that_is_not_installed_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tracker 'wandbb'; did you mean 'wandb'"):
        TrainSettings(report_to="wandbb")
    with pytest.raises(MissingDependencyError, match="pip install neptune"):
        train(tmp_path / "run", report_to=["neptune"])


def test_what_is_reported_reaches_the_tracker(tmp_path: Path) -> None:
    """TensorBoard's files hold the losses of loss.jsonl, the one of the held-out examples too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", report_to="tensorboard", eval_steps=4)
    (file,) = (tmp_path / "run" / "runs").rglob("events.*")
    events = EventAccumulator(str(file))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        written = {line["step"]: line[name] for line in lines if name in line}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(written, rel=1e-6)
        assert len(written) >= 3
