"""Data as a person looks at it before training: how much there is, and which part of it is learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from slimtune.data.encode import Encoded, Prepared, pieces
from slimtune.data.labelled import Tokenized

if TYPE_CHECKING:
    from rich.console import Console

PREVIEWED_TOKENS = 400


def show_data(screen: Console, prepared: Prepared, held_out: Sequence[Encoded], max_length: int) -> None:
    """How many examples and tokens there are, and how much of that is learned."""
    screen.print(
        f"data: {len(prepared.examples):,} examples, {prepared.tokens:,} tokens of which "
        f"{prepared.learned / prepared.tokens:.0%} are learned; the longest has {prepared.longest:,}"
        + (f"; {len(held_out):,} examples held out" if held_out else "")
    )
    if prepared.dropped:
        screen.print(f"[yellow]{prepared.dropped:,} examples dropped[/]: no answer within {max_length:,} tokens")
    if prepared.truncated:
        screen.print(f"[yellow]{prepared.truncated:,} examples cut[/] at {max_length:,} tokens")


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
    has_colour = screen.color_system is not None
    text = Text()
    cut = Encoded(example.input_ids[:PREVIEWED_TOKENS], example.labels[:PREVIEWED_TOKENS])
    for learned, ids in pieces(cut):
        piece = tokenizer.decode(ids)
        if learned:
            text.append(piece if has_colour else f"[[{piece}]]", style="bold green")
        else:
            text.append(piece, style="dim")
    if len(example.input_ids) > PREVIEWED_TOKENS:
        text.append(" ...", style="dim")
    how = "in colour" if has_colour else "between [[ and ]]"
    screen.print(f"the first example, with what is learned {how}:", markup=False)
    screen.print(text)
