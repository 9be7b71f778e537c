"""What 4 and 8 bits lose: error and stored size of each codec, and the perplexity of SmolLM2 with its weights coded.

The text is the New York Times editorials that come with vaderSentiment (see `benchmarks.reviews`): sentences of
edited English in their order. The weights are coded by bitsandbytes and expanded by slimtune; int4 is the formula
below, with as many bits for its scales as NF4 has for its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks import machine, page
from benchmarks.prepare import model_folder
from benchmarks.results import FOLDER, subtitle
from benchmarks.reviews import cached_archive, table_of

EDITORIALS = "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"
BLOCKS = (32, 64, 128, 256)
USUAL = 64
WINDOW = 512
HEADER = ("codec", "block", "bits per weight", "error, normal weights", "error, SmolLM2", "perplexity")

app = typer.Typer(add_completion=False)
console = Console()


@dataclass(frozen=True)
class Coded:
    """A weight after it was coded and expanded, and the bytes that its code takes on disk."""

    weight: Tensor
    stored_bytes: int


@dataclass(frozen=True)
class Codec:
    """A way to store weights."""

    name: str
    block: int | None
    code: Callable[[Tensor], Coded]

    @property
    def is_usual(self) -> bool:
        return self.block in (None, USUAL)


def four_bits(weight_OI: Tensor, kind: str, block: int, double: bool) -> Coded:
    """NF4 or FP4: 16 values, scaled by the largest magnitude of each block."""
    from bitsandbytes.functional import quantize_4bit

    from slimtune.bases.bitsandbytes import expand_4bit

    codes, state = quantize_4bit(weight_OI, blocksize=block, compress_statistics=double, quant_type=kind)
    parts = state.as_dict(packed=True).values()
    return Coded(expand_4bit(codes, state), sum(tensor.nbytes for tensor in (codes, *parts)))


def eight_bits(weight_OI: Tensor) -> Coded:
    """int8 with a scale a row."""
    from bitsandbytes.functional import int8_vectorwise_quant

    from slimtune.bases.bitsandbytes import expand_8bit

    codes, scales, _ = int8_vectorwise_quant(weight_OI)
    return Coded(expand_8bit(codes, scales, weight_OI.dtype), codes.nbytes + scales.nbytes)


def int4(weight_OI: Tensor, block: int) -> Coded:
    """Whole numbers from -7 to 7 times a scale a block: scale = largest magnitude / 7."""
    count = weight_OI.numel()
    blocks = nn.functional.pad(weight_OI.reshape(-1), (0, -count % block)).view(-1, block)
    scales = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 7
    expanded = ((blocks / scales).round().clamp(-7, 7) * scales).view(-1)[:count].view_as(weight_OI)
    return Coded(expanded, math.ceil(count / 2) + scales.nbytes)


def codecs() -> Iterator[Codec]:
    yield Codec("int8", None, eight_bits)
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            for block in BLOCKS:
                name = kind.upper() + " + double quantization" * double
                yield Codec(name, block, lambda w, k=kind, b=block, d=double: four_bits(w, k, b, d))
    for block in BLOCKS:
        yield Codec("int4", block, lambda w, b=block: int4(w, b))


def error(codec: Codec, weights: list[Tensor]) -> tuple[float, float]:
    """The root mean square of the error relative to that of the weights, and the bits that are stored per weight."""
    lost = kept = count = stored = 0.0
    for weight in weights:
        coded = codec.code(weight.float())
        lost += float((coded.weight - weight.float()).square().sum())
        kept += float(weight.float().square().sum())
        count, stored = count + weight.numel(), stored + coded.stored_bytes
    return math.sqrt(lost / kept), 8 * stored / count


def normal_weights(seed: int, shape: tuple[int, int] = (1024, 1024)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def editorials() -> str:
    """The editorials one after the other, each of its sentences in their order."""
    rows = table_of(cached_archive(), EDITORIALS)
    articles = groupby(rows, key=lambda row: row[0].split("_")[0])
    return "\n\n".join(" ".join(text for _, _, text in article) for _, article in articles)


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """What is quantized: the linear layers of the blocks."""
    return {name: one for name, one in model.model.named_modules() if isinstance(one, nn.Linear)}


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor) -> float:
    """exp of the mean loss over windows of the text; the first token of each is given."""
    windows = ids[: ids.numel() // WINDOW * WINDOW].view(-1, WINDOW)
    losses = []
    for window in windows.split(4):
        logits = model(input_ids=window).logits[:, :-1].float()
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).mean())


def coded_perplexity(model: Any, codec: Codec, ids: Tensor) -> float:
    """The perplexity with the linear layers coded; the weights are as before afterwards."""
    layers = linear_layers(model)
    originals = {name: layer.weight.data for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.data = codec.code(layer.weight.data.float()).weight.to(layer.weight.dtype)
    found = perplexity(model, ids)
    for name, layer in layers.items():
        layer.weight.data = originals[name]
    return found


def measure(model: Any, ids: Tensor, seeds: int) -> Iterator[dict[str, Any]]:
    """One row a codec; the first is the base as it is."""
    yield {"codec": "bf16", "block": None, "bits": 16.0, "perplexity": perplexity(model, ids)}
    weights = [layer.weight.data for layer in linear_layers(model).values()]
    for codec in codecs():
        real, bits = error(codec, weights)
        normal, _ = error(codec, [normal_weights(seed) for seed in range(seeds)])
        row = {"codec": codec.name, "block": codec.block, "bits": bits, "normal_error": normal, "real_error": real}
        yield row | ({"perplexity": coded_perplexity(model, codec, ids)} if codec.is_usual else {})


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    errors = (f"{row[name]:.4f}" if name in row else "" for name in ("normal_error", "real_error"))
    block = str(row["block"] or ("a row" if row["codec"] == "int8" else ""))
    measured = f"{row['perplexity']:.1f}" if "perplexity" in row else ""
    return (row["codec"], block, f"{row['bits']:.2f}", *errors, measured)


@app.command()
def main(
    tokens: Annotated[int, typer.Option(min=WINDOW, help="How much of the text is read.")] = 32 * WINDOW,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of normally distributed weights.")] = 3,
    model: Annotated[str, typer.Option(help="A folder with SmolLM2, if not the packaged one.")] = "",
) -> None:
    """Measure every codec on normally distributed weights and on SmolLM2, and write the table of docs/figures."""
    transformers.utils.logging.disable_progress_bar()
    folder = model or model_folder()
    smollm2 = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(editorials(), return_tensors="pt")["input_ids"][0]
    rows = []
    for row in measure(smollm2, ids[:tokens], seeds):
        rows.append(row)
        console.print("  ".join(cells(row)), highlight=False)
    on = machine.describe({"device": "cpu", "cpu_capability": torch.backends.cpu.get_cpu_capability()})
    about = {"machine": on, "bitsandbytes": machine.installed("bitsandbytes"), "date": machine.today()}
    document = {**about, "commit": machine.commit(), "tokens": tokens, "seeds": seeds, "rows": rows}
    (FOLDER / "codecs.json").write_text(json.dumps(document, indent=1) + "\n")
    note = f"{tokens:,} tokens; bitsandbytes {about['bitsandbytes']}; {subtitle(on)} {about['date']}."
    page.fill(page.QUANTIZED, "codecs", f"{page.table(HEADER, [cells(row) for row in rows])}\n\n{note}")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.codecs")
