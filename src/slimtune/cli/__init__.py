"""The command line: one file a command, nothing heavy imported before a command needs it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, ClassVar, NoReturn, cast

import typer
from typer.core import TyperCommand, TyperGroup

from slimtune.cli.chat import chat
from slimtune.cli.compare import compare
from slimtune.cli.completion import completion
from slimtune.cli.data import data
from slimtune.cli.demo import demo, demo_data
from slimtune.cli.distill import distill
from slimtune.cli.doctor import doctor
from slimtune.cli.evaluate import evaluate
from slimtune.cli.export import export
from slimtune.cli.forgetting import forgetting
from slimtune.cli.generate import generate
from slimtune.cli.info import info
from slimtune.cli.merge import merge
from slimtune.cli.methods import methods
from slimtune.cli.options import RecipeCommand
from slimtune.cli.plan import plan
from slimtune.cli.predict import predict
from slimtune.cli.prune import prune
from slimtune.cli.push import push
from slimtune.cli.quantize import quantize
from slimtune.cli.recipe import recipe
from slimtune.cli.serve import serve
from slimtune.cli.serve_key import serve_key
from slimtune.cli.slim import slim
from slimtune.cli.spectra import spectra
from slimtune.cli.studio import studio
from slimtune.cli.train import train
from slimtune.console.failures import sentence_of
from slimtune.console.noise import leave_out_noise, set_up_logging
from slimtune.console.process import report_failure
from slimtune.console.screen import say, silence
from slimtune.errors import DoesNotFitError, MergeError, SlimtuneError, is_out_of_memory

REFUSED, MISTAKE, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141
"""Exit codes; the last two are 128 and the number of the signal, as shells report SIGINT and SIGPIPE."""

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "plan": plan,
    "train": train,
    "distill": distill,
    "prune": prune,
    "slim": slim,
    "compare": compare,
    "chat": chat,
    "generate": generate,
    "predict": predict,
    "serve": serve,
    "serve-key": serve_key,
    "studio": studio,
    "evaluate": evaluate,
    "forgetting": forgetting,
    "spectra": spectra,
    "methods": methods,
    "info": info,
    "quantize": quantize,
    "export": export,
    "merge": merge,
    "push": push,
    "doctor": doctor,
    "demo-data": demo_data,
    "completion": completion,
}
"""Name to function, in the order in which `slimtune --help` lists them; their docstrings are the help."""


class CommandOnDemand(TyperCommand):
    """A command whose options are made when it is called, not when `slimtune --help` lists its first line.

    To make those of all commands takes longer than most of them take to answer.
    """

    def __init__(self, name: str, function: Callable[..., None]) -> None:
        """Take over the name and the docstring, with paragraphs of one line, which break where the screen ends."""
        paragraphs = (function.__doc__ or "").split("\n\n")
        super().__init__(name, help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))
        self._function = function

    @cached_property
    def whole(self) -> TyperCommand:
        """The command with its options."""
        one = typer.Typer(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)
        kind = RecipeCommand if self._function in (plan, train, distill) else None
        one.command(self.name, cls=kind, help=self.help)(self._function)
        return cast("TyperCommand", typer.main.get_command(one))

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Read the arguments by the whole command, which the context then runs."""
        return self.whole.make_context(*args, **options)


class Commands(TyperGroup):
    """Turns what a user can cause into one sentence and an exit code."""

    is_out_of_memory: ClassVar[bool] = False

    def __init__(self, **options: Any) -> None:
        """Add the commands before the groups."""
        super().__init__(**options)
        self.commands = {name: CommandOnDemand(name, run) for name, run in COMMANDS.items()} | self.commands

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command on streams that take any text: what they have no letter for is escaped."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; errors become a sentence unless `--debug` is given."""
        try:
            result = super().invoke(ctx)
            # Here and not at the end of the interpreter, which would print what a closed pipe raises.
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            _leave_closed_pipe()
        except KeyboardInterrupt:
            _fail("stopped", INTERRUPTED)
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None or ctx.params.get("debug"):
                raise
            Commands.is_out_of_memory = is_out_of_memory(error)
            # The work was right and its result was not: that is no mistake of the user.
            is_mistake = isinstance(error, SlimtuneError) and not isinstance(error, MergeError | DoesNotFitError)
            code = getattr(error, "exit_code", MISTAKE if is_mistake else REFUSED)
            _fail(sentence, code, follows=getattr(error, "follows_another", False))


def _leave_closed_pipe() -> NoReturn:
    """Exit as other programs do whose reader has gone (`| head`): without a word."""
    # What is still buffered is written at exit, and must not fail again.
    silence(sys.stdout)
    raise typer.Exit(CLOSED_PIPE)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    # `slimtune completion` prints the script, and writes into nobody's .bashrc.
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 the work failed or a bound refused it, 2 a mistake, 3 a plan of which nothing fits, "
    "130 stopped by Ctrl-C, 141 the reader of its output has gone.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from slimtune import __version__

        say(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(envvar="SLIMTUNE_DEBUG", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune large models on small hardware: one frozen base, tiny trainable deltas."""
    leave_out_noise()
    set_up_logging()


app.add_typer(recipe, name="recipe")
app.add_typer(data, name="data")


def main() -> None:
    """The entry point of the `slimtune` script."""
    try:
        app()
    except SystemExit as end:
        if Commands.is_out_of_memory:
            # At once, for what libraries still do at the end of a process would fail, too, and print a traceback.
            sys.stdout.flush()
            os._exit(int(end.code or 0))
        raise


def _fail(sentence: str, code: int, follows: bool = False) -> NoReturn:
    # Plain, because rich would read brackets in a name as markup and break the line.
    if report_failure(sentence, follows):
        say(f"slimtune: {sentence}", to_errors=True)
    raise typer.Exit(code)
