"""Figures as people read them; the same in a sentence, in the table and in Markdown."""

from __future__ import annotations

NONE = "-"


def score(value: float | None) -> str:
    """Three decimals."""
    return NONE if value is None else f"{value:.3f}"


def change(value: float | None) -> str:
    """Three decimals and a sign."""
    return NONE if value is None else f"{value:+.3f}"


def p_value(value: float) -> str:
    """`= 0.031`, or `< 0.001`."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def size(bytes_: float | None) -> str:
    """In MB or GB of 1000s."""
    if bytes_ is None:
        return NONE
    if bytes_ < 1e6:
        return f"{bytes_ / 1e3:.0f} kB"
    return f"{bytes_ / 1e6:.1f} MB" if bytes_ < 1e9 else f"{bytes_ / 1e9:.2f} GB"


def duration(seconds: float | None) -> str:
    """In seconds, minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count(value: float | None) -> str:
    """With thousands apart."""
    return NONE if value is None else f"{value:,.0f}"


def money(dollars: float | None) -> str:
    """US dollars, to the hundredth of a cent below one cent."""
    if dollars is None:
        return NONE
    return f"${dollars:.4f}" if dollars < 0.01 else f"${dollars:.2f}"


def ratio(value: float | None) -> str:
    """One or two decimals."""
    return NONE if value is None else f"{value:.2f}"


def names(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
