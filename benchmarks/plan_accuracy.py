"""Planned memory beside what really is live: the same step, simulated and run on the CPU under the same counter.

    python -m benchmarks.plan_accuracy          # all methods, bases and models; writes docs/figures/planning.md
    python -m benchmarks.plan_accuracy --tasks  # tagging, sequences and preferences likewise
    python -m benchmarks.plan_accuracy --rss    # SmolLM2 as a process: its peak above what it was before the model

What a process takes beyond its live tensors is told apart by running it twice: with the C library's allocator as it
is, which keeps much of what is freed, and with one that gives freed memory back (MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import slimtune
from benchmarks.worker import status_bytes
from slimtune.errors import ConfigError, TargetError
from slimtune.plan.build import config_of
from slimtune.plan.devices import CPU_LIBRARIES_BYTES, this_cpu
from slimtune.plan.memory import PRECISIONS, MemoryPlan
from slimtune.plan.simulate import plan_of, quiet, setting_of
from slimtune.plan.trace import prepare, trace, train

PAGE = Path(__file__).parent.parent / "docs" / "figures" / "planning.md"
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = WIDE | {"vocab_size": 1000, "max_position_embeddings": 128, "pad_token_id": 0}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _llama() -> Any:
    return transformers.LlamaConfig(**TEXT, num_key_value_heads=2)


def _gpt2() -> Any:
    return transformers.GPT2Config(vocab_size=1000, n_positions=128, n_embd=64, n_layer=3, n_head=4, pad_token_id=0)


def _bert() -> Any:
    return transformers.BertConfig(**TEXT, **UNDROPPED)


def _t5() -> Any:
    return transformers.T5Config(
        vocab_size=1000, d_model=64, d_kv=16, d_ff=160, num_layers=2, num_heads=4, decoder_start_token_id=0
    )


def _vit() -> Any:
    return transformers.ViTConfig(
        **WIDE, **UNDROPPED, image_size=32, patch_size=4, architectures=["ViTForImageClassification"]
    )


@dataclass(frozen=True)
class Model:
    """A model to plan, its task, and the batch: tokens in an example."""

    config: Callable[[], Any]
    task_type: str | None
    batch: int = 4
    sequence: int = 48
    fields: Mapping[str, Any] = field(default_factory=dict)


MODELS = {
    "Llama-like": Model(_llama, "CAUSAL_LM"),
    "GPT-2-like": Model(_gpt2, "CAUSAL_LM"),
    "BERT-like": Model(_bert, "SEQ_CLS"),
    "T5-like": Model(_t5, "SEQ_2_SEQ_LM"),
    "ViT-like": Model(_vit, None),
    "SmolLM2-135M": Model(functools.partial(config_of, "smollm2-135m-instruct"), "CAUSAL_LM", 1, 64),
}
TASKS = {
    "tagging": Model(_bert, "TOKEN_CLS"),
    "seq2seq": Model(_t5, "SEQ_2_SEQ_LM", fields={"answer": 16}),
    **{name: Model(_llama, "CAUSAL_LM", fields={"task": name}) for name in ("dpo", "kto", "orpo")},
    "grpo": Model(_llama, "CAUSAL_LM", fields={"task": "grpo", "generations": 4, "answer": 24}),
}
METHODS: dict[str, Callable[[], Any]] = {
    "full": lambda: None,
    "LoRA": lambda: slimtune.LoraConfig(r=8),
    "LoRA, dropout": lambda: slimtune.LoraConfig(r=8, lora_dropout=0.1),
    "DoRA": lambda: slimtune.LoraConfig(r=8, use_dora=True),
    "AdaLoRA": lambda: slimtune.AdaLoraConfig(total_step=10),
    "VeRA": lambda: slimtune.VeraConfig(r=16),
    "LoHa": lambda: slimtune.LoHaConfig(r=4),
    "IA3": lambda: slimtune.IA3Config(),
    "BitFit": lambda: slimtune.BitFitConfig(),
    "bottleneck": lambda: slimtune.BottleneckConfig(),
    "prompt tuning": lambda: slimtune.PromptTuningConfig(num_virtual_tokens=4),
    "prefix tuning": lambda: slimtune.PrefixTuningConfig(num_virtual_tokens=4),
}


@dataclass(frozen=True)
class Case:
    """One method on one model; `device` is the CPU, whose kernels the real step runs."""

    model: str
    method: str
    base: str = "dense"
    checkpointing: bool = False

    def asked(self) -> tuple[Any, Any]:
        """The configuration of the model and the setting. Raises: ConfigError."""
        model, method = (MODELS | TASKS)[self.model], METHODS[self.method]()
        if method is not None:
            method.task_type = model.task_type
        fields = {"base": self.base, "gradient_checkpointing": self.checkpointing, "device": "cpu"}
        fields |= {"batch": model.batch, "sequence": model.sequence, "task_type": model.task_type} | model.fields
        return model.config(), setting_of(method, fields)

    def run(self, fake: bool) -> MemoryPlan:
        """The plan from simulating a step, or from two real ones: the second finds the optimizer's state."""
        torch.manual_seed(0)
        config, setting = self.asked()
        with quiet():
            return plan_of(trace(config, setting, setting.task_type, fake=fake, steps=1 if fake else 2), setting)

    def error(self) -> float | None:
        """How far the simulated peak is from the real one; None where the method doesn't go with the model."""
        try:
            simulated = self.run(fake=True)
        except (ConfigError, TargetError):
            return None
        return simulated.peak_bytes / self.run(fake=False).peak_bytes - 1


def cases(models: Iterable[str] = MODELS, methods: Iterable[str] = METHODS) -> Iterator[Case]:
    """Every combination; what is refused among them, refuses itself."""
    yield from (
        Case(model, method, base, checkpointing)
        for method in methods
        for model in models
        for base in PRECISIONS
        for checkpointing in (False, True)
    )


def accuracy_table(models: Iterable[str] = MODELS, methods: Iterable[str] = METHODS) -> list[str]:
    """Methods by models: the largest error over the bases, with and without checkpointing."""
    lines = [_row(["method", *models]), _row(["---"] * (1 + len(list(models))))]
    for method in methods:
        cells = []
        for model in models:
            errors = [e for case in cases([model], [method]) if (e := case.error()) is not None]
            cells.append(f"{max(errors, key=abs):+.2%} ({len(errors)})" if errors else "")
            print(method, model, cells[-1], flush=True)
        lines.append(_row([method, *cells]))
    return lines


RSS_CASES = (
    ("LoRA", "dense", False), ("LoRA", "dense", True), ("LoRA", "nf4", False), ("LoRA", "int8", False),
    ("DoRA", "dense", False), ("bottleneck", "dense", False), ("full", "dense", False),
)  # fmt: skip
RSS_SHAPE = Model(MODELS["SmolLM2-135M"].config, "CAUSAL_LM", 4, 256)


def rss_table() -> list[str]:
    """The simulated peak beside the resident peak of a process, above what it was before it built the model."""
    head = ["method", "base", "checkpointing", "live", "process, memory given back", "live beside it"]
    lines = [_row([*head, "planned", "process", "planned beside it"]), _row(["---"] * 9)]
    for method, base, checkpointing in RSS_CASES:
        live = _process(method, base, checkpointing, True, {})
        planned = this_cpu().needed_bytes(live) - CPU_LIBRARIES_BYTES
        lean, usual = (_process(method, base, checkpointing, False, env) for env in (RETURNS_MEMORY, {}))
        shown = [_gb(live), _gb(lean), _error(live, lean), _gb(planned), _gb(usual), _error(planned, usual)]
        lines.append(_row([method, base, "yes" if checkpointing else "no", *shown]))
        print(lines[-1], flush=True)
    return lines


def _process(method: str, base: str, checkpointing: bool, fake: bool, environment: dict[str, str]) -> int:
    asked = json.dumps([method, base, checkpointing, fake])
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--one", asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return int(done.stdout.splitlines()[-1])


def measure_one(method: str, base: str, checkpointing: bool, fake: bool) -> int:
    """Planned bytes, or what this process grows by beyond a step of a tiny model, which loads all kernels."""
    MODELS["this"] = RSS_SHAPE
    case = Case("this", method, base, checkpointing)
    if fake:
        return case.run(fake=True).peak_bytes
    Case("Llama-like", method, base, checkpointing).run(fake=False)
    gc.collect()
    config, setting = case.asked()
    before = status_bytes("VmRSS")
    with quiet():
        run = prepare(config, setting, setting.task_type, fake=False)
        gc.collect()
        # The model was built dense and drawn, unlike a loaded one: what that took is left out of the peak.
        Path("/proc/self/clear_refs").write_text("5")
        train(run, steps=2)
    return status_bytes("VmHWM") - before


def write(name: str, lines: Sequence[str]) -> None:
    """Put a table between its marks in the page."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = PAGE.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise SystemExit(f"{PAGE} has no place for the table: {start} and {end}")
    head, _, rest = text.partition(start)
    tail = rest.partition(end)[2]
    PAGE.write_text("\n".join([head + start, *lines, end]) + tail, encoding="utf-8")


def _error(planned: int, measured: int) -> str:
    return f"{planned / measured - 1:+.1%}"


def _gb(value: int) -> str:
    return f"{value / 1e9:.3f} GB"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rss", action="store_true", help="the resident peak of processes instead")
    parser.add_argument("--tasks", action="store_true", help="tasks instead of models")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.one:
        print(measure_one(*json.loads(arguments.one)))
    elif arguments.rss:
        write("resident memory", rss_table())
    elif arguments.tasks:
        write("tasks", accuracy_table(TASKS, ("full", "LoRA", "DoRA", "IA3")))
    else:
        write("live storages", accuracy_table())


if __name__ == "__main__":
    main()
