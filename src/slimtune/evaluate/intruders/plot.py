"""Singular values and intruder dimensions by layer, and one matrix before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from slimtune.console.figure import new_figure, write
from slimtune.evaluate.intruders.spectra import Spectra, Spectrum

DIRECTIONS = 48
"""Leading singular vectors on each side of the similarity matrix."""
BAND = (10, 90)
"""Percent of the singular values that the band leaves below and above."""


def most_telling(spectra: Spectra) -> Spectrum:
    """The matrix with the most intruders, or else the largest change."""
    return max(spectra.matrices, key=lambda one: (len(one.intruders), one.relative_norm))


def plot_spectra(spectra: Spectra, shown: Spectrum, cosines_JI: Tensor, picture: Path, title: str) -> None:
    """Draw all three panels.

    Args:
        shown: the matrix of which `cosines_JI` are the similarities of singular vectors, after and before.

    Raises:
        ConfigError: another format than PNG or SVG.
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(15, 4.6)
    figure.suptitle(title)
    values, matrix, counts = figure.subplots(1, 3)
    _values(values, spectra)
    image = _matrix(matrix, spectra, shown, cosines_JI)
    figure.colorbar(image, ax=matrix, label="|cosine|")
    _counts(counts, spectra)
    write(figure, picture)


def _layers(spectra: Spectra) -> dict[Any, list[Spectrum]]:
    """The matrices by block; those outside of blocks are one group."""
    groups: dict[Any, list[Spectrum]] = {}
    for one in spectra.matrices:
        groups.setdefault("other" if one.layer is None else one.layer, []).append(one)
    return groups


def _values(axes: Any, spectra: Spectra) -> None:
    groups = _layers(spectra)
    places = range(len(groups))
    pooled = [np.concatenate([np.array(one.values) for one in own]) for own in groups.values()]
    # What is rounding says nothing and would draw the band to zero on a logarithmic axis.
    pooled = [own[own > 1e-6 * own.max()] if own.max() > 0 else own for own in pooled]
    low, middle, high = (np.array([np.percentile(own, at) for own in pooled]) for at in (BAND[0], 50, BAND[1]))
    axes.fill_between(places, low, high, alpha=0.25, label=f"{BAND[0]}% to {BAND[1]}%")
    axes.plot(places, middle, "o-", markersize=3, label="median")
    axes.plot(places, [own.max() for own in pooled], "k.", markersize=4, label="largest")
    axes.set(xlabel="layer", ylabel="singular value of the update", title="Updates by layer")
    if min(own.min() for own in pooled) > 0:
        axes.set_yscale("log")
    _name_layers(axes, list(groups))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _matrix(axes: Any, spectra: Spectra, shown: Spectrum, cosines_JI: Tensor) -> Any:
    image = axes.imshow(cosines_JI.numpy(), cmap="magma", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xlabel="singular vector before", ylabel="singular vector after", title=shown.name)
    axes.title.set_fontsize("medium")
    edge = cosines_JI.shape[1]
    for one in shown.intruders:
        axes.annotate(
            "", xy=(edge - 0.5, one.index), xytext=(1.06 * edge, one.index), annotation_clip=False,
            arrowprops={"color": "tab:red", "arrowstyle": "-|>"},
        )  # fmt: skip
    count = len(shown.intruders)
    what = f"{count} intruders (arrows)" if count else "no intruders"
    axes.text(0.98, 0.98, f"{what} among the first {spectra.top}", transform=axes.transAxes, color="white", ha="right",
              va="top", fontsize="small")  # fmt: skip
    return image


def _counts(axes: Any, spectra: Spectra) -> None:
    groups = _layers(spectra)
    bottom = np.zeros(len(groups))
    for kind in dict.fromkeys(one.kind for one in spectra.matrices):
        heights = np.array([sum(len(o.intruders) for o in own if o.kind == kind) for own in groups.values()])
        axes.bar(range(len(groups)), heights, bottom=bottom, label=kind)
        bottom += heights
    title = f"{spectra.intruders} intruder dimensions (epsilon {spectra.epsilon:g}, first {spectra.top})"
    axes.set(xlabel="layer", ylabel="intruder dimensions", title=title)
    axes.set_ylim(0, max(1.0, 1.4 * bottom.max()))
    if not spectra.intruders:
        axes.text(0.5, 0.4, "none: all new directions lie among the old", transform=axes.transAxes, ha="center")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _name_layers(axes, list(groups))
    axes.legend(fontsize="small", ncols=3, loc="upper center")


def _name_layers(axes: Any, names: list[Any]) -> None:
    every = max(1, len(names) // 10)
    axes.set_xticks(range(0, len(names), every), [str(name) for name in names[::every]])
