"""What quantization after training loses, and what it gains, on SmolLM2 off its grid (`benchmarks.off_grid`).

`quality` measures perplexity on newspaper editorials of the model in bf16, in NF4 with double quantization, and as
`slimtune quantize` makes it; `peer` adds what llm-compressor makes of it; `speed` times decoding and prefill of the
same models in turns and takes resident memory after the first answer against the size of the file, the memory in a
process of its own; `pipeline` tunes, prunes, distills and quantizes the packaged model on the demo's orders by one
recipe, once for each seed.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

from benchmarks import machine, page
from benchmarks.codecs import editorials, perplexity
from benchmarks.off_grid import off_grid_
from benchmarks.prepare import model_folder
from benchmarks.pruning import over
from benchmarks.results import FOLDER, subtitle
from benchmarks.runs import run_module
from slimtune.console.screen import open_screen
from slimtune.data.demo_orders import make_orders
from slimtune.recipe.validation import read_as
from slimtune.slim.data import calibration_batches
from slimtune.slim.pipeline import slim
from slimtune.slim.recipe import SlimRecipe

BF16, FLOAT32, NF4 = "bf16", "float32", "NF4 + double quantization"
PEER = "llm-compressor"
LIKE = "on such texts"
"""Marks what is calibrated on other editorials, as a user calibrates on data of his own, and not on shipped texts."""
VARIANTS: dict[str, dict[str, Any]] = {
    "int4 rtn": {"method": "rtn"},
    "int4 rtn, asymmetric": {"method": "rtn", "symmetric": False},
    "int4 rtn, a scale a row": {"method": "rtn", "strategy": "channel"},
    "int4 awq+gptq": {},
    f"int4 gptq, {LIKE}": {"method": "gptq"},
    f"int4 awq, {LIKE}": {"method": "awq"},
    f"int4 awq+gptq, {LIKE}": {},
    f"int4 awq+gptq, int8 head, {LIKE}": {"head": "int8"},
    "int8": {"scheme": "W8A16"},
    "int8, int8 head": {"scheme": "W8A16", "head": "int8"},
    "W8A8": {"scheme": "W8A8"},
}
SPEED = {
    "int4, int8 head": {"method": "rtn", "head": "int8"},
    "int8, int8 head": {"scheme": "W8A16", "head": "int8"},
    "W8A8": {"scheme": "W8A8"},
}
"""What is timed doesn't depend on how the codes were chosen."""
CALIBRATED_FROM = 20_000
"""The token of the editorials from which such texts are; perplexity is measured on the first ones."""
HEADER = ("model", "bits per weight", "MB", "perplexity", "loss / NF4's", "processor seconds")
SPEED_HEADER = ("model", "decode / bf16", "/ float32", "prefill / bf16", "/ float32", "resident / file")
PROMPT, STEPS, PREFILL, TRIES = 32, 24, 256, 3

app = typer.Typer(add_completion=False)
console = Console()


def write_base(folder: Path, packaged: bool) -> None:
    """SmolLM2 with its tokenizer, off its grid unless it is to be as packaged."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16)
    (model if packaged else off_grid_(model)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)


def quantized(base: Path, output: Path, settings: dict[str, Any], like: Path | None = None) -> float:
    """Write a quantized folder as the command does; gives back the seconds of the processor that it took.

    Args:
        like: texts to calibrate on; without them, the shipped ones.
    """
    import slimtune
    from slimtune.slim.quantize import QuantizeConfig, quantize_

    model, tokenizer = slimtune.load(base, dtype="bfloat16", device="cpu")
    config = QuantizeConfig(**settings)
    # Of this process alone, which others don't slow down by as much.
    start = time.process_time()
    quantize_(model, config, calibration_batches(tokenizer, like) if config.needs_data else ())
    seconds = time.process_time() - start
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return seconds


def bits_per_weight(model: Any) -> float:
    """Of the linear layers in the blocks, scales included."""
    from slimtune.bases import base_of

    linears = [m for m in model.model.layers.modules() if base_of(m).kind == "linear"]
    weights = sum(math.prod(base_of(m).features(m)) for m in linears)
    return 8 * sum(t.nbytes for m in linears for t in base_of(m).held(m)) / weights


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


@app.command()
def quality(
    tokens: Annotated[int, typer.Option(min=512, help="How much of the text is read.")] = 8192,
    packaged: Annotated[bool, typer.Option("--packaged", help="The model as it comes, on its grid; not kept.")] = False,
) -> None:
    """Measure what each way of quantizing loses, and fill in docs/quantizing.md."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        base, ids, like = inputs(Path(scratch), packaged)
        rows: list[dict[str, Any]] = []

        def add(name: str, where: Path, kind: str | None = None, seconds: float = 0.0) -> None:
            rows.append({"model": name, **measured(where, ids[:tokens], kind)})
            rows[-1]["seconds"] = rows[-1]["seconds"] or seconds
            console.print("  ".join(cells(rows)[-1]), highlight=False)

        add(BF16, base)
        add(NF4, base, "nf4")
        for name, settings in VARIANTS.items():
            output = Path(scratch, name.replace(" ", "-"))
            seconds = quantized(base, output, settings, like if name.endswith(LIKE) else None)
            add(name, output, None, seconds)
            shutil.rmtree(output)
    if not packaged:
        write_quality(tokens, rows)


@app.command()
def peer(
    python: Annotated[str, typer.Argument(help="The Python of an environment with llm-compressor.")],
) -> None:
    """Measure what llm-compressor's GPTQ loses on the same texts, and add it to what `quality` has measured."""
    known = json.loads((FOLDER / "slim-quality.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        base, ids, like = inputs(Path(scratch))
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        windows = torch.cat([batch["input_ids"] for batch in calibration_batches(tokenizer, like)])
        wanted = {"base": str(base), "output": str(Path(scratch, "peer")), "ids": windows.tolist()}
        done = run_module("benchmarks.slim_peer", json.dumps(wanted), python=python)
        row = measured(Path(scratch, "peer"), ids[: known["tokens"]]) | {"seconds": done["seconds"]}
    name = f"int4 gptq by {PEER} {done['version']}, {LIKE}"
    rows = [one for one in known["rows"] if PEER not in one["model"]]
    # Beside ours by the same method.
    place = 1 + [one["model"] for one in rows].index(f"int4 gptq, {LIKE}")
    write_quality(known["tokens"], [*rows[:place], {"model": name, **row}, *rows[place:]])


def inputs(folder: Path, packaged: bool = False) -> tuple[Path, torch.Tensor, Path]:
    """The base's folder, the tokens that are measured, and a file of texts like them to calibrate on."""
    base, like = folder / "base", folder / "like.txt"
    write_base(base, packaged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = tokenizer(editorials(), return_tensors="pt")["input_ids"][0]
    like.write_text(tokenizer.decode(ids[CALIBRATED_FROM:]))
    return base, ids, like


def measured(where: Path, ids: torch.Tensor, kind: str | None = None) -> dict[str, Any]:
    """Bits a weight, megabytes and perplexity of a folder; of one that is quantized while loading, the seconds too."""
    import slimtune

    start = time.process_time()
    model = slimtune.load(where, dtype="bfloat16", device="cpu", quantize=kind)[0]
    seconds = time.process_time() - start if kind else 0.0
    is_stored = transformers.AutoConfig.from_pretrained(where).to_dict().get("quantization_config")
    megabytes = size_of(where) if is_stored else slimtune.parts(model).bytes / 1e6
    bits = bits_per_weight(model)
    # The same weights in float32 products: those of bf16 take ten times as long on processors without them.
    model = slimtune.load(where, dtype="float32", device="cpu", quantize=kind)[0]
    return {"bits": bits, "MB": megabytes, "perplexity": perplexity(model.eval(), ids), "seconds": seconds}


def write_quality(tokens: int, rows: list[dict[str, Any]]) -> None:
    on = machine.describe({"device": "cpu", "cpu_capability": torch.backends.cpu.get_cpu_capability()})
    document = {"machine": on, "date": machine.today(), "commit": machine.commit(), "tokens": tokens, "rows": rows}
    (FOLDER / "slim-quality.json").write_text(json.dumps(document, indent=1) + "\n")
    note = f"{tokens:,} tokens, products in float32; {subtitle(on)} {document['date']}."
    page.fill(page.SLIM, "quality", f"{page.table(HEADER, cells(rows))}\n\n{note}")


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of the table; a loss is that of log-perplexity beyond bf16's, as a share of NF4's."""
    by_name = {row["model"]: math.log(row["perplexity"]) for row in rows}
    lost = by_name[NF4] - by_name[BF16] if NF4 in by_name else math.nan
    return [
        (
            row["model"], f"{row['bits']:.2f}", f"{row['MB']:.0f}", f"{row['perplexity']:.2f}",
            "" if row["model"] == BF16 else f"{(by_name[row['model']] - by_name[BF16]) / lost:.2f}",
            f"{row['seconds']:.0f}" if row["seconds"] else "",
        )
        for row in rows
    ]  # fmt: skip


@app.command()
def speed(rounds: Annotated[int, typer.Option(min=1, help="How often all models take turns.")] = 5) -> None:
    """Time decoding and prefill in turns, and fill in docs/quantizing.md."""
    import slimtune

    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch, "base")
        write_base(base, packaged=False)
        asked = {FLOAT32: (base, "float32", None), BF16: (base, "bfloat16", None), NF4: (base, "bfloat16", "nf4")}
        for name, settings in SPEED.items():
            output = Path(scratch, name.replace(" ", "-"))
            quantized(base, output, settings)
            asked[name] = (output, "bfloat16", None)
        resident = {
            name: run_module("benchmarks.slim", "worker", str(folder))["resident"] / size_of(folder)
            for name, (folder, _, _) in asked.items()
            if name in SPEED
        }
        models = {
            name: slimtune.load(folder, dtype=dtype, device="cpu", quantize=kind)[0].eval()
            for name, (folder, dtype, kind) in asked.items()
        }
        done = []
        for number in range(rounds + 1):
            one = {name: seconds_of(model) for name, model in models.items()}
            # The first round warms up: codes are put in the order of the kernel.
            done += [one] if number else []
            console.print(f"{one}", highlight=False)
    table = []
    for name in asked:
        ratios = [[one[by][what] / one[name][what] for one in done] for what in (0, 1) for by in (BF16, FLOAT32)]
        cells = (f"{median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios)
        table.append((name, *cells, f"{resident[name]:.2f}" if name in resident else ""))
    on = machine.describe({"device": "cpu", "cpu_capability": torch.backends.cpu.get_cpu_capability()})
    document = {
        "machine": on,
        "date": machine.today(),
        "commit": machine.commit(),
        "rounds": done,
        "resident": resident,
    }
    (FOLDER / "slim-speed.json").write_text(json.dumps(document, indent=1) + "\n")
    note = (
        f"How many times as fast as in bf16, or in float32, with {torch.get_num_threads()} threads, "
        f"the least of {TRIES} in turns; median and range of {rounds} rounds; "
        f"decoding of {STEPS} tokens one by one, prefill of {PREFILL}; "
        f"quantized models compute in bf16; {subtitle(on)} {document['date']}."
    )
    page.fill(page.SLIM, "speed", f"{page.table(SPEED_HEADER, table)}\n\n{note}")


@torch.inference_mode()
def seconds_of(model: Any, tries: int = TRIES) -> tuple[float, float]:
    """For a token that is decoded, and for a prefill: the least of a few, as what disturbs only adds."""
    ids = torch.randint(0, model.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    decoded, prefilled = [], []
    for _ in range(tries):
        began = time.perf_counter()
        model(input_ids=ids, logits_to_keep=1)
        prefilled.append(time.perf_counter() - began)
        cache = transformers.DynamicCache(config=model.config)
        step = model(input_ids=ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        began = time.perf_counter()
        for _ in range(STEPS):
            step = model(input_ids=step, past_key_values=cache).logits.argmax(-1)
        decoded.append((time.perf_counter() - began) / STEPS)
    return min(decoded), min(prefilled)


@app.command(hidden=True)
def worker(folder: str) -> None:
    """The megabytes that a model's process has more after the first answer, in a process of its own; prints JSON."""
    import slimtune

    # The vocabulary and the code of the model's class are no part of the weights.
    kept = transformers.AutoTokenizer.from_pretrained(folder), transformers.LlamaForCausalLM
    before = resident_megabytes()
    model = slimtune.load(folder, dtype="bfloat16", device="cpu")[0].eval()
    seconds_of(model, tries=1)
    del kept
    print(json.dumps({"resident": resident_megabytes() - before}))


@app.command()
def pipeline(
    seeds: Annotated[int, typer.Option(min=1, help="Of the orders, the adapters and the order of the rows.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of tuning, of 16 orders.")] = 40,
    recovery: Annotated[int, typer.Option(min=1, help="Steps of distilling, of 16 orders.")] = 20,
    layers: Annotated[int, typer.Option(min=1, help="Layers that are left.")] = 27,
    questions: Annotated[int, typer.Option(min=8, help="Held-out orders that are asked.")] = 64,
) -> None:
    """Run `slimtune slim` on the demo's orders, and fill in docs/slim.md; seeds that are there already are kept."""
    path = FOLDER / "slim-pipeline.json"
    facts = {"steps": steps, "recovery": recovery, "layers": layers, "questions": questions}
    document = json.loads(path.read_text()) if path.exists() else {}
    runs: list[Any] = document["runs"] if all(document.get(key) == value for key, value in facts.items()) else []
    for seed in range(len(runs), seeds):
        with tempfile.TemporaryDirectory() as scratch:
            base = Path(scratch, "base")
            write_base(base, packaged=True)
            orders = make_orders(max(640, questions * 10), 1, seed)[0]
            rows = Path(scratch, "orders.jsonl")
            rows.write_text("".join(json.dumps({"messages": order.messages()}) + "\n" for order in orders))
            training = {"batch_size": 16, "learning_rate": 1e-3, "seed": seed}
            lora = {"name": "lora", "target_modules": "all-linear"}
            recipe = {
                "model": str(base),
                "data": {"train": str(rows), "held_out": 0.1, "max_length": 256},
                "evaluation": {"limit": questions, "max_new_tokens": 40},
                "output": str(Path(scratch, "output")),
                "steps": [
                    {"tune": {"method": lora, "training": training | {"max_steps": steps, "warmup": 0.1}}},
                    {"prune": {"layers": layers}},
                    {"distill": {"method": lora, "training": training | {"max_steps": recovery}}},
                    {"quantize": {"scheme": "W4A16", "head": "int8"}},
                ],
            }
            before = processor_seconds()
            report = slim(read_as(SlimRecipe, recipe), open_screen(True))
            runs.append({"rows": report.to_dict()["rows"], "seconds": processor_seconds() - before})
        on = machine.describe({"device": "cpu", "cpu_capability": torch.backends.cpu.get_cpu_capability()})
        document = {"machine": on, "date": machine.today(), "commit": machine.commit(), **facts, "runs": runs}
        path.write_text(json.dumps(document, indent=1) + "\n")
        write_pipeline(document)


def write_pipeline(document: dict[str, Any]) -> None:
    """The table of the seeds so far: a score and its interval are over seeds, the rest is their median."""
    runs, table = document["runs"], []
    for number, row in enumerate(runs[0]["rows"]):
        own = [run["rows"][number] for run in runs]
        first = [run["rows"][0] for run in runs]
        share = median(one["bytes"] / other["bytes"] for one, other in zip(own, first, strict=True))
        cells = (f"{median(one[name] for one in own):.2f}" for name in ("decode_ratio", "prefill_ratio", "perplexity"))
        scores = [one["score"] for one in own]
        table.append((row["name"], f"{share:.3f}", *cells, over(scores), ", ".join(f"{one:.2f}" for one in scores)))
        console.print("  ".join(table[-1]), highlight=False)
    header = ("after", "bytes / first", "decode / first", "prefill / first", "perplexity", "JSON right", "by seed")
    note = (
        f"{document['steps']} steps of tuning and {document['recovery']} of distilling, of 16 orders each; "
        f"{document['questions']} held-out orders; mean and 95% interval over {len(runs)} seeds; "
        f"{median(run['seconds'] for run in runs):.0f} seconds of the processor a seed, with all measuring; "
        f"{subtitle(document['machine'])} {document['date']}."
    )
    page.fill(page.PRUNED, "pipeline", f"{page.table(header, table)}\n\n{note}")


def processor_seconds() -> float:
    """Of this process and of those that it started and that ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def resident_megabytes() -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    sys.exit(app(prog_name="python -m benchmarks.slim"))
