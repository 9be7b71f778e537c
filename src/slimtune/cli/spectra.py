"""`slimtune spectra`: what tuning did to the weights, by singular values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli.options import (
    Device,
    Dtype,
    Json,
    Overwrite,
    Quantize,
    TrustRemoteCode,
    TunedBase,
    TunedModel,
    console,
)
from slimtune.errors import ConfigError

if TYPE_CHECKING:
    from slimtune.evaluate.spectra import Spectra
    from slimtune.evaluate.tuned import Tuned
    from slimtune.evaluate.updates import TunedMatrix, Updates

SCALING = "Scaling intruders down"


def spectra(
    tuned: TunedModel,
    base: TunedBase = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="Another adapter or model, tuned from the same base, to compare with."),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, help="How many leading singular vectors to look at: the k of the paper.")
    ] = 10,
    epsilon: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="An intruder's largest cosine with the old ones is below this.")
    ] = 0.5,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Take tuned embeddings and heads in.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw layers and a matrix as PNG or SVG.")] = None,
    matrix: Annotated[
        str | None, typer.Option(metavar="NAME", help="The matrix to draw; without it, that with the most intruders.")
    ] = None,
    scale_intruders: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="FACTOR", help="Multiply their singular values by this.", rich_help_panel=SCALING
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.", rich_help_panel=SCALING)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts of the task: what scaling costs there.", rich_help_panel=SCALING),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="Questions to ask before and after, in a file.", rich_help_panel=SCALING),
    ] = None,
    as_model: Annotated[
        bool, typer.Option("--as-model", help="Write a plain model, not an adapter.", rich_help_panel=SCALING)
    ] = False,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Take apart what tuning did to each weight matrix: ranks, norms, overlaps and intruder dimensions.

    Intruder dimensions (Shuttleworth et al. 2024) are leading singular vectors of a tuned matrix that are like none of
    the matrix before; the paper ties them to forgetting. --scale-intruders weakens them and measures what that gives.

    Example: slimtune spectra tuned --against other --plot spectra.png
    """
    from slimtune.evaluate.tuned import Tuned

    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize
    }  # fmt: skip
    what = Tuned.find(tuned, base, **how)
    if scale_intruders is not None:
        from slimtune.cli.mitigation import scale

        if output is None:
            raise ConfigError("--scale-intruders writes a changed model; say where with --output")
        if against or plot:
            raise ConfigError(
                "--scale-intruders takes neither --against nor --plot; run slimtune spectra on its output"
            )
        scale(what, scale_intruders, output, top, epsilon, embeddings, data, task, as_model, overwrite, as_json)
        return
    if output or data or task or as_model:
        raise ConfigError("--output, --data, --task and --as-model belong to --scale-intruders; pass that too")
    other = Tuned.find(against, base, **how) if against else None
    found = _measured(what, other, top, epsilon, embeddings, plot, matrix, as_json)
    if as_json:
        print(json.dumps({"tuned": tuned, "base": what.base, "against": against, **found.to_dict()}))


def _measured(
    what: Tuned,
    other: Tuned | None,
    top: int,
    epsilon: float,
    embeddings: bool,
    plot: Path | None,
    matrix: str | None,
    as_json: bool,
) -> Spectra:
    from slimtune.cli.spectra_view import show
    from slimtune.evaluate.spectra import measure, updates_of
    from slimtune.picture import check_picture
    from slimtune.progress import Counting

    if plot:
        check_picture(plot)
    elif matrix:
        raise ConfigError(f"--matrix says what to draw; say where with --plot, or leave '{matrix}' out")
    screen = console(as_json)
    updates = updates_of(what, embeddings)
    chosen = updates.named(matrix) if matrix else None
    against = updates_of(other, embeddings) if other else None
    with Counting(screen) as counting:
        counting.start("decomposing matrices", len(updates.matrices))
        found = measure(updates, top, epsilon, against, counting.advance)
    if not as_json:
        show(screen, what.base, found)
    if plot:
        _draw(updates, found, chosen, plot, Path(what.source).name)
        screen.print(f"drawn: {plot}", markup=False)
    return found


def _draw(updates: Updates, found: Spectra, chosen: TunedMatrix | None, plot: Path, title: str) -> None:
    from slimtune.evaluate.plots.spectra import DIRECTIONS, most_telling, plot_spectra
    from slimtune.evaluate.spectra import similarity

    matrix = chosen or updates.named(most_telling(found).name)
    shown = next(one for one in found.matrices if one.name == matrix.name)
    plot_spectra(found, shown, similarity(matrix, DIRECTIONS), plot, title)
