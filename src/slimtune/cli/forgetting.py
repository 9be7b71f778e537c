"""`slimtune forgetting`: what tuning did to the language loss on texts that it had nothing to do with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimtune.cli.options import Device, Dtype, Json, Quantize, TrustRemoteCode, TunedBase, TunedModel
from slimtune.console.screen import open_screen, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.evaluate.forgetting import DomainLoss, Forgetting


WIDE = 100
"""Columns of a terminal with room for perplexities."""


def forgetting(
    tuned: TunedModel,
    base: TunedBase = None,
    data: Annotated[
        list[Path],
        typer.Option("--data", metavar="FILE", help="Your texts: JSONL with text or messages, or .txt; repeatable."),
    ] = [],  # noqa: B006 - typer copies it
    domains: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Of the shipped sets, between commas, or none; without it, all six."),
    ] = None,
    texts: Annotated[int | None, typer.Option(min=1, help="Only the first so many texts of each shipped set.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longer texts are scored in pieces of so many tokens.")] = 512,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst texts of each domain to show.")] = 1,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the domains as PNG or SVG.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure what a model forgot: its loss on texts of other domains, before tuning and after.

    The shipped sets are prose, facts, arithmetic, code, chat and german. A difference above 0 is a loss that rose; its
    interval is a 95% bootstrap over the texts.

    Example: slimtune forgetting tuned --data our-docs.txt --plot forgetting.png
    """
    from slimtune.console.figure import check_picture
    from slimtune.console.progress import Counting
    from slimtune.evaluate.forgetting import measure, plot_forgetting
    from slimtune.evaluate.tuned import Tuned

    if plot:
        check_picture(plot)
    chosen = _texts(domains, texts, data)
    screen = open_screen(as_json)
    loading = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize}
    model = Tuned.find(tuned, base, computes="batches", **loading)
    with Counting(screen) as counting:
        changes = measure(model, chosen, max_length, worst, watch=counting.watch)
    if plot:
        plot_forgetting(changes, plot, f"{Path(tuned).name} on texts of other domains")
    if as_json:
        print_json({"tuned": tuned, "base": model.base, **changes.to_dict()})
        return
    _show(screen, model.base, changes)
    if plot:
        screen.print(f"drawn: {plot}", markup=False)


def _texts(domains: str | None, limit: int | None, data: list[Path]) -> dict[str, list]:
    from slimtune.errors import DataError
    from slimtune.evaluate.domain_texts import read_texts, texts

    names = [] if domains == "none" else [name.strip() for name in domains.split(",")] if domains else None
    by_domain = texts(names, limit)
    for path in data:
        if path.stem in by_domain:
            raise DataError(f"two domains are called '{path.stem}'; rename {path}, or leave one of them out")
        by_domain[path.stem] = read_texts(path)
    return by_domain


def _show(screen: Console, base: str, changes: Forgetting) -> None:
    from rich.markup import escape
    from rich.table import Table

    from slimtune.evaluate.forgetting import in_words

    wide = screen.width >= WIDE
    table = Table(title=f"loss in nats per token, against {escape(base)}", title_justify="left")
    for name in ["domain", "texts", "before", "after", "difference", "95% interval"] + ["perplexity"] * wide:
        table.add_column(name, justify="left" if name == "domain" else "right", no_wrap=True)
    for name, change in changes.domains.items():
        cells = [
            escape(name), f"{change.texts}", f"{change.before:.4f}", f"{change.after:.4f}",
            f"{change.difference:+.4f}", in_words(change.interval),
        ]  # fmt: skip
        table.add_row(*cells, *[f"{_power(change.before)} to {_power(change.after)}"] * wide)
    table.add_section()
    table.add_row("mean", "", "", "", f"{changes.difference:+.4f}", in_words(changes.interval), *[""] * wide)
    screen.print(table)
    screen.print(_verdict(changes))
    for name, change in changes.domains.items():
        _show_worst(screen, name, change)


def _power(nats: float) -> str:
    from slimtune.evaluate.forgetting import perplexity

    power = perplexity(nats)
    return "inf" if power is None else f"{power:.4g}"


def _verdict(changes: Forgetting) -> str:
    """What the intervals show, in words."""
    risen = [name for name, c in changes.domains.items() if c.interval and c.interval[0] > 0]
    fallen = [name for name, c in changes.domains.items() if c.interval and c.interval[1] < 0]
    parts = [f"forgotten: {', '.join(risen)}" if risen else "no forgetting is shown"]
    if fallen:
        parts.append(f"better than before: {', '.join(fallen)}")
    return "; ".join(parts)


def _show_worst(screen: Console, name: str, change: DomainLoss) -> None:
    for rise in change.worst:
        head = f"worst of {name}: {rise.before:.3f} to {rise.after:.3f} nats a token ({rise.rise:+.3f})"
        screen.print(f"\n{head}", markup=False)
        screen.print("\n".join(f"  {line}" for line in rise.text.splitlines()), markup=False, style="dim")
