"""One measurement in a process of its own: reads a specification as JSON, prints what it measured as JSON.

The process is fresh so that its peak of memory is its own, and so that nothing that one side cached or
compiled serves the other. torch and transformers are loaded before the clock of `import_seconds` starts: all
sides need them.
"""

from __future__ import annotations

import copy
import importlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from benchmarks.bases import base_model
from benchmarks.cases import Work

Metrics = dict[str, float]

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-3
REPEATS = 5
SWITCHES = 20
MINIATURE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of an action, and what it returned."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def status_bytes(field: str) -> int:
    """A field of this process's /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_rss_bytes() -> int:
    """The highest resident set of this process.

    Linux carries `ru_maxrss` on through fork and exec, so a fat parent would show in it; `VmHWM` starts anew.
    """
    if sys.platform == "linux":
        return status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """What is resident now; elsewhere than on Linux the peak so far stands in for it."""
    return status_bytes("VmRSS") if sys.platform == "linux" else peak_rss_bytes()


def lora_config(library: Any, dropout: float = 0.0, dora: bool = False) -> Any:
    """The adapter of every case: all linear layers, rank 16."""
    options: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": dora}
    return library.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, **options)


def prepared(work: Work, library: Any | None, folder: str) -> Any:
    """The model with the library's adapter; for the floor frozen, its gradients only passing through."""
    model = base_model(work, folder, library)
    if work.checkpointing:
        model.gradient_checkpointing_enable()
    if work.quantize and work.prepare and hasattr(library, "prepare_model_for_kbit_training"):
        library.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if library is None:
        model.requires_grad_(False)
        model.enable_input_require_grads()
    else:
        model = library.get_peft_model(model, lora_config(library, work.dropout, work.dora))
    return model.train()


class Trainer:
    """The least training loop: the same batch each step, the time of each part taken."""

    def __init__(self, work: Work, model: Any) -> None:
        self.work, self.model = work, model
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE) if self.trainable else None
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().num_embeddings
        shape = (work.batch, work.length)
        self.input_ids = torch.randint(0, vocabulary, shape, generator=generator).to(work.device)

    def forward(self) -> torch.Tensor:
        return self.model(input_ids=self.input_ids, labels=self.input_ids).loss

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def step(self) -> Metrics:
        """One step; the gradients stay until the next one so that they can be looked at."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        processor_started = time.process_time()
        forward, loss = timed(lambda: self.synchronized(self.forward))
        backward, _ = timed(lambda: self.synchronized(loss.backward))
        update, _ = timed(lambda: self.synchronized(self.update))
        return {
            "loss": loss.item(),
            "forward_seconds": forward,
            "backward_seconds": backward,
            "update_seconds": update,
            "step_seconds": forward + backward + update,
            "processor_seconds": time.process_time() - processor_started,
        }

    def synchronized(self, action: Callable[[], Any]) -> Any:
        """The action and, on a GPU, the wait until it has really ended."""
        result = action()
        if self.work.device == "cuda":
            torch.cuda.synchronize()
        return result


def measure_training(work: Work, library: Any | None, folder: str) -> dict[str, Metrics]:
    """Seconds and bytes of a training step, and what shows that both sides did the same."""
    imported_bytes = resident_bytes() if work.device == "cpu" else 0
    trainer = Trainer(work, prepared(work, library, folder))
    steps = [trainer.step() for _ in range(work.steps)]
    peak = torch.cuda.max_memory_allocated() if work.device == "cuda" else peak_rss_bytes()
    metrics = {key: median(step[key] for step in steps[1:]) for key in steps[0] if key != "loss"}
    metrics |= {"peak_bytes": peak, "peak_above_imports_bytes": peak - imported_bytes}
    checks = {
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "trainable": sum(p.numel() for p in trainer.trainable),
        "without_gradient": sum(p.grad is None for p in trainer.trainable),
    }
    return {"metrics": metrics, "checks": checks}


def save_miniature(folder: str, target: str) -> None:
    """A model of the same architecture with next to nothing in it: to load it imports all that is imported late."""
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in MINIATURE.items():
        setattr(config, name, value)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
    if has_tokenizer(folder):
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(target)


def has_tokenizer(folder: str) -> bool:
    return (Path(folder) / "tokenizer_config.json").exists()


def model_and_tokenizer(work: Work, library: Any, folder: str) -> tuple[Any, Any]:
    """The base with its tokenizer, where there is one: slimtune always loads both."""
    model = base_model(work, folder, library)
    by_itself = hasattr(library, "load") or not has_tokenizer(folder)
    return model, None if by_itself else transformers.AutoTokenizer.from_pretrained(folder)


def measure_loading(work: Work, library: Any, folder: str) -> dict[str, Metrics]:
    """Seconds and bytes of loading; the loss is taken in training mode, which leaves bitsandbytes' storage alone."""
    with tempfile.TemporaryDirectory() as miniature:
        save_miniature(folder, miniature)
        model_and_tokenizer(work, library, miniature)
    imported_bytes = resident_bytes()
    seconds, (model, _) = timed(lambda: model_and_tokenizer(work, library, folder))
    peak = peak_rss_bytes()
    metrics = {"load_seconds": seconds, "peak_bytes": peak, "peak_above_imports_bytes": peak - imported_bytes}
    return {"metrics": metrics, "checks": {"loss": fixed_loss(model.train())}}


def measure_adapters(work: Work, library: Any, folder: str, adapter: str) -> dict[str, Metrics]:
    """Seconds to attach a new adapter, to load one from disk, and to switch between two."""
    base = base_model(work, folder)

    def on_fresh_bases(action: Callable[[Any], Any]) -> tuple[list[float], Any]:
        """Each time on a base of its own: a second attach to the same base would be another thing."""
        seconds, model = [], None
        for _ in range(REPEATS + 1):
            model = copy.deepcopy(base)
            spent, model = timed(lambda fresh=model: action(fresh))
            seconds.append(spent)
        return seconds, model

    attach, _ = on_fresh_bases(lambda fresh: library.get_peft_model(fresh, lora_config(library)))
    load, model = on_fresh_bases(lambda fresh: library.PeftModel.from_pretrained(fresh, adapter))
    names = [f"extra-{number}" for number in range(REPEATS + 1)]
    load_second = [timed(lambda name=name: model.load_adapter(adapter, name))[0] for name in names]
    for name in names[1:]:
        model.delete_adapter(name)
    pair = ["default", names[0]]
    switch = [timed(lambda i=i: model.set_adapter(pair[i % 2]))[0] for i in range(SWITCHES + 1)]
    metrics = {
        "attach_first_seconds": attach[0],
        "attach_seconds": median(attach[1:]),
        "load_first_seconds": load[0],
        "load_seconds": median(load[1:]),
        "load_second_seconds": median(load_second[1:]),
        "switch_seconds": median(switch[1:]),
    }
    return {"metrics": metrics, "checks": {"adapter_loss": fixed_loss(model.eval())}}


@torch.no_grad()
def fixed_loss(model: Any) -> float:
    """The loss of a fixed row of tokens: the same on both sides if they loaded the same."""
    row = torch.arange(1000, 1064)[None]
    return model(input_ids=row, labels=row).loss.item()


def measure(specification: dict[str, Any]) -> dict[str, Any]:
    """What the specification asks for, and the settings of torch that it ran under."""
    torch.manual_seed(0)
    work = Work(**specification["work"])
    name, folder = specification["library"], specification["folder"]
    import_seconds, library = timed(lambda: load_library(name))
    if work.quantize:
        for needed in ("accelerate", "bitsandbytes"):
            importlib.import_module(needed)
    if specification["profile"]:
        from benchmarks.profiling import profile_step

        trainer = Trainer(work, prepared(work, library, folder))
        return profile_step(trainer)
    if work.kind == "adapters":
        result: dict[str, Any] = measure_adapters(work, library, folder, specification["adapter"])
    elif work.kind == "load":
        result = measure_loading(work, library, folder)
    else:
        result = measure_training(work, library, folder)
    result["metrics"]["import_seconds"] = import_seconds
    result["torch"] = {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if work.device == "cuda" else "cpu",
    }
    return result


def load_library(name: str | None) -> Any | None:
    """Import a library and the names used here: some are only loaded when they are first asked for."""
    if name is None:
        return None
    library = importlib.import_module(name)
    for used in ("LoraConfig", "PeftModel", "get_peft_model"):
        getattr(library, used)
    return library


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    print(json.dumps(measure(json.loads(sys.argv[1]))))
