"""The results on disk: JSON with all that was measured, and beside it the table as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine, page, table
from benchmarks.cases import Case
from benchmarks.runs import Round

FOLDER = Path(__file__).parent / "results"
NOTE = (
    "step: median seconds of a training step (forward, backward, AdamW) after a warm-up step. "
    "peak memory: the peak RSS of the whole process, imports included "
    "(on a GPU: torch.cuda.max_memory_allocated). "
    "above imports: the same less what was resident before the model was loaded. "
    "floor: the same frozen model without an adapter, its gradients passing through to the input, "
    "with the loss of transformers. "
    "import: after torch and transformers. "
    "LoRA bf16: slimtune's LoRA on the base that isn't quantized. "
    "peft uncast: without prepare_model_for_kbit_training, which peft's guide asks for. "
    "attach, load: an adapter onto a fresh base; load a second: onto a model that has one; of a base: from a 16-bit "
    "folder (peft: transformers). "
    "ratio: peft / slimtune unless the figure says otherwise; its median and range over the rounds, "
    "in each of which all sides took their turn in a process of their own."
)


def record(case: Case, rounds: list[Round], load_before: float) -> dict[str, Any]:
    """A case as it is kept: the summary, and all that was measured."""
    return {
        "date": machine.today(),
        "commit": machine.commit(),
        "load_before": load_before,
        "work": asdict(case.work),
        "bitsandbytes": machine.installed("bitsandbytes") if case.work.quantize else None,
        "summary": list(table.summary(case, rounds)),
        "rounds": rounds,
    }


def kept(path: Path, on: dict[str, Any]) -> dict[str, Any]:
    """The cases that the file holds, if they were measured on the same machine with the same versions."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    return document["cases"] if document["machine"] == on else {}


def write(path: Path, on: dict[str, Any], records: dict[str, Any], order: Sequence[Case]) -> None:
    """Write the records; cases that were measured earlier on the same machine stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = kept(path, on) | records
    cases = {case.name: known[case.name] for case in order if case.name in known}
    path.write_text(json.dumps({"machine": on, "note": NOTE, "cases": cases}, indent=1) + "\n")
    rows = [row for one in cases.values() for row in one["summary"]]
    path.with_suffix(".md").write_text(f"{table.markdown(rows)}\n{subtitle(on)}\n\n{NOTE}\n")


def show(path: Path, device: str) -> None:
    """Put what the file holds of quantized bases into their page."""
    document = json.loads(path.read_text())
    cases = [one for one in document["cases"].values() if one["work"].get("quantize")]
    if not cases:
        return
    last, dates = cases[-1], sorted({one["date"] for one in cases})
    note = (
        f"rounds: {len(last['rounds'])}; bitsandbytes {last['bitsandbytes']}; {subtitle(document['machine'])} "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )
    rows = table.markdown(row for one in cases for row in one["summary"])
    page.fill(page.QUANTIZED, f"speed {device}", f"{rows}\n{note}")


def subtitle(on: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items() if version)
    device = "" if on["device"] == "cpu" else f"{on['device']}, "
    return f"{device}{on['cpu']}, {on['cores']} cores, {on['cpu_capability']}; {versions}."
