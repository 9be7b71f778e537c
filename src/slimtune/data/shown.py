"""Data as a person looks at it before training: how much there is, and which part of it is learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from slimtune.data.encode import Encoded, Prepared, pieces
from slimtune.data.labelled import Tokenized
from slimtune.data.mixing import exact_shares

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.data.reading import Part
    from slimtune.data.settings import DataSettings

PREVIEWED_TOKENS = 400


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
