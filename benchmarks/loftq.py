"""How much of what NF4 takes from SmolLM2 LoftQ gives back before any training: `python -m benchmarks.loftq`.

Printed as a table: the share of ||W - Q|| that is left (the mean over layers), the divergence from the model in
16 bits, and the perplexity, on the first 1,024 tokens of the decisions in docs/adr.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import slimtune
from slimtune.adapters.adapter import attached
from slimtune.methods.lora.loftq import Originals
from slimtune.storage.source import resolve

MODEL = "smollm2-135m-instruct"
RANKS = (0, 4, 8, 16, 32, 64)
"""Of all layers; 0 is NF4 alone."""


def answers(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits.float().log_softmax(-1)


def in_nf4() -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=torch.bfloat16, quantization_config=config)


def main() -> None:
    text = "\n\n".join(path.read_text() for path in sorted(Path("docs/adr").glob("0*.md")))
    ids = AutoTokenizer.from_pretrained(resolve(MODEL))(text, return_tensors="pt").input_ids[:, :1024].view(4, 256)
    reference = answers(AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=torch.bfloat16), ids)

    def scores(found: Tensor) -> str:
        divergence = F.kl_div(found, reference, log_target=True, reduction="none").sum(-1).mean()
        perplexity = F.nll_loss(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp()
        return f"{divergence:.3f} | {perplexity:.1f} |"

    began = time.perf_counter()
    model = slimtune.get_peft_model(in_nf4(), slimtune.LoraConfig(r=RANKS[-1], init_lora_weights="loftq"))
    seconds = time.perf_counter() - began
    originals = Originals.of(model)
    layers = [(delta, originals.lost(site)) for site, delta in attached(model, "default")]
    print("| rank | error left | KL from 16 bits | perplexity |\n|---|---|---|---|")
    print(f"| 16 bits | | {scores(reference)}")
    for rank in reversed(RANKS):
        left = []
        for delta, lost in layers:
            # The factors are sorted: the first ones are those of a lower rank.
            a, b = (factor.data for factor in delta.trained)
            a[rank:], b[:, rank:] = 0, 0
            left.append(float((lost - delta.scaling * delta.product()).norm() / lost.norm()))
        print(f"| {rank or 'NF4 alone'} | {sum(left) / len(left):.3f} | {scores(answers(model, ids))}")
    print(f"\nloading and {len(layers)} decompositions: {seconds:.0f} s")


if __name__ == "__main__":
    main()
