"""`slimtune spectra`: what tuning did to the weights, by singular values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.cli.options import Device, Json, Overwrite, Quantize, StoredDtype, TrustRemoteCode, TunedBase, TunedModel
from slimtune.console.figure import check_picture
from slimtune.console.screen import open_screen, print_json
from slimtune.errors import ConfigError, counted

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.evaluate.intruders.spectra import Spectra, Spectrum
    from slimtune.evaluate.intruders.trade_off import LossTradeOff, Yardsticks
    from slimtune.evaluate.intruders.updates import TunedMatrix, Updates
    from slimtune.evaluate.intruders.write import MitigationReport

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
    dtype: StoredDtype = "auto",
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
    from slimtune.console.progress import Counting
    from slimtune.evaluate.tuned import Tuned

    loading: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize
    }  # fmt: skip
    model, screen = Tuned.find(tuned, base, **loading), open_screen(as_json)
    if scale_intruders is not None:
        if output is None:
            raise ConfigError("--scale-intruders writes a changed model; say where with --output")
        if against or plot:
            raise ConfigError(
                "--scale-intruders takes neither --against nor --plot; run slimtune spectra on its output"
            )
        from slimtune.evaluate.intruders.write import mitigate

        yardsticks = _yardsticks(data, task)
        with Counting(screen) as counting:
            report = mitigate(
                model,
                scale_intruders,
                output,
                yardsticks,
                top,
                epsilon,
                as_model,
                embeddings,
                overwrite,
                counting.watch,
            )
        if as_json:
            print_json({"tuned": model.source, "base": model.base, **report.to_dict()})
        else:
            _show_mitigation(screen, report)
        return
    if output or data or task or as_model:
        raise ConfigError("--output, --data, --task and --as-model belong to --scale-intruders; pass that too")
    if plot:
        check_picture(plot)
    elif matrix:
        raise ConfigError(f"--matrix says what to draw; say where with --plot, or leave '{matrix}' out")
    from slimtune.evaluate.intruders.spectra import measure, updates_of

    updates = updates_of(model, embeddings)
    drawn = updates.named(matrix) if matrix else None
    others = updates_of(Tuned.find(against, base, **loading), embeddings) if against else None
    with Counting(screen) as counting:
        counting.start("decomposing matrices", len(updates.matrices))
        measured = measure(updates, top, epsilon, others, counting.advance)
    if as_json:
        print_json({"tuned": tuned, "base": model.base, "against": against, **measured.to_dict()})
    else:
        _show(screen, model.base, measured)
    if plot:
        _draw(updates, measured, drawn, plot, Path(tuned).name)
        screen.print(f"drawn: {plot}", markup=False)


def _yardsticks(data: Path | None, questions: str | None) -> Yardsticks:
    from slimtune.evaluate.domain_texts import read_texts, texts
    from slimtune.evaluate.intruders.trade_off import Yardsticks
    from slimtune.evaluate.run import prepare
    from slimtune.evaluate.tasks import open_task

    own = {data.stem: read_texts(data)} if data else {}
    return Yardsticks(texts(), own, prepare(open_task(questions)) if questions else None)


def _draw(updates: Updates, result: Spectra, chosen: TunedMatrix | None, plot: Path, title: str) -> None:
    from slimtune.evaluate.intruders.plot import DIRECTIONS, most_telling, plot_spectra
    from slimtune.evaluate.intruders.spectra import similarity

    matrix = chosen or updates.named(most_telling(result).name)
    shown = next(one for one in result.matrices if one.name == matrix.name)
    plot_spectra(result, shown, similarity(matrix, DIRECTIONS), plot, title)


SHOWN = 5
"""Of the matrices with intruders."""


def _show(screen: Console, base: str, result: Spectra) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"medians over the matrices, against {escape(base)}", title_justify="left")
    overlaps = any(one.overlap for one in result.matrices)
    names = ["matrices", "count", "eff. rank", "stable rank", "change", "intruders"]
    for name in names + ["overlap", "chance"] * overlaps:
        table.add_column(name, justify="left" if name == "matrices" else "right", no_wrap=name == "matrices")
    for kind in dict.fromkeys(one.kind for one in result.matrices):
        table.add_row(*_row(escape(kind), [one for one in result.matrices if one.kind == kind], overlaps))
    table.add_section()
    table.add_row(*_row("all", result.matrices, overlaps))
    screen.print(table)
    _show_intruders(screen, result)
    if result.left_out:
        named = ", ".join(result.left_out)
        screen.print(f"tuned and left out: {named}; --embeddings takes in those that the base has too", markup=False)
    if result.only_here:
        screen.print(f"tuned here alone, without overlap: {len(result.only_here)}")


def _show_intruders(screen: Console, result: Spectra) -> None:
    with_some = [one for one in result.matrices if one.intruders]
    screen.print(
        f"{counted(result.intruders, 'intruder dimension')} in {len(with_some)} of {len(result.matrices)} matrices: "
        f"among the first {result.top} singular vectors of each, those with no cosine of {result.epsilon:g} or more "
        "with an old one"
    )
    for one in sorted(with_some, key=lambda one: -len(one.intruders))[:SHOWN]:
        first = one.intruders[0]
        screen.print(
            f"  {one.name}: {len(one.intruders)}, the first at place {first.index + 1} with a cosine of "
            f"{first.cosine:.2f}",
            markup=False,
        )


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


def _show_mitigation(screen: Console, done: MitigationReport) -> None:
    from slimtune.evaluate.forgetting import in_words

    screen.print(
        f"{done.count} intruder dimensions scaled by {done.factor:g}; {done.left} are left among the first "
        f"{done.spectra.top} singular vectors of those matrices"
    )
    if done.outside is None:
        screen.print("losses: not measured, as the model predicts no next token; score it on its task before and after")
    else:
        _show_losses(screen, done.outside, done.task)
    if done.answered is not None:
        one = done.answered
        screen.print(
            f"{one.metric.replace('_', ' ')} on {counted(one.count, 'question')}: {one.tuned:.3f} tuned, "
            f"{one.scaled:.3f} scaled, by scaling {in_words(one.interval)} (95%)"
        )
    why = f", because {done.why_model}" if done.why_model else ""
    screen.print(f"{done.output}: written as {'an adapter' if done.kind == 'adapter' else 'a plain model'}{why}",
                 markup=False)  # fmt: skip


def _show_losses(screen: Console, outside: LossTradeOff, task: LossTradeOff | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    from slimtune.evaluate.forgetting import in_words

    table = Table(title="loss in nats per token", title_justify="left")
    for name in ("texts", "base", "tuned", "scaled", "by scaling", "95% interval"):
        table.add_column(name, justify="left" if name == "texts" else "right", no_wrap=True)
    for name in outside.tuned.domains:
        table.add_row(*_trade_row(escape(name), outside, name))
    table.add_section()
    table.add_row(
        "forgetting", "", f"{outside.tuned.difference:+.4f}", f"{outside.scaled.difference:+.4f}",
        f"{outside.change.difference:+.4f}", in_words(outside.change.interval),
    )  # fmt: skip
    if task is not None:
        table.add_section()
        for name in task.tuned.domains:
            table.add_row(*_trade_row(f"task: {escape(name)}", task, name))
    screen.print(table)


def _trade_row(name: str, trade: LossTradeOff, domain: str) -> list[str]:
    from slimtune.evaluate.forgetting import in_words

    tuned, scaled, change = (one.domains[domain] for one in (trade.tuned, trade.scaled, trade.change))
    return [
        name, f"{tuned.before:.4f}", f"{tuned.after:.4f}", f"{scaled.after:.4f}", f"{change.difference:+.4f}",
        in_words(change.interval),
    ]  # fmt: skip
