"""The classic table: real architectures, simulated figures beside the rules of thumb, and the picture of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from slimtune.errors import ConfigError
from slimtune.plan.devices import find
from slimtune.plan.memory import MemoryBreakdown
from slimtune.plan.plan import count, read_config, simulation
from slimtune.plan.table import ROWS, SIZES, Bar, TableCell, classic_bars, classic_table, plot_bars

PARAMETERS = {"7B": 6.738e9, "13B": 13.016e9, "30B": 32.529e9, "70B": 70.554e9, "110B": 111.210e9}


@cache
def cells() -> list[TableCell]:
    """The smallest and the largest size: between them it grows with the parameters."""
    return classic_table(lambda name, setting: simulation(read_config(name))(setting), sizes=("7B", "110B"))


def test_the_sizes_and_rules_of_thumb_are_the_common_ones() -> None:
    assert tuple(SIZES) == ("7B", "13B", "30B", "70B", "110B")
    assert {row.name: row.rule_of_thumb for row in ROWS} == {
        "Full, 16-bit": (67, 125, 288, 672, 1056),
        "LoRA, 16-bit": (15, 28, 63, 146, 229),
        "QLoRA, 8-bit": (9, 17, 38, 88, 138),
        "QLoRA, 4-bit": (5, 9, 20, 46, 72),
    }


@pytest.mark.parametrize("size", SIZES)
def test_configurations_have_the_published_number_of_parameters(size: str) -> None:
    assert count(read_config(SIZES[size]), "CAUSAL_LM")[0] == pytest.approx(PARAMETERS[size], rel=1e-3)


@pytest.mark.slow
def test_cells_are_simulated_and_near_the_rules_of_thumb() -> None:
    assert [(cell.row.name, cell.size) for cell in cells()] == [(row.name, s) for row in ROWS for s in ("7B", "110B")]
    for cell in cells():
        assert 0.75 < cell.ratio < 1.15, (cell.row.name, cell.size, cell.gigabytes)


@pytest.mark.slow
def test_the_table_counts_as_a_plan_does() -> None:
    for cell in cells():
        assert cell.device.name == "H100"
        assert cell.needed_bytes == find("H100").needed_bytes(cell.plan.peak_bytes) > cell.plan.peak_bytes
        assert cell.gigabytes == cell.needed_bytes / 1e9


def test_weights_take_the_bytes_of_their_precision() -> None:
    for cell in cells():
        bits = {"dense": 16, "int8": 8, "nf4": 4}[cell.row.base]
        low = bits / 8 * PARAMETERS[cell.size]
        # Embeddings, head and scales come on top of what is quantized.
        assert low <= cell.plan.peak.parts.weights * 1.001 < 1.25 * low


def test_full_tuning_holds_gradients_and_two_moments_in_the_weights_precision() -> None:
    (full, _) = (cell for cell in cells() if cell.row.is_full)
    parts = full.plan.peak.parts
    assert parts.gradients == pytest.approx(parts.weights, rel=0.01)
    assert parts.optimizer == pytest.approx(2 * parts.weights, rel=0.01)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="8B"):
        classic_table(lambda name, setting: simulation(read_config(name))(setting), sizes=("8B",))


@pytest.mark.parametrize(("name", "begins"), [("table.png", b"\x89PNG"), ("table.svg", b"<?xml")])
def test_the_picture(tmp_path: Path, name: str, begins: bytes) -> None:
    plot_bars(classic_bars(cells()), tmp_path / "new" / name, "tuning", limit_bytes=80e9)
    content = (tmp_path / "new" / name).read_bytes()
    assert content.startswith(begins)
    assert len(content) > 5000


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"table\.bmp"):
        plot_bars([Bar("x", MemoryBreakdown(weights=1))], tmp_path / "table.bmp", "tuning")
    assert list(tmp_path.iterdir()) == []
