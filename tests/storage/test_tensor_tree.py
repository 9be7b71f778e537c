"""Nested values with tensors come back from disk as they were, and a file makes nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtune.storage.tensor_tree import read_tree, write_tree

TREE: dict[str, Any] = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3).bfloat16()}, 7: {}},
    "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "name": None, "fused": True}],
    "bytes": torch.arange(5, dtype=torch.uint8),
    "nothing": torch.empty(0, 4),
    "infinite": [math.inf, -math.inf],
    "no number": torch.tensor([float("nan"), 1.0]),
}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(as_bytes(one), as_bytes(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_tree(tmp_path, "tree", TREE)
    assert same(read_tree(tmp_path, "tree"), TREE)


def test_states_of_torchao_keep_their_codes(tmp_path: Path) -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    state = OptimState8bit.zeros((4, 256), signed=False)
    state.copy_(torch.rand(4, 256))
    write_tree(tmp_path, "tree", {"exp_avg_sq": state})
    found = read_tree(tmp_path, "tree")["exp_avg_sq"]
    assert type(found) is OptimState8bit
    assert all(torch.equal(getattr(found, name), getattr(state, name)) for name in ("codes", "scale", "qmap"))
    assert found.signed is False


def test_a_file_makes_no_other_class(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a set can't be stored"):
        write_tree(tmp_path, "tree", {"names": {1, 2}})
    evil = {"subclass": "os.system", "inside": {}, "context": []}
    (tmp_path / "evil.json").write_text(json.dumps(evil))
    with pytest.raises(ValueError, match=r"may not make a os\.system"):
        read_tree(tmp_path, "evil")
