"""Data on the terminal: how much there is, and which part of it is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from slimtune.data.lengths import PERCENTILES, Lengths
from slimtune.data.tasks.base import Remark, Sample
from slimtune.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.data.preview import Preview

SHOWN_CHARACTERS = 1200
"""Of one example, about: a long text shows its beginning and its end."""
BAR_WIDTH = 40


def show_report(screen: Console, report: Sequence[Remark | Sample]) -> None:
    """Show what encoding reports, with what was lost in yellow and what is learned in colour."""
    for entry in report:
        if not isinstance(entry, Remark):
            screen.print(f"the first example, with what is learned {_how(screen)}:", markup=False)
            screen.print(_coloured(screen, entry.pieces))
        elif entry.warning:
            screen.print(f"[yellow]{escape(entry.warning)}[/]{escape(entry.text)}")
        else:
            screen.print(entry.text, markup=False)


def show_too_long(screen: Console, count: int, max_length: int) -> None:
    """Say how many examples are longer than training takes, if any are."""
    if count:
        longer = f"{counted(count, 'example')} {'is' if count == 1 else 'are'} longer than {max_length:,} tokens"
        choices = "they are to be cut (data.too_long=truncate) or dropped (data.too_long=drop)"
        screen.print(f"[yellow]{longer}[/]: training refuses them unless {choices}")


def _show_rows(screen: Console, lengths: Lengths, max_length: int, batch_size: int, packing: bool) -> None:
    show_too_long(screen, lengths.over(max_length), max_length)
    within = lengths.within(max_length)
    screen.print(f"padding: {within.padding_waste(batch_size):.0%} of what batches of {batch_size} compute")
    if packing:
        gain = lengths.packing_gain(max_length, batch_size)
        screen.print(
            f"packed: {counted(lengths.packed_rows(max_length), 'row')} of {max_length:,} tokens with "
            f"{lengths.packed_waste(max_length):.0%} padding, {gain:.2f} times fewer tokens to compute"
        )


def _bars(lengths: Lengths, encoding: str) -> Table:
    # Escaped, a block would be six letters wide.
    mark = "\u2588" if encoding.lower().startswith("utf") else "#"
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(justify="right")
    bars = lengths.histogram()
    most = max(count for _, count in bars)
    for end, count in bars:
        table.add_row(f"up to {end:,}", mark * math.ceil(BAR_WIDTH * count / most), f"{count:,}")
    return table


def shortened(example: Sequence[tuple[bool, str]]) -> list[tuple[bool, str]]:
    """The pieces of an example, cut in its middle where it is longer than `SHOWN_CHARACTERS`."""
    length, half = sum(len(text) for _, text in example), SHOWN_CHARACTERS // 2
    if length <= SHOWN_CHARACTERS:
        return list(example)
    shown, start = [], 0
    # Both ends are kept: the beginning says what is asked, and what is learned comes last.
    for learned, text in example:
        end = start + len(text)
        head = text[: max(0, half - start)]
        tail = text[max(0, length - half - start) :]
        is_cut_here = start <= half < end
        shown += [(learned, head)] * bool(head)
        shown += [(False, f" ... {length - 2 * half:,} characters left out ... ")] * is_cut_here
        shown += [(learned, tail)] * bool(tail)
        start = end
    return shown


def _how(screen: Console) -> str:
    return "in colour" if screen.color_system is not None else "between [[ and ]]"


def _coloured(screen: Console, shown: Sequence[tuple[bool, str]]) -> Text:
    text = Text()
    for learned, piece in shown:
        marked = f"[[{piece}]]" if screen.color_system is None else piece
        text.append(marked if learned else piece, style="bold green" if learned else "dim")
    return text


def show_preview(screen: Console, preview: Preview, max_length: int, batch_size: int, packing: bool) -> None:
    """Show the sources of data, its first examples and how long all of them are."""
    lengths, unit = preview.lengths, preview.unit
    for source, share in zip(preview.sources, preview.shares, strict=True):
        taken = f", of which an epoch takes {share:,}" if source.weight is not None else ""
        screen.print(f"{source.name}: format {source.format}, {counted(len(source.rows), 'row')}{taken}", markup=False)
        used = ", ".join(name for name in source.columns if name not in source.ignored)
        screen.print(f"  columns used: {used}", markup=False)
    show_report(screen, preview.report)
    screen.print(
        f"task {preview.splits.task}: {counted(lengths.examples, 'example')}, {lengths.total:,} {unit}"
        + ("" if preview.labels else f", of which {lengths.learned / lengths.total:.0%} are learned")
        + (f"; {preview.apart:,} more examples than rows, one for each answer" if preview.apart else "")
    )
    if preview.labels:
        screen.print(
            "labels: " + ", ".join(f"{name} {count:,}" for name, count in preview.labels.items()), markup=False
        )
    for number, sample in enumerate(preview.samples, 1):
        screen.print(f"\nexample {number}, with what is learned {_how(screen)}:", markup=False)
        screen.print(_coloured(screen, shortened(sample)))
    screen.print(f"\n{unit} of an example:")
    screen.print(_bars(lengths, screen.encoding))
    shares = ", ".join(f"{share}% have at most {lengths.percentile(share):,}" for share in PERCENTILES)
    screen.print(f"{shares}; the longest has {lengths.longest:,}")
    if unit == "tokens":
        _show_rows(screen, lengths, max_length, batch_size, packing)
        if preview.encoded:
            times = preview.shared_prefixes(max_length, batch_size)
            screen.print(
                f"what rows begin with alike: computed once, batches have {times['drawn']:.2f} times fewer tokens, and "
                f"{times['grouped']:.2f} times with training.group_prefixes=true"
            )
