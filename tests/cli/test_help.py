"""Help comes at once and shows an example for each command."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer

COMMANDS = ("demo", "plan", "train", "compare", "chat", "generate", "predict", "methods", "info", "merge", "doctor",
            "demo-data", "evaluate", "forgetting", "spectra", "recipe", "data", "serve", "serve-key", "quantize",
            "distill", "prune", "slim", "export", "push", "completion")  # fmt: skip


def test_help_lists_every_command_and_the_exit_codes(run: Any) -> None:
    shown = run("--help").stdout
    assert all(command in shown for command in COMMANDS)
    assert "Exit codes" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example(run: Any, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"slimtune {command}" in " ".join(result.stdout.split())


def test_paragraphs_break_where_the_screen_ends() -> None:
    from slimtune.cli import app

    commands: Any = typer.main.get_command(app)
    assert all("\n" not in str(command.help).replace("\n\n", "") for command in commands.commands.values())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from slimtune.cli import app\n"
        f"try: app([{command!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--warmup", 0.1], "there is no option --warmup; write training.warmup=0.1"),
        (["train", "--max-grad-norm=2"], "write training.max_grad_norm=2"),
        (["train", "--gradient-checkpointing"], "write training.gradient_checkpointing=true"),
        (["train", "--target-modules", "q_proj,v_proj"], "write 'method.target_modules=[q_proj,v_proj]'"),
        (["train", "--rank-pattern", "q_proj=2"], "write method.rank_pattern.q_proj=2"),
        (["train", "--dropout", 0.1], "write method.lora_dropout=0.1"),
        (["train", "--init", "pissa"], "write method.init_lora_weights=pissa"),
        (["train", "--set", "use_rslora=true"], "write method.use_rslora=true"),
        (["train", "--eval-fraction", 0.1], "write data.held_out=0.1"),
        (["train", "--packing"], "write data.packing=true"),
        (["train", "--warmp", 0.1], "there is no option --warmp; did you mean training.warmup?"),
        (["train", "--learning-rat", 0.1], "did you mean --learning-rate?"),
        (["plan", "--optim", "sgd"], "write training.optim=sgd"),
        (["plan", "--no-gradient-checkpointing"], "write training.gradient_checkpointing=false"),
        (["plan", "training.warmup=3"], "training.warmup changes nothing in a plan"),
    ],
)
def test_what_is_no_option_is_answered_with_the_key(run: Any, arguments: list[Any], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("slimtune: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_the_version(run: Any) -> None:
    import slimtune

    assert run("--version").stdout.strip() == slimtune.__version__


def test_demo_data_can_be_trained_on(run: Any, tmp_path: Any) -> None:
    from slimtune.data.demo_orders import make_orders
    from slimtune.data.reading import read_rows

    assert run("demo-data", "-o", tmp_path / "orders", "--train", 5, "--held-out", 3, "--seed", 2).exit_code == 0
    train, held_out = make_orders(5, 3, seed=2)
    for name, examples in (("train", train), ("held_out", held_out)):
        rows: Any = read_rows(tmp_path / "orders" / f"{name}.jsonl")
        assert [row.turns() for row in rows] == [example.messages() for example in examples]
