"""What merging adapters of SmolLM2 loses, by the base that they were trained on and the one that they are merged into.

`python -m benchmarks.merging` trains a LoRA on spoken orders over bf16, NF4 with double quantization and int8, and puts
each into several bases. A row compares a model's answers on held-out orders with those of base and adapter as they
were trained: loss, exactly right answers, divergence and relative difference of the logits that answer.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import slimtune
from benchmarks.prepare import model_folder
from slimtune.adapters.merge import compare_outputs
from slimtune.bases import claim
from slimtune.data.demo_orders import Example, make_orders
from slimtune.data.encode import IGNORED, Encoded, encode_row
from slimtune.data.rows import Conversation
from slimtune.evaluate.exact_match import exact_match
from slimtune.recipe.training import TrainSettings
from slimtune.train.loop import fine_tune

BASES: dict[str, Any] = {
    "bf16": None,
    "NF4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
BATCH = 8


class Answers:
    """The logits of a model where the held-out orders are answered, and how many answers it gets right."""

    def __init__(self, model: Any, tokenizer: Any, examples: Sequence[Example], encoded: Sequence[Encoded]) -> None:
        found = [_learned(model.eval(), example) for example in encoded]
        self.logits = torch.cat([logits for logits, _ in found])
        self.loss = float(F.cross_entropy(self.logits, torch.cat([labels for _, labels in found])))
        self.score = exact_match(model, tokenizer, examples, [example.question() for example in examples])

    def row(self, title: str, reference: Answers) -> str:
        drift = compare_outputs(reference.logits, self.logits)
        alike = sum(a == b for a, b in zip(self.score.answers, reference.score.answers, strict=True))
        return (
            f"| {title} | {self.loss:.4f} | {self.score.share:.0%} | {alike} of {len(self.score.answers)} | "
            f"{drift.kl:.1e} | {drift.relative:.1e} | {drift.top1_agreement:.1%} |"
        )


@torch.no_grad()
def _learned(model: Any, example: Encoded) -> tuple[Tensor, Tensor]:
    labels = torch.tensor(example.labels[1:])
    logits = model(torch.tensor([example.input_ids])).logits[0, :-1].float()
    return logits[labels != IGNORED], labels[labels != IGNORED]


def load(base: str, folder: str = "") -> Any:
    config = {"quantization_config": BASES[base]} if BASES[base] else {}
    model = AutoModelForCausalLM.from_pretrained(folder or model_folder(), dtype=torch.bfloat16, **config)
    claim(model)
    return model


def results(trained_on: str, adapter: Path) -> Iterator[tuple[str, Any]]:
    """An adapter in each place that it may be merged into."""

    def tuned(base: str) -> Any:
        return slimtune.PeftModel.from_pretrained(load(base), adapter)

    yield f"trained on {trained_on}, apart", tuned(trained_on)
    yield f"{trained_on} without it", load(trained_on)
    if trained_on != "bf16":
        yield f"merged into what {trained_on} expands to, in bf16", tuned(trained_on).merge_and_unload()
        model = tuned(trained_on).merge_and_unload(requantize=True)
        drift = model.merge_drift
        yield (
            f"the same in {trained_on} again ({drift.survived:.0%} of the update left, noise {drift.noise:.1f})",
            model,
        )
    merged = tuned("bf16").merge_and_unload()
    yield "merged into the original bf16", merged
    kind = "int8" if trained_on == "int8" else "NF4"
    if trained_on == "bf16":
        yield f"apart, on {kind}", tuned(kind)
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        yield f"merged into the original bf16, then quantized to {kind}", load(kind, folder)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of training, 8 orders each.")] = 24,
    held_out: Annotated[int, typer.Option(min=1, help="Orders to answer.")] = 30,
    trained_on: Annotated[str, typer.Option(help=f"One of {', '.join(BASES)}; without it, all.")] = "",
    rate: Annotated[float, typer.Option(help="The learning rate; a small one makes a small update.")] = 1e-3,
) -> None:
    """Train, merge, compare."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="merged into quantized weights")
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    train, asked = make_orders(640, held_out)
    learned, questions = (
        [encode_row(Conversation.model_validate({"messages": e.messages()}), tokenizer) for e in examples]
        for examples in (train, asked)
    )
    settings = TrainSettings(learning_rate=rate, max_steps=steps, batch_size=BATCH, warmup=0.1)
    for base in [trained_on] if trained_on else BASES:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            config = slimtune.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            model = slimtune.get_peft_model(load(base), config)
            fine_tune(model, tokenizer, learned, settings, Path(folder), Console(stderr=True))
            model.save_pretrained(folder)
            reference: Answers | None = None
            for title, found in results(base, Path(folder)):
                answers = Answers(found, tokenizer, asked, questions)
                if reference is None:
                    print(
                        f"\n| LoRA, {steps} steps at {rate:g} | loss | right | same answers | KL | relative | top 1 |"
                    )
                    print("|---|---|---|---|---|---|---|")
                    reference = answers
                print(answers.row(title, reference), flush=True)


if __name__ == "__main__":
    typer.run(main)
