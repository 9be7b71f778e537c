"""`slimtune completion`: the script by which a shell completes commands, options and what goes behind them."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.completion import get_completion_inspect_parameters, shell_complete

from slimtune.errors import check_choice

SHELLS = ("bash", "zsh", "fish")
PROGRAM, VARIABLE = "slimtune", "_SLIMTUNE_COMPLETE"

# Makes the shells known to typer, which does so by itself only where it brings options of its own for this.
get_completion_inspect_parameters()


def completion(
    ctx: typer.Context,
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", autocompletion=lambda: SHELLS)],
) -> None:
    """Print the script by which a shell completes commands, options, methods, recipes, models and devices.

    For bash put `eval "$(slimtune completion bash)"` into ~/.bashrc, for zsh `eval "$(slimtune completion zsh)"` into
    ~/.zshrc below compinit, and for fish write what it prints to ~/.config/fish/completions/slimtune.fish.

    Example: slimtune completion bash >> ~/.bashrc
    """
    check_choice("the shell", shell, SHELLS)
    shell_complete(ctx.find_root().command, {}, PROGRAM, VARIABLE, f"source_{shell}")
