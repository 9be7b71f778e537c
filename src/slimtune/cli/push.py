"""`slimtune push`: the folder of an adapter or a model to a repository of the Hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimtune.cli.options import Json
from slimtune.console.screen import open_screen, print_json
from slimtune.errors import PushError, SlimtuneError

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.storage.push import Contents


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What train, merge, slim or export wrote.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="NAME or ORGANISATION/NAME; made if not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch; made if not there. Without it, main.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Push an adapter, a merged or a slimmed model to the Hub, with its tokenizer and its card.

    Checkpoints, logs of trackers and hidden files stay on this machine. Refused are folders without weights, pickled
    files, and whatever looks like a token or a key. Log in with hf auth login, or set HF_TOKEN.

    Example: slimtune push my-adapter my-adapter --private
    """
    from slimtune.storage.push import check_access, contents_of
    from slimtune.storage.push import push as upload

    screen = open_screen(as_json)
    contents = contents_of(folder)
    whole = check_access(repository, private)
    _show(screen, contents, whole)
    pushed = upload(contents, whole, private, revision)
    if as_json:
        print_json({**vars(pushed), "files": contents.files, "bytes": contents.bytes, "left_out": contents.left_out})
        return
    screen.print(f"pushed to {pushed.url}", markup=False)


def push_trained(screen: Console, output: Path, repository: str) -> str:
    """Push what a training wrote, and give its address. Raises: PushError, with the command that tries again."""
    from slimtune.storage.push import contents_of
    from slimtune.storage.push import push as upload

    try:
        contents = contents_of(output)
        _show(screen, contents, repository)
        pushed = upload(contents, repository)
    except SlimtuneError as error:
        again = shlex.join(["slimtune", "push", str(output), repository])
        raise PushError(f"the training is whole and in {output}, but {error}: {again}") from error
    screen.print(f"pushed to {pushed.url}", markup=False)
    return pushed.url


def _show(screen: Console, contents: Contents, repository: str) -> None:
    """Print what is pushed where, what stays, and that a base of this machine is nobody else's."""
    from rich.markup import escape

    screen.print(
        f"{contents.kind}: {len(contents.files)} files, {contents.bytes / 1e6:,.1f} MB, to {repository}"
        + (f"; not pushed: {', '.join(contents.left_out)}" if contents.left_out else ""),
        markup=False,
    )
    if contents.local_base:
        screen.print(
            f"[yellow]warning:[/] its base is {escape(contents.local_base)}, a folder of this machine; who loads the "
            "adapter elsewhere has to pass the base"
        )
