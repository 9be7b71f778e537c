"""`slimtune spectra`: what tuning did to the weights, by singular values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from slimtune.cli.options import Device, Dtype, Json, Quantize, TrustRemoteCode, TunedBase, TunedModel, console

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.evaluate.spectra import Spectra, Spectrum


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
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Take apart what tuning did to each weight matrix: ranks, norms, overlaps and intruder dimensions.

    Intruder dimensions (Shuttleworth et al. 2024) are leading singular vectors of a tuned matrix that are like none of
    the matrix before; the paper ties them to forgetting.

    Example: slimtune spectra tuned --against other
    """
    from slimtune.cli.counting import Counting
    from slimtune.evaluate.spectra import measure
    from slimtune.evaluate.tuned import Tuned

    screen = console(as_json)
    how = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize}
    what = Tuned.find(tuned, base, **how)
    other = Tuned.find(against, base, **how) if against else None
    with Counting(screen, "matrices") as counting:
        found = measure(what, top, epsilon, other, embeddings, counting.start, counting.advance)
    if as_json:
        print(json.dumps({"tuned": tuned, "base": what.base, "against": against, **found.to_dict()}))
        return
    _show(screen, what.base, found)


def _show(screen: Console, base: str, found: Spectra) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"medians over the matrices, against {escape(base)}", title_justify="left")
    overlaps = any(one.overlap for one in found.matrices)
    names = ["matrices", "count", "eff. rank", "stable rank", "change", "intruders"]
    for name in names + ["overlap", "chance"] * overlaps:
        table.add_column(name, justify="left" if name == "matrices" else "right", no_wrap=True)
    for kind in dict.fromkeys(one.kind for one in found.matrices):
        own = [one for one in found.matrices if one.kind == kind]
        table.add_row(*_row(escape(kind), own, overlaps))
    table.add_section()
    table.add_row(*_row("all", found.matrices, overlaps))
    screen.print(table)
    with_some = [one for one in found.matrices if one.intruders]
    screen.print(
        f"{found.intruders} intruder dimensions in {len(with_some)} of {len(found.matrices)} matrices: among the first "
        f"{found.top} singular vectors of each, those with no cosine of {found.epsilon:g} or more with an old one"
    )
    for one in sorted(with_some, key=lambda one: -len(one.intruders))[:5]:
        first = one.intruders[0]
        screen.print(
            f"  {one.name}: {len(one.intruders)}, the first at place {first.index + 1} with a cosine of "
            f"{first.cosine:.2f}",
            markup=False,
        )
    if found.left_out:
        screen.print(f"tuned and left out: {', '.join(found.left_out)}; --embeddings takes them in", markup=False)
    if found.only_here:
        screen.print(f"{len(found.only_here)} matrices are tuned here alone and have no overlap")


def _row(name: str, own: list[Spectrum], overlaps: bool) -> list[str]:
    from statistics import median

    cells = [
        name, str(len(own)), f"{median(one.effective_rank for one in own):.2f}",
        f"{median(one.stable_rank for one in own):.2f}", f"{median(one.relative_norm for one in own):.2%}",
        str(sum(len(one.intruders) for one in own)),
    ]  # fmt: skip
    shared = [one.overlap for one in own if one.overlap]
    if not overlaps:
        return cells
    if not shared:
        return [*cells, "-", "-"]
    return [*cells, f"{median(o.left for o in shared):.2f}", f"{median(o.left_by_chance for o in shared):.2f}"]
