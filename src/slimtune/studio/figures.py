"""Figures as people read them: bytes, durations, numbers, moments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(count: float) -> str:
    """Bytes: `1.2 GB`."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit < 2 else f"{count:.1f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds as a clock shows them: `1:02:03`, `4:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float | None) -> str:
    """A number with four digits, or all of those before the point: `0.1234`, `12,345`."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def moment(seconds: float) -> str:
    """A time of the system's clock: the hour today, else the day with it."""
    then = datetime.fromtimestamp(seconds)
    today = datetime.fromtimestamp(time.time()).date()
    return then.strftime("%H:%M") if then.date() == today else then.strftime("%Y-%m-%d %H:%M")


class Numbers(dict[str, float]):
    """The numbers of a file that anybody may have written: what is missing, or is none, is None in a template."""

    @classmethod
    def of(cls, values: Any) -> Numbers:
        """Those of a mapping; none of anything else."""
        items = values.items() if isinstance(values, Mapping) else ()
        return cls({str(name): value for name, value in items if _is_number(value)})

    def __missing__(self, name: str) -> None:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


FILTERS: dict[str, Callable[..., Any]] = {"size": size, "duration": duration, "number": number, "moment": moment}
"""For templates: `{{ bytes | size }}`."""
