"""A training by TRL's own trainer, as its users write it, with the adapter of one library: for `end_to_end`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

trl: Any = importlib.import_module("trl")
"""Its names are there on demand, which type checkers don't see."""
LEARNING_RATE = 1e-4
MAX_LENGTH = 1024


def rows_of(spec: dict[str, Any]) -> Dataset:
    """The data in TRL's columns: what is learned of a conversation is its last answer, as `slimtune train` has it."""
    rows = [json.loads(line) for line in Path(spec["data"]).read_text(encoding="utf-8").splitlines()]
    if "messages" in rows[0]:
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    return Dataset.from_list(rows)


def trainer_of(spec: dict[str, Any], model: Any, tokenizer: Any, rows: Dataset) -> Any:
    """TRL's trainer for the data, with the library's adapter on the model."""
    options: dict[str, Any] = {
        "output_dir": spec["output"], "max_steps": spec["steps"], "per_device_train_batch_size": spec["batch"],
        "learning_rate": LEARNING_RATE, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available(), "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    # Nothing of slimtune is imported where it isn't measured.
    lora: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    common: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer}
    if spec["library"] == "peft":
        import peft

        common["peft_config"] = peft.LoraConfig(**lora)
    else:
        import slimtune

        model = slimtune.get_peft_model(model, slimtune.LoraConfig(**lora))
    if spec["kind"] == "dpo":
        if spec["library"] == "slimtune":
            from slimtune.train.preferences import ReferenceModel

            common["ref_model"] = ReferenceModel(model)
        return trl.DPOTrainer(model, args=trl.DPOConfig(**options, max_length=MAX_LENGTH), **common)
    if spec["kind"] == "grpo":
        answers = {"num_generations": spec["answers"], "max_completion_length": spec["answer_tokens"]}
        return trl.GRPOTrainer(model, exact, trl.GRPOConfig(**options, **answers), **common)
    return trl.SFTTrainer(model, trl.SFTConfig(**options, max_length=MAX_LENGTH), **common)


def exact(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 for an answer that is the one in the data, and a little for one that is shorter."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(text.strip() == right) - len(text) / 1000 for text, right in zip(texts, answer, strict=True)]


def main() -> None:
    """Train as the specification in the first argument says, and write the adapter and what it took."""
    spec = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=getattr(torch, spec["dtype"]))
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])
    trainer = trainer_of(spec, model, tokenizer, rows_of(spec))
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model(spec["output"])
    (Path(spec["output"]) / "results.json").write_text(json.dumps({"seconds": seconds, "steps": spec["steps"]}))


if __name__ == "__main__":
    main()
