"""Spectra as people read them."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.evaluate.spectra import Spectra, Spectrum

SHOWN = 5
"""Of the matrices with intruders."""


def show(screen: Console, base: str, found: Spectra) -> None:
    """A row for each kind of matrix, and the intruders in words."""
    table = Table(title=f"medians over the matrices, against {escape(base)}", title_justify="left")
    overlaps = any(one.overlap for one in found.matrices)
    names = ["matrices", "count", "eff. rank", "stable rank", "change", "intruders"]
    for name in names + ["overlap", "chance"] * overlaps:
        table.add_column(name, justify="left" if name == "matrices" else "right", no_wrap=name == "matrices")
    for kind in dict.fromkeys(one.kind for one in found.matrices):
        table.add_row(*_row(escape(kind), [one for one in found.matrices if one.kind == kind], overlaps))
    table.add_section()
    table.add_row(*_row("all", found.matrices, overlaps))
    screen.print(table)
    _show_intruders(screen, found)
    if found.left_out:
        named = ", ".join(found.left_out)
        screen.print(f"tuned and left out: {named}; --embeddings takes in those that the base has too", markup=False)
    if found.only_here:
        screen.print(f"{len(found.only_here)} matrices are tuned here alone and have no overlap")


def _show_intruders(screen: Console, found: Spectra) -> None:
    with_some = [one for one in found.matrices if one.intruders]
    screen.print(
        f"{found.intruders} intruder dimensions in {len(with_some)} of {len(found.matrices)} matrices: among the first "
        f"{found.top} singular vectors of each, those with no cosine of {found.epsilon:g} or more with an old one"
    )
    for one in sorted(with_some, key=lambda one: -len(one.intruders))[:SHOWN]:
        first = one.intruders[0]
        screen.print(
            f"  {one.name}: {len(one.intruders)}, the first at place {first.index + 1} with a cosine of "
            f"{first.cosine:.2f}",
            markup=False,
        )


def _row(name: str, own: list[Spectrum], overlaps: bool) -> list[str]:
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
