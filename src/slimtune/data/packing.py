"""Packing: several examples in one row, none of which attends to another, and a check that a model keeps them apart.

Positions begin anew with each example; from that, transformers makes an attention mask of blocks on the diagonal, or
the cumulative lengths that flash attention takes. Best-fit packing as in Ding et al. 2024, arXiv:2404.10830.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch

from slimtune.data.batches import IGNORED, Encoded, PackRows
from slimtune.errors import ConfigError

PROBED_TOKENS = 6
LEAK, ROUNDING = 5e-3, 5e-2
"""Largest relative differences of logits that count as rounding: with another neighbour, and packed against alone."""


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices by row: longest first, each in the fullest row of `room` tokens that still has a place for it."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # `rooms` is sorted by what is left, so the first that suffices is the fullest: O(log rows) for each example.
        place = bisect_left(rooms, (lengths[index], -1))
        left, row = rooms.pop(place) if place < len(rooms) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(rooms, (left - lengths[index], row))
    return rows


def pack(examples: Sequence[Encoded], room: int) -> list[tuple[Encoded, ...]]:
    """The examples in rows of at most `room` tokens."""
    rows = best_fit([len(example.input_ids) for example in examples], room)
    return [tuple(examples[index] for index in row) for row in rows]


def check_packs(model: Any) -> None:
    """Check that two short examples in one row give the logits that each gives alone.

    Raises:
        ConfigError: one sees the other, as in recurrent models, or its positions don't begin anew; a soft prompt.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ConfigError(
                f"packing can't go with {config.peft_type} (adapter {name}): the virtual tokens stand in front of a "
                f"row, and only its first example would have them; leave packing out"
            )
    # Random ids and not a text: a leak must move the logits, and unlikely tokens move them most.
    drawn = torch.randint(0, model.get_input_embeddings().num_embeddings, (3, PROBED_TOKENS), generator=_generator())
    first, other, second = (Encoded(ids, [IGNORED] * PROBED_TOKENS) for ids in drawn.tolist())
    # (PROBED_TOKENS, vocabulary) of the same example: behind two different ones, and by itself.
    behind, behind_other = _logits(model, (first, second)), _logits(model, (other, second))
    alone = _logits(model, (second,))
    # Two tests, for a model may be wrong in one way alone: relative positions hide a wrong start, a leak hides nothing.
    seen, moved = _distance(behind, behind_other), _distance(behind, alone)
    if seen > LEAK or moved > ROUNDING:
        # A leak moves the logits with the example before; wrong positions move them whatever stands there.
        why = "an example sees the one before it" if seen > LEAK else "an example isn't what it is alone"
        raise ConfigError(
            f"packing can't go with {type(model).__name__}: in a packed row {why} (its logits differ by "
            f"{max(seen, moved):.1%}); leave packing out, padded batches are right"
        )


@torch.no_grad()
def _logits(model: Any, row: tuple[Encoded, ...]) -> torch.Tensor:
    """The logits of the last example of a row: (PROBED_TOKENS, vocabulary)."""
    batch = {k: v for k, v in PackRows.of(model, 0)([row]).items() if k != "labels"}
    was_training = model.training
    try:
        model.eval()
        output = model(**{k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
    finally:
        model.train(was_training)
    return output.logits[0, -PROBED_TOKENS:].float()


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


def _generator() -> torch.Generator:
    # Of its own, so that a run with packing draws what a run without it draws.
    return torch.Generator().manual_seed(0)
