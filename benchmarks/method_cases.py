"""Which methods are compared, with which settings, on which tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.cases import Codec

Side = Literal["ours", "peft"]
TaskName = Literal["orders", "reviews"]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENCODER_LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


@dataclass(frozen=True)
class Task:
    """A base, data, and how long to train."""

    name: TaskName
    title: str
    model: str
    task_type: str
    dtype: str
    steps: int
    batch: int
    held_out: int
    score: str
    linear: list[str]
    names: Mapping[str, Any]
    """What the model calls the places that `Method.places` asks for."""


@dataclass(frozen=True)
class Method:
    """A method with its settings: `fields` for both libraries, the rate by task."""

    name: str
    config: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    """Fields that are given the task's own module names, so that both libraries train the same places."""
    in_peft: bool = True
    quantize: Codec = ""
    """How the base is stored while the adapter is trained and scored."""


TASKS = {
    "orders": Task(
        "orders", "spoken order to JSON, SmolLM2-135M-Instruct", "smollm2-135m-instruct", "CAUSAL_LM", "bfloat16",
        steps=40, batch=8, held_out=50, score="exact match", linear=LINEAR,
        names={
            "target_modules": LINEAR,
            "scaled": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
            "norms": ["input_layernorm", "post_attention_layernorm", "norm"],
        },
    ),
    "reviews": Task(
        "reviews", "sentiment of film reviews, MiniLM-L6", "minilm-l6-v2", "SEQ_CLS", "float32",
        steps=100, batch=16, held_out=1000, score="accuracy", linear=ENCODER_LINEAR,
        names={
            "target_modules": ENCODER_LINEAR,
            "scaled": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
            "norms": ["LayerNorm"],
        },
    ),
}  # fmt: skip

LOW_RANK = {"r": 16, "lora_alpha": 32}
LYCORIS = {"r": 16, "alpha": 32}


def both(rate: float, reviews: float | None = None) -> dict[str, float]:
    return {"orders": rate, "reviews": rate if reviews is None else reviews}


METHODS = (
    Method("lora", "LoraConfig", LOW_RANK, both(1e-3), ("target_modules",)),
    Method("dora", "LoraConfig", {**LOW_RANK, "use_dora": True}, both(1e-3), ("target_modules",)),
    Method("pissa", "LoraConfig", {**LOW_RANK, "init_lora_weights": "pissa"}, both(1e-3, reviews=3e-4),
           ("target_modules",)),
    Method("adalora", "AdaLoraConfig", {"init_r": 16, "target_r": 12, "lora_alpha": 32, "tinit": 8, "tfinal": 16},
           both(1e-2), ("target_modules",)),
    Method("vera", "VeraConfig", {"r": 256}, both(2e-2, reviews=3e-2), ("target_modules",)),
    Method("loha", "LoHaConfig", LYCORIS, both(2e-3), ("target_modules",)),
    Method("lokr", "LoKrConfig", LYCORIS, both(2e-3), ("target_modules",)),
    Method("ia3", "IA3Config", {}, both(1e-2), ("scaled", "feedforward_modules")),
    Method("ln-tuning", "LNTuningConfig", {}, both(1e-2), ("norms",)),
    Method("bitfit", "BitFitConfig", {}, both(1e-2), in_peft=False),
    Method("houlsby", "BottleneckConfig", {"placement": "houlsby"}, both(2e-3), in_peft=False),
    Method("pfeiffer", "BottleneckConfig", {"placement": "pfeiffer"}, both(2e-3), in_peft=False),
    Method("parallel", "BottleneckConfig", {"placement": "parallel"}, both(2e-3), in_peft=False),
    Method("prefix-tuning", "PrefixTuningConfig", {"num_virtual_tokens": 20}, both(2e-2, reviews=3e-2)),
    Method("prefix, from words", "PrefixTuningConfig", {"num_virtual_tokens": 20, "prefix_init": "SAMPLE_VOCAB"},
           both(1e-2), in_peft=False),
    Method("prompt-tuning", "PromptTuningConfig", {"num_virtual_tokens": 20}, both(1e-1)),
    Method("prompt, from words", "PromptTuningConfig",
           {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}, both(3e-2), in_peft=False),
    Method("p-tuning", "PromptEncoderConfig", {"num_virtual_tokens": 20, "encoder_hidden_size": 256},
           both(1e-3)),
    Method("last-layer", "LastLayerConfig", {}, both(1e-3, reviews=1e-2), in_peft=False),
    Method("full", "", {}, both(1e-4), in_peft=False),
)  # fmt: skip


ON_QUANTIZED = (
    *(replace(METHODS[0], name=f"lora-{codec}", in_peft=False, quantize=codec) for codec in ("nf4-dq", "nf4", "int8")),
    replace(METHODS[1], name="dora-nf4-dq", in_peft=False, quantize="nf4-dq"),
)
"""LoRA and DoRA as they stand above, on quantized bases."""


def settings_of(task: Task, method: Method) -> dict[str, Any]:
    """What a run depends on; a run under other settings is another run."""
    settings = {
        "fields": dict(method.fields), "rate": method.rates[task.name], "steps": task.steps, "batch": task.batch,
        "held_out": task.held_out, "places": {place: task.names[place] for place in method.places},
    }  # fmt: skip
    if method.quantize:
        settings["quantize"] = method.quantize
    return json.loads(json.dumps(settings))
