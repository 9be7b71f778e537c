"""What a comparison was made with: kept beside the results, shown on the page."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from slimtune.compare.results import reading
from slimtune.models.device import ram
from slimtune.storage.atomic import write_file

FACTS = "comparison.json"


class ConstantAnswer(BaseModel):
    """One label for every question, and the share of them that it is right on."""

    model_config = ConfigDict(extra="forbid")

    label: str
    share: float


class ComparisonRecord(BaseModel):
    """The settings, the machine and the versions.

    Attributes:
        same: what must not change while runs are added: model, data, budget, training, evaluation.
        price_per_hour: US dollars for the machine, None if it costs nothing or nobody knows.
        constant: the most frequent label to learn from, where there are labels.
        remarks: what a reader must know besides what the runs say, in sentences.
        computes: whether the dtype `auto` is what the machine is fast in; earlier versions ran what is stored.
        moved: the machines and versions that earlier runs were made with, where they are others; in sentences.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    data: str
    command: str
    date: str
    recipe: str
    # Earlier versions called them arms.
    candidates: list[str] = Field(validation_alias=AliasChoices("candidates", "arms"))
    seeds: int
    same: dict[str, Any]
    machine: dict[str, str]
    versions: dict[str, str]
    price_per_hour: float | None = None
    price_of: str = ""
    constant: ConstantAnswer | None = None
    remarks: list[str] = []
    computes: bool = False
    moved: list[str] = []

    def write(self, folder: Path) -> None:
        """Write it whole or not at all."""
        write_file(folder / FACTS, self.model_dump_json(indent=1) + "\n")


def read_record(folder: Path) -> ComparisonRecord | None:
    """The facts of the comparison that lies in a folder, if there is one; raises DataError if they are damaged."""
    path = folder / FACTS
    if not path.is_file():
        return None
    with reading(path, "choose another --output"):
        return ComparisonRecord.model_validate_json(path.read_bytes())


def today() -> str:
    """In UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def machine() -> dict[str, str]:
    """The processor, its cores, the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = {"processor": _processor(), "cores": str(cores), "system": f"{platform.system()} {platform.machine()}"}
    memory = ram()
    if memory is not None:
        facts["memory"] = f"{memory.total / 1e9:.1f} GB"
    return facts


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.is_file() else None
    return named[1].strip() if named else platform.processor() or platform.machine()
