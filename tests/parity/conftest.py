"""The cases of an `Agreement` as the parameters of its tests."""

from __future__ import annotations

import pytest

from beside_peft import Agreement


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is None or not issubclass(metafunc.cls, Agreement):
        return
    for name in {"case", "trained", "merged"} & set(metafunc.fixturenames):
        chosen = getattr(metafunc.cls, name, None)
        cases = metafunc.cls.cases if chosen is None else chosen
        metafunc.parametrize(name, list(cases.values()), ids=list(cases))
