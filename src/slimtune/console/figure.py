"""Pictures, written as PNG or SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError, require

FORMATS = (".png", ".svg")


def check_picture(path: Path) -> None:
    """Raises: ConfigError, for a file name that isn't PNG or SVG."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"a plot is written as PNG or SVG, found '{path.name}'; pass for example {path.stem}.png")


def new_figure(width: float, height: float) -> Any:
    """An empty figure that needs no screen. Raises: MissingDependencyError."""
    require("matplotlib", extra="train", purpose="a plot")
    from matplotlib.figure import Figure

    # The class itself and not pyplot, which keeps every figure alive and looks for a display.
    return Figure(figsize=(width, height), layout="constrained")


def write(figure: Any, picture: Path) -> None:
    """Write a figure in the format that the file's name tells. Raises: ConfigError."""
    check_picture(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
