"""Data as a person looks at it before training: how much there is, and which part of it is learned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from slimtune.data.encode import Encoded, Prepared, pieces
from slimtune.data.lengths import PERCENTILES, Lengths
from slimtune.data.mixing import exact_shares
from slimtune.data.tasks.classification import Tokenized

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.data.preview import Preview
    from slimtune.data.reading import Part
    from slimtune.data.settings import DataSettings

PREVIEWED_TOKENS = 400
PREVIEWED_CHARACTERS = 1200
BAR_WIDTH = 40


def show_sources(screen: Console, parts: Sequence[Part], prepared: Sequence[Prepared], settings: DataSettings) -> None:
    """What each source holds, what became of long examples, and how many an epoch takes of it."""
    shares = exact_shares(parts, [len(found.examples) for found in prepared])
    for part, found, share in zip(parts, prepared, shares, strict=True):
        told = f"{part.name}: format {part.format}, {len(part.rows):,} rows"
        if part.weight is not None:
            told += f"; of its {len(found.examples):,} examples an epoch takes {share:,} (weight {part.weight:g})"
        screen.print(told, markup=False)
        if found.apart:
            screen.print(
                f"[yellow]{found.apart:,} examples more than rows[/]: the chat template rewrites earlier turns, so "
                f"each answer is learned in an example that ends with it"
            )
        if found.dropped:
            screen.print(
                f"[yellow]{found.dropped:,} examples dropped[/]: no answer within {settings.max_length:,} tokens"
            )
        if found.truncated:
            verb = "split" if settings.too_long == "split" else "cut"
            screen.print(f"[yellow]{found.truncated:,} examples {verb}[/] at {settings.max_length:,} tokens")


def show_data(screen: Console, examples: Sequence[Encoded], held_out: Sequence[Encoded]) -> None:
    """How many examples and tokens there are, and how much of that is learned."""
    tokens, learned = (sum(counts) for counts in zip(*((len(e.input_ids), e.learned) for e in examples), strict=True))
    screen.print(
        f"data: {len(examples):,} examples, {tokens:,} tokens of which {learned / tokens:.0%} are learned; "
        f"the longest has {max(len(example.input_ids) for example in examples):,}"
        + (f"; {len(held_out):,} examples held out" if held_out else "")
    )


def show_labels(
    screen: Console, labels: Sequence[str], rows: Tokenized, given: int, held_out: Sequence[str], max_length: int
) -> None:
    """How many texts there are of each label, and what became of long ones."""
    counts = ", ".join(f"{label}: {count:,}" for label, count in sorted(Counter(labels).items()))
    screen.print(
        f"data: {len(labels):,} texts ({counts}), {rows.tokens:,} tokens; the longest has {rows.longest:,}"
        + (f"; {len(held_out):,} texts held out" if held_out else ""),
        markup=False,
    )
    if given > len(labels):
        screen.print(f"[yellow]{given - len(labels):,} texts dropped[/]: longer than {max_length:,} tokens")
    if rows.truncated:
        screen.print(f"[yellow]{rows.truncated:,} texts cut[/] at {max_length:,} tokens")


def show_preview(screen: Console, tokenizer: Any, example: Encoded) -> None:
    """One example with what is learned in colour, between brackets where there is none."""
    cut = Encoded(example.input_ids[:PREVIEWED_TOKENS], example.labels[:PREVIEWED_TOKENS])
    shown = [(learned, tokenizer.decode(ids)) for learned, ids in pieces(cut)]
    if len(example.input_ids) > PREVIEWED_TOKENS:
        shown.append((False, " ..."))
    screen.print(f"the first example, with what is learned {_how(screen)}:", markup=False)
    screen.print(_coloured(screen, shown))


def _show_rows(screen: Console, lengths: Lengths, max_length: int, batch_size: int, packing: bool) -> None:
    if over := lengths.over(max_length):
        screen.print(
            f"[yellow]{over:,} examples are longer than {max_length:,} tokens[/]: training refuses them unless "
            f"too_long says what becomes of them"
        )
    within = lengths.within(max_length)
    screen.print(f"padding: {within.padding_waste(batch_size):.0%} of what batches of {batch_size} compute")
    if packing:
        gain = lengths.packing_gain(max_length, batch_size)
        screen.print(
            f"packed: {lengths.packed_rows(max_length):,} rows of {max_length:,} tokens with "
            f"{lengths.packed_waste(max_length):.0%} padding, {gain:.2f} times fewer tokens to compute"
        )


def _bars(lengths: Lengths) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(justify="right")
    bars = lengths.histogram()
    most = max(count for _, count in bars)
    for end, count in bars:
        table.add_row(f"up to {end:,}", "\u2588" * math.ceil(BAR_WIDTH * count / most), f"{count:,}")
    return table


def _cut(text: str) -> str:
    return text if len(text) <= PREVIEWED_CHARACTERS else f"{text[:PREVIEWED_CHARACTERS]} ..."


def _how(screen: Console) -> str:
    return "in colour" if screen.color_system is not None else "between [[ and ]]"


def _coloured(screen: Console, shown: Sequence[tuple[bool, str]]) -> Text:
    text = Text()
    for learned, piece in shown:
        marked = f"[[{piece}]]" if screen.color_system is None else piece
        text.append(marked if learned else piece, style="bold green" if learned else "dim")
    return text


def show_found(screen: Console, found: Preview, max_length: int, batch_size: int, packing: bool) -> None:
    """What there is to see of data: sources, examples, lengths."""
    lengths, unit = found.lengths, found.unit
    for part, share in zip(found.parts, found.shares, strict=True):
        taken = f", of which an epoch takes {share:,}" if part.weight is not None else ""
        screen.print(f"{part.name}: format {part.format}, {len(part.rows):,} rows{taken}", markup=False)
    screen.print(
        f"task {found.task}: {lengths.examples:,} examples, {lengths.total:,} {unit}"
        + ("" if found.labels else f", of which {lengths.learned / lengths.total:.0%} are learned")
        + (f"; {found.apart:,} more examples than rows, one for each answer" if found.apart else "")
    )
    if found.labels:
        screen.print("labels: " + ", ".join(f"{name} {count:,}" for name, count in found.labels.items()), markup=False)
    for number, sample in enumerate(found.samples, 1):
        screen.print(f"\nexample {number}, with what is learned {_how(screen)}:", markup=False)
        screen.print(_coloured(screen, [(learned, _cut(text)) for learned, text in sample]))
    screen.print(f"\n{unit} of an example:")
    screen.print(_bars(lengths))
    shares = ", ".join(f"{share}% have at most {lengths.percentile(share):,}" for share in PERCENTILES)
    screen.print(f"{shares}; the longest has {lengths.longest:,}")
    if unit == "tokens":
        _show_rows(screen, lengths, max_length, batch_size, packing)
