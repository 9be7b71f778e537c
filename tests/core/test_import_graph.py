"""Imports point one way, from every room of the house down, with no exception and no circle."""

from __future__ import annotations

import pytest

from import_graph import FLOORS, circles, files, floor_of, graph, height, imported, room_of


def test_every_room_is_on_a_floor() -> None:
    assert {room_of(name) for name in files()} == set().union(*FLOORS)


@pytest.mark.parametrize("name", files())
def test_a_module_imports_from_floors_below_its_own(name: str) -> None:
    upwards = {k for k in graph()[name] if room_of(k) != room_of(name) and floor_of(k) >= floor_of(name)}
    assert not upwards


def test_no_module_leads_back_to_itself() -> None:
    assert circles(graph()) == []


def test_the_longest_chain_of_imports_is_short() -> None:
    assert height(graph()) <= 25


def test_imports_of_all_kinds_are_read() -> None:
    modules = {"slimtune.a", "slimtune.a.b", "slimtune.c", "slimtune.d", "slimtune.e"}
    source = (
        "import slimtune.d\nfrom slimtune.a import b, thing\nif TYPE_CHECKING:\n    from slimtune.c import Name\n"
        "def late():\n    from slimtune.e import other\n"
    )
    assert imported(source, modules) == {"slimtune.d", "slimtune.a.b", "slimtune.a", "slimtune.c", "slimtune.e"}
    with pytest.raises(ValueError, match="line 1"):
        imported("from . import b\n", modules)


def test_circles_are_found() -> None:
    straight = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset()}
    assert circles(straight) == []
    assert height(straight) == 3
    (loop,) = circles(straight | {"c": frozenset({"a"})})
    assert set(loop) == {"a", "b", "c"}
