"""One method trained once and taken apart, in a process of its own: JSON in, JSON out.

What all runs have in common, the base's singular vectors and its losses, is kept in a scratch folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import slimtune
from benchmarks.intruder_cases import METHODS, Size
from benchmarks.method_worker import Orders, prepared, train
from slimtune.evaluate.domain_texts import texts
from slimtune.evaluate.forgetting import MAX_LENGTH, all_passages, compare
from slimtune.evaluate.intruders.spectra import Spectrum, spectrum
from slimtune.evaluate.intruders.svd import decompose
from slimtune.evaluate.intruders.updates import TunedMatrix, Updates, adapter_updates, model_updates
from slimtune.evaluate.language_loss import losses

EPSILON = 0.5


def taken_apart(updates: Updates, size: Size, scratch: Path) -> list[Spectrum]:
    """The spectra, with the base's left singular vectors from the scratch folder where they are there."""
    chosen = [one for one in updates.matrices if size.layers is None or (one.layer or 0) < size.layers]
    kept = scratch / "left.safetensors"
    known = load_file(kept) if kept.exists() else {}
    if not {one.name for one in chosen} <= known.keys():
        known = {one.name: _left(one) for one in chosen}
        save_file(known, kept)
    return [spectrum(one, size.top, EPSILON, left=known[one.name]) for one in chosen]


def _left(matrix: TunedMatrix) -> torch.Tensor:
    return decompose(matrix.read().before).left.contiguous()


def forgetting(bench: Orders, model: Any, size: Size, scratch: Path) -> dict[str, float]:
    """The mean difference over the domains, and that of each."""
    read = all_passages(texts(limit=size.texts), bench.tokenizer, MAX_LENGTH)
    kept = scratch / "base.safetensors"
    if not kept.exists():
        save_file({"losses": losses(bench.base(torch.bfloat16), bench.tokenizer, read)}, kept)
    before = load_file(kept)["losses"].numpy()
    found = compare(read, before, losses(model, bench.tokenizer, read).numpy(), worst=0)
    return {"mean": found.difference, **{name: one.difference for name, one in found.domains.items()}}


def summary(found: list[Spectrum]) -> dict[str, Any]:
    """The figures of a table."""
    return {
        "matrices": len(found),
        "intruders_10": sum(sum(c < EPSILON for c in one.cosines[:10]) for one in found),
        "intruders_100": sum(sum(c < EPSILON for c in one.cosines) for one in found),
        "lowest_cosine": median(min(one.cosines) for one in found),
        "effective_rank": median(one.effective_rank for one in found),
        "stable_rank": median(one.stable_rank for one in found),
        "relative_norm": median(one.relative_norm for one in found),
    }


def measure(name: str, seed: int, size: Size, folder: str, scratch: Path) -> dict[str, Any]:
    """Train, score, take apart."""
    method = next(one for one in METHODS if one.name == name)
    task = size.task()
    bench = Orders(task, folder)
    transformers.set_seed(seed)
    model, _ = prepared(bench, method, task, slimtune)
    transformers.set_seed(seed)
    trained = train(bench, model, method, task, seed)
    model.eval()
    # Full tuning's update is W' - W before W' is rounded to what would be stored.
    updates = adapter_updates(model, "default") if method.config else model_updates(bench.base(torch.float32), model)
    found = summary(taken_apart(updates, size, scratch))
    model = model if method.config else model.to(torch.bfloat16)
    return {
        **found, "loss": trained["last_loss"], "score": bench.score(model),
        "forgetting": forgetting(bench, model, size, scratch),
    }  # fmt: skip


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    given = json.loads(sys.argv[1])
    result = measure(given["method"], given["seed"], Size(**given["size"]), given["folder"], Path(given["scratch"]))
    result["torch"] = {"threads": torch.get_num_threads(), "device": "cpu",
                       "cpu_capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
    print(json.dumps(result))
