"""The table of devices: names as people write them, figures that hang together, this machine."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimtune.errors import ConfigError, PlanError
from slimtune.plan.devices import Device, devices, find, this_device


@pytest.mark.parametrize("device", devices().values(), ids=lambda device: device.name)
def test_figures_are_in_the_range_of_real_devices(device: Device) -> None:
    assert 7e9 < device.memory_bytes < 200e9
    assert 0 < device.context_bytes < 1e9
    assert device.memory_bytes > device.room_bytes > 0.8 * device.memory_bytes
    assert 5e10 < device.bandwidth < 1e13
    assert device.flops_16bit >= device.flops_32bit > 1e12
    assert device.price_per_hour is None or (0.1 < device.price_per_hour < 20 and device.price_date)
    assert device.source


def test_of_the_table_apple_s_devices_and_the_processor_alone_are_not_nvidia_s() -> None:
    others = {device.name for device in (*devices().values(), find("cpu")) if not device.is_cuda}
    apples = {name for name in devices() if name.startswith("Apple")}
    assert len(apples) > 1
    assert others == apples | {"cpu"}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("H100", "H100"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("3060 ti", "RTX 3060 Ti"),
        ("tesla t4", "T4"),
        ("a100-80gb", "A100 80GB"),
        ("m3 max", "Apple M3 Max"),
    ],
)
def test_a_device_is_found_in_any_spelling(said: str, meant: str) -> None:
    assert find(said).name == meant


def test_a_name_that_leaves_the_size_open_is_asked_about() -> None:
    for name in ("A100", "V100", "4060 ti"):
        with pytest.raises(ConfigError, match=f"'{name}' comes in sizes; name one: .*GB, .*GB$"):
            find(name)


def test_an_unknown_device_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rtx 5090'"):
        find("RTX 50900")
    with pytest.raises(ConfigError, match="no device 'quantum'; there are auto, cpu, A10,"):
        find("quantum")


def test_only_old_cards_lack_bf16() -> None:
    assert {name for name, device in devices().items() if not device.has_bf16} == {"T4", "V100 16GB", "V100 32GB"}
    assert find("T4").half_precision == "float16"
    assert find("L4").half_precision == "bfloat16"


def test_what_fits_is_what_is_left_beside_context_and_fragmentation() -> None:
    device = find("RTX 3090")
    assert device.takes(device.room_bytes)
    assert not device.takes(device.room_bytes + 1)
    assert device.needed_bytes(device.room_bytes) == pytest.approx(device.memory_bytes, abs=2)


@pytest.mark.parametrize("device", devices().values(), ids=lambda device: device.name)
def test_a_device_is_called_by_the_size_that_it_is_sold_under(device: Device) -> None:
    assert device.sold_gb is not None
    assert device.sold_as == f" (sold as {device.sold_gb:g} GB)"
    named = re.search(r"(\d+)GB$", device.name)
    assert named is None or int(named[1]) == device.sold_gb
    # Drivers take a part; of Apple's unified memory Metal takes three quarters.
    assert 0.6 < device.memory_bytes / 2**30 / device.sold_gb <= 1


def test_what_is_advised_leaves_a_tenth_of_a_gpu_free() -> None:
    device = find("RTX 3090")
    assert device.needed_bytes(device.advised_bytes) == pytest.approx(0.9 * device.memory_bytes, abs=2)
    assert device.runtime_bytes(10**9) == device.needed_bytes(10**9) - 10**9 > device.context_bytes


def test_memory_and_price_can_be_given() -> None:
    device = find("Apple M1").changed(memory_gb=6, price_per_hour=0.25)
    assert (device.memory_bytes, device.price_per_hour, device.price_date) == (6_000_000_000, 0.25, "given")


@pytest.mark.parametrize("wrong", [{"memory_gb": -1}, {"memory_gb": 0}, {"price_per_hour": -0.1}])
def test_memory_and_price_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"-1|0|-0\.1"):
        find("T4").changed(**wrong)


def test_the_processor_has_this_machines_memory() -> None:
    psutil = pytest.importorskip("psutil")
    device = find("cpu")
    assert device.is_cpu
    assert 0 < device.memory_bytes <= psutil.virtual_memory().total


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has another device")
def test_auto_is_the_processor_where_there_is_nothing_else() -> None:
    assert this_device().name == find("auto").name == "cpu"


@pytest.mark.parametrize(
    ("driver", "total_gib", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.25, "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.5, "A100 40GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "RTX 4060 Ti 16GB"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA A10G", 22.1, "A10"),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("Tesla T4", 14.6, "T4"),
    ],
)
def test_auto_knows_a_card_by_what_its_driver_says(
    monkeypatch: pytest.MonkeyPatch, driver: str, total_gib: float, name: str
) -> None:
    facts: Any = SimpleNamespace(name=driver, total_memory=int(total_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    device = this_device()
    assert (device.name, device.memory_bytes) == (name, facts.total_memory)


def test_a_card_that_no_table_knows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: Any = SimpleNamespace(name="Radeon Whatever", total_memory=24 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    with pytest.raises(PlanError, match=r"'Radeon Whatever'.*--memory 24"):
        this_device()
