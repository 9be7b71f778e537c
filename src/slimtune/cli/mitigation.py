"""`slimtune spectra --scale-intruders`: weaker intruders, and what they were worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from slimtune.cli.options import console

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.evaluate.scaled_model import Mitigated
    from slimtune.evaluate.trade import Trade
    from slimtune.evaluate.tuned import Tuned


def scale(
    what: Tuned,
    factor: float,
    output: Path,
    top: int,
    epsilon: float,
    embeddings: bool,
    data: Path | None,
    questions: str | None,
    as_model: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Scale, write, measure and show."""
    from slimtune.evaluate.outside import read_texts, texts
    from slimtune.evaluate.run import prepare
    from slimtune.evaluate.scaled_model import mitigate
    from slimtune.evaluate.tasks import open_task
    from slimtune.evaluate.trade import Yardsticks
    from slimtune.progress import Counting

    screen = console(as_json)
    task = {data.stem: read_texts(data)} if data else {}
    yardsticks = Yardsticks(texts(), task, prepare(open_task(questions)) if questions else None)
    with Counting(screen) as counting:
        done = mitigate(what, factor, output, yardsticks, top, epsilon, as_model, embeddings, overwrite, counting.watch)
    if as_json:
        print(json.dumps({"tuned": what.source, "base": what.base, **done.to_dict()}))
        return
    _show(screen, done)


def _show(screen: Console, done: Mitigated) -> None:
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
            f"{one.metric.replace('_', ' ')} on {one.count} questions: {one.tuned:.3f} tuned, {one.scaled:.3f} scaled, "
            f"by scaling {in_words(one.interval)} (95%)"
        )
    why = f", because {done.why_model}" if done.why_model else ""
    screen.print(f"{done.output}: written as {'an adapter' if done.kind == 'adapter' else 'a plain model'}{why}",
                 markup=False)  # fmt: skip


def _show_losses(screen: Console, outside: Trade, task: Trade | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    from slimtune.evaluate.forgetting import in_words

    table = Table(title="loss in nats per token", title_justify="left")
    for name in ("texts", "base", "tuned", "scaled", "by scaling", "95% interval"):
        table.add_column(name, justify="left" if name == "texts" else "right", no_wrap=True)
    for name in outside.tuned.domains:
        table.add_row(*_row(escape(name), outside, name))
    table.add_section()
    table.add_row(
        "forgetting", "", f"{outside.tuned.difference:+.4f}", f"{outside.scaled.difference:+.4f}",
        f"{outside.change.difference:+.4f}", in_words(outside.change.interval),
    )  # fmt: skip
    if task is not None:
        table.add_section()
        for name in task.tuned.domains:
            table.add_row(*_row(f"task: {escape(name)}", task, name))
    screen.print(table)


def _row(name: str, trade: Trade, domain: str) -> list[str]:
    from slimtune.evaluate.forgetting import in_words

    tuned, scaled, change = (one.domains[domain] for one in (trade.tuned, trade.scaled, trade.change))
    return [
        name, f"{tuned.before:.4f}", f"{tuned.after:.4f}", f"{scaled.after:.4f}", f"{change.difference:+.4f}",
        in_words(change.interval),
    ]  # fmt: skip
