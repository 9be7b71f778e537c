"""One method trained once in a process of its own: reads a specification as JSON, prints what it came to as JSON."""

from __future__ import annotations

import importlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import transformers

from benchmarks.bases import settings_of
from benchmarks.cases import Codec
from benchmarks.method_cases import METHODS, ON_QUANTIZED, TASKS, Method, Side, Task
from benchmarks.reviews import Review, cached_reviews
from benchmarks.worker import peak_rss_bytes, resident_bytes, timed

WARM_UP = 3
"""Steps whose time is not taken."""

Batch = dict[str, torch.Tensor]


class Bench(Protocol):
    """What a task brings: the base, batches to learn from, and a score."""

    def base(self, dtype: torch.dtype, quantize: Codec = "") -> Any: ...

    def batch(self, chosen: Sequence[int]) -> Batch: ...

    def score(self, model: Any) -> float: ...

    @property
    def size(self) -> int: ...


class Orders:
    """Spoken orders as chats, of which the answers are learned; scored by exact match of greedy answers."""

    def __init__(self, task: Task, folder: str) -> None:
        from slimtune.data.demo_orders import make_orders
        from slimtune.data.encode import encode
        from slimtune.data.rows import Conversation

        self.folder, self.tokenizer = folder, transformers.AutoTokenizer.from_pretrained(folder)
        train, self.held_out = make_orders(held_out=task.held_out)
        rows = [Conversation.model_validate({"messages": example.messages()}) for example in train]
        self.examples = encode(list(rows), self.tokenizer, 256).examples

    @property
    def size(self) -> int:
        return len(self.examples)

    def base(self, dtype: torch.dtype, quantize: Codec = "") -> Any:
        if not quantize:
            return transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)
        import slimtune

        settings = settings_of(quantize, dtype)
        return slimtune.load(self.folder, str(dtype).removeprefix("torch."), "cpu", quantize=settings)[0]

    def batch(self, chosen: Sequence[int]) -> Batch:
        from slimtune.data.batches import PadRight, pad_id_of

        return PadRight(pad_id_of(self.tokenizer))([self.examples[index] for index in chosen])

    def score(self, model: Any) -> float:
        from slimtune.evaluate.exact_match import exact_match

        return exact_match(model, self.tokenizer, self.held_out, [e.question() for e in self.held_out]).share


class Reviews:
    """Film reviews, positive or not; scored by the share that is told right."""

    def __init__(self, task: Task, folder: str) -> None:
        self.folder, self.tokenizer = folder, transformers.AutoTokenizer.from_pretrained(folder)
        self.train, held_out = cached_reviews()
        self.held_out = held_out[: task.held_out]

    @property
    def size(self) -> int:
        return len(self.train)

    def base(self, dtype: torch.dtype, quantize: Codec = "") -> Any:
        assert not quantize, "measured on the orders alone"
        return transformers.AutoModelForSequenceClassification.from_pretrained(self.folder, dtype=dtype, num_labels=2)

    def batch(self, chosen: Sequence[int]) -> Batch:
        return self._encoded([self.train[index] for index in chosen])

    def _encoded(self, rows: Sequence[Review]) -> Batch:
        texts, labels = [row.text for row in rows], [int(row.label == "positive") for row in rows]
        encoded = self.tokenizer(texts, truncation=True, max_length=96, padding=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor(labels)}

    @torch.inference_mode()
    def score(self, model: Any) -> float:
        model.eval()
        right = 0
        for start in range(0, len(self.held_out), 100):
            batch = self._encoded(self.held_out[start : start + 100])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return right / len(self.held_out)


BENCHES: dict[str, Callable[[Task, str], Bench]] = {"orders": Orders, "reviews": Reviews}


def config_of(method: Method, task: Task, library: Any) -> Any:
    """The method's config in a library, at the places that the task names."""
    fields: dict[str, Any] = {**method.fields, "task_type": task.task_type}
    fields |= {("target_modules" if p in ("scaled", "norms") else p): list(task.names[p]) for p in method.places}
    if method.config == "AdaLoraConfig":
        fields["total_step"] = task.steps
    if method.config == "BitFitConfig" and task.name == "orders":
        fields["add_bias"] = True  # a Llama has no bias of its own
    return getattr(library, method.config)(**fields)


def bits_per_weight(model: Any) -> float:
    """What is stored for a weight of the linear layers in the blocks, scales included."""
    blocks = [one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and ".layers." in name]
    stored = sum(tensor.nbytes for one in blocks for tensor in one.state_dict().values())
    return 8 * stored / sum(one.in_features * one.out_features for one in blocks)


def prepared(bench: Bench, method: Method, task: Task, library: Any) -> tuple[Any, float]:
    """The model ready to train and the seconds that attaching took; full tuning holds its weights in float32."""
    if not method.config:
        return bench.base(torch.float32).train(), 0.0
    base = bench.base(getattr(torch, task.dtype), method.quantize)
    # The library's own modules are imported by the first config, which is no part of attaching.
    config = config_of(method, task, library)
    seconds, model = timed(lambda: library.get_peft_model(base, config))
    return model.train(), seconds


def orderings(size: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The same batches for every method and side of a seed."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch:
            order = rng.sample(range(size), size)
        yield [order.pop() for _ in range(batch)]


def train(bench: Bench, model: Any, method: Method, task: Task, seed: int) -> dict[str, float]:
    """The least training loop; what it measured."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=method.rates[task.name], weight_decay=0.0)
    warm = max(1, task.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (task.steps - step) / (task.steps - warm))
    )
    full_in_16_bits = not method.config and task.dtype == "bfloat16"
    seconds, losses = [], []
    for number, chosen in enumerate(orderings(bench.size, task.batch, task.steps, seed)):
        batch = bench.batch(chosen)
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if full_in_16_bits else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        if method.config == "AdaLoraConfig":
            owner = model.base_model if type(model).__module__.startswith("peft.") else model
            owner.update_and_allocate(number)
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    return {
        "trainable": sum(p.numel() for p in trainable),
        "step_seconds": median(seconds[WARM_UP:]),
        "first_loss": losses[0],
        "last_loss": sum(losses[-5:]) / 5,
    }


def measure(task: Task, method: Method, side: Side, seed: int, folder: str) -> dict[str, Any]:
    """Train, save, and score what was saved, read again by slimtune on a fresh base."""
    bench = BENCHES[task.name](task, folder)
    library = importlib.import_module("slimtune" if side == "ours" else "peft")
    transformers.set_seed(seed)
    if method.quantize:
        for needed in ("accelerate", "bitsandbytes"):
            importlib.import_module(needed)
    before = resident_bytes()
    model, attach_seconds = prepared(bench, method, task, library)
    # Attaching draws more numbers in one library than in the other, and dropout would differ from there on.
    transformers.set_seed(seed)
    found: dict[str, Any] = {"attach_seconds": attach_seconds, **train(bench, model, method, task, seed)}
    found |= {"peak_bytes": peak_rss_bytes(), "peak_above_imports_bytes": peak_rss_bytes() - before}
    if not method.config:
        stored = sum(p.numel() for p in model.parameters()) * (2 if task.dtype == "bfloat16" else 4)
        return found | {"stored_bytes": stored, "score": bench.score(model.to(getattr(torch, task.dtype)))}
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        found["stored_bytes"] = (Path(saved) / "adapter_model.safetensors").stat().st_size
        if side == "peft" and "init_lora_weights" in method.fields:
            # What peft saves belongs to the base that it changed.
            return found | {"score": bench.score(model)}
        from slimtune import PeftModel

        transformers.set_seed(seed)
        base = bench.base(getattr(torch, task.dtype), method.quantize)
        if method.quantize:
            found["bits_per_weight"] = bits_per_weight(base)
        reread = PeftModel.from_pretrained(base, saved)
        return found | {"score": bench.score(reread)}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    given = json.loads(sys.argv[1])
    chosen = next(method for method in METHODS + ON_QUANTIZED if method.name == given["method"])
    result = measure(TASKS[given["task"]], chosen, given["side"], given["seed"], given["folder"])
    result["torch"] = {"threads": torch.get_num_threads(), "device": "cpu",
                       "cpu_capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
    print(json.dumps(result))
