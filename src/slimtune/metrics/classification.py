"""Labels for texts, and how often they are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def classify(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, list[int]]],
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """p_NL of each label of the model for tokenized texts, in their order; `on_batch` is told how many were read."""
    was_training = model.training
    model.eval()
    # Texts of similar length share a batch, so that little of it is padding.
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    by_index: dict[int, Tensor] = {}
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = tokenizer.pad([rows[index] for index in chosen], return_tensors="pt").to(model.device)
        # Softmax in float32: in bfloat16 it loses the third digit, and losses of unlikely labels with it.
        by_index |= dict(zip(chosen, model(**batch).logits.float().softmax(-1).cpu(), strict=True))
        on_batch(len(chosen))
    model.train(was_training)
    return torch.stack([by_index[index] for index in range(len(rows))])


def scores(predicted: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Accuracy, and macro F1: the mean over the labels of 2 TP / (2 TP + FP + FN)."""
    pairs = list(zip(predicted, true, strict=True))
    f1 = []
    # Labels that are only predicted count too, with F1 = 0: scikit-learn's macro average does the same.
    for label in {*predicted, *true}:
        right = sum(p == t == label for p, t in pairs)
        named = sum(p == label for p, _ in pairs) + sum(t == label for _, t in pairs)
        # 2 TP / (2 TP + FP + FN): named plus there is 2 TP + FP + FN.
        f1.append(2 * right / named)
    return {"accuracy": sum(p == t for p, t in pairs) / len(pairs), "macro_f1": sum(f1) / len(f1)}


def shown(values: dict[str, float]) -> str:
    """`accuracy 0.912, macro F1 0.903`."""
    return ", ".join(f"{name.replace('_f1', ' F1')} {value:.3f}" for name, value in values.items())
