"""What zeros and grids cost SmolLM2, and what recovery under them brings back.

`quality` prunes by magnitude, Wanda and SparseGPT, to half and to 2:4, and by layers and neurons of equal size, and
tunes each by the dense model's distribution, under its mask where it has one; `cnn` leaves 80% of a small network for
digits out; `qat` tunes LoRA on editorials, off the packaged grid, and rounds what was merged to 4 bits, beside LoRA
tuned on that grid; `step` times a training step with a mask or a grid against plain LoRA's, in turns. Perplexity is on
texts that nothing is calibrated on or tuned by. One seed is an anecdote: `--seeds` draws the order of the batches and
the adapter. What `quality` and `qat` have measured is kept: a run that was broken off, or one with more seeds, goes on
from there.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from torch import Tensor, nn

import slimtune
from benchmarks import machine, page
from benchmarks.codecs import editorials
from benchmarks.off_grid import off_grid_
from benchmarks.prepare import model_folder
from benchmarks.results import FOLDER, subtitle
from slimtune.adapters.constrain import keep_zeros
from slimtune.core.constraint import ConstraintConfig
from slimtune.slim.data import WINDOW, calibration_batches, measured_ids
from slimtune.slim.prune import PruneConfig, prune
from slimtune.slim.quantize import QuantizeConfig, quantize_
from slimtune.slim.weights import WeightPruning, zero_weights

PRUNED = {
    f"{pattern or '50%'} {method}": WeightPruning(None if pattern else 0.5, pattern or "unstructured", method)
    for pattern in ("", "2:4")
    for method in ("magnitude", "wanda", "sparsegpt")
}
STRUCTURED = {
    # As many weights: 5 layers of 3.54 million, or 352 of the 1,536 neurons of all 30.
    "25 of 30 layers": PruneConfig(layers=25),
    "77% of the neurons": PruneConfig(ffn=0.77),
}
RANK, RATE = 16, 1e-3
LEARNED_FROM = 20_000
"""The token of the editorials from which `qat` learns; it measures the first ones."""
QAT = {
    "untuned": "as it is",
    "untuned, rtn": "rounded to the nearest",
    "tuned": "LoRA, in 16 bits",
    "tuned, rtn": "LoRA, then rounded to the nearest",
    "tuned, gptq": "LoRA, then GPTQ on what it learned from",
    "on the grid": "LoRA on the grid",
    "grid and scales": "LoRA on the grid, its scales learned",
}
"""The rows of `qat`."""

app = typer.Typer(add_completion=False)
console = Console()


def dense() -> tuple[Any, Any]:
    """SmolLM2 in float32 and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(model_folder())


def part_of_smollm2(layers: int) -> Any:
    """SmolLM2, or random weights of its shapes: so many layers, and of its head the same part."""
    if layers == 30:
        return dense()[0]
    config = transformers.AutoConfig.from_pretrained(model_folder())
    config.vocab_size, config.num_hidden_layers = config.vocab_size * layers // 30, layers
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.inference_mode()
def perplexity(model: Any, ids_RT: Tensor) -> float:
    losses = []
    for row in ids_RT.split(1):
        logits = model(input_ids=row).logits[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).mean())


def tuned(
    model: Any, batches: Sequence[Any], steps: int, seed: int, constraint: ConstraintConfig | None = None,
    targets: Sequence[Tensor] | None = None,
) -> Any:  # fmt: skip
    """The model after so many steps of LoRA on a window each, and merged.

    Args:
        targets: a teacher's log-probabilities of each window; without them the texts themselves are learned.
    """
    torch.manual_seed(seed)
    config = slimtune.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", constraint=constraint)
    model = slimtune.get_peft_model(model, config).train()
    model.return_logits = True
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    windows = torch.cat([batch["input_ids"] for batch in batches]).split(1)
    order = torch.cat([torch.randperm(len(windows)) for _ in range(1 + steps // len(windows))])[:steps]
    for number in order.tolist():
        ids = windows[number]
        if targets is None:
            loss = model(input_ids=ids, labels=ids).loss
        else:
            log_q = model(input_ids=ids).logits.log_softmax(-1)
            loss = F.kl_div(log_q, targets[number], reduction="none", log_target=True).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().merge_and_unload()


@torch.no_grad()
def distributions(model: Any, batches: Sequence[Any]) -> list[Tensor]:
    """The log-probabilities of each window, which all recoveries learn from."""
    windows = torch.cat([batch["input_ids"] for batch in batches]).split(1)
    return [model(input_ids=ids).logits.log_softmax(-1) for ids in windows]


def over(values: Sequence[float], digits: int = 2) -> str:
    """Mean and 95% interval over seeds; of one seed the value alone."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else ""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.{digits}f} ± {half:.{digits}f}"


def over_seeds(most: int) -> str:
    """How the cells of a table came about."""
    return "one seed" if most == 1 else f"mean and 95% interval over {most} seeds, or one seed alone"


def write(name: str, header: tuple[str, ...], rows: list[tuple[str, ...]], facts: dict[str, Any], note: str) -> None:
    """The figures as JSON, and as a table of docs/slim.md."""
    on = machine.describe({"device": "cpu", "cpu_capability": torch.backends.cpu.get_cpu_capability()})
    document = {"machine": on, "date": machine.today(), "commit": machine.commit(), **facts, "rows": rows}
    (FOLDER / f"pruning-{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    page.fill(page.PRUNED, name, f"{page.table(header, rows)}\n\n{note} {subtitle(on)} {document['date']}.")


def known(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What was measured before with the same settings, by row."""
    path = FOLDER / f"pruning-{name}.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    return document["values"] if all(document.get(key) == value for key, value in facts.items()) else {}


Tokens = Annotated[int, typer.Option(min=1024, help="Tokens to calibrate on and to learn from.")]
Measured = Annotated[int, typer.Option(min=512, help="Tokens that perplexity is measured on.")]
Steps = Annotated[int, typer.Option(min=0, help="Steps of recovery, of 256 tokens; 0 for none.")]
Seeds = Annotated[int, typer.Option(min=1, help="How often each recovery is run.")]


@app.command()
def quality(
    tokens: Tokens = 2048, measured: Measured = 1024, steps: Steps = 8, seeds: Seeds = 3,
    only: Annotated[str, typer.Option(help="The rows whose name has this in it.")] = "",
) -> None:  # fmt: skip
    """Perplexity of each way of pruning, without and with recovery."""
    model, tokenizer = dense()
    batches, ids = calibration_batches(tokenizer, tokens=tokens), measured_ids(tokenizer, measured)
    targets = distributions(model, batches)
    facts = {"tokens": tokens, "measured": ids.numel(), "steps": steps}
    values = known("quality", facts) or {"dense": {"untouched": perplexity(model, ids)}}
    for name, config in (PRUNED | STRUCTURED).items():
        own = values.setdefault(name, {"recovered": []}) if only in name else {}
        if only not in name or len(own["recovered"]) >= seeds:
            continue
        # Of this process alone, which others don't slow down by as much.
        began = time.process_time()
        if isinstance(config, WeightPruning):
            smaller, done = zero_weights(model, batches if config.needs_data else [], config)
            own["left"], constraint = 1 - done["sparsity"], ConstraintConfig(mask=True)
        else:
            smaller, report = prune(model, config, batches)
            own["left"], constraint = report.parameters / report.parameters_before, None
        own["seconds"] = time.process_time() - began
        own["untouched"] = perplexity(smaller, ids)
        for seed in range(len(own["recovered"]), seeds):
            after = tuned(copy.deepcopy(smaller), batches, steps, seed, constraint, targets)
            own["recovered"].append(perplexity(after, ids))
            console.print(f"{name}: {own}", highlight=False)
            write_quality(values, facts)


def write_quality(values: dict[str, Any], facts: dict[str, Any]) -> None:
    """The table of what was measured so far."""
    rows = [("dense", "", f"{values['dense']['untouched']:.2f}", "", "")]
    for name in PRUNED | STRUCTURED:
        if (own := values.get(name)) is not None:
            of = "linear weights" if name in PRUNED else "parameters"
            left = f"{own['left']:.1%} of the {of}"
            rows.append((name, left, f"{own['untouched']:.2f}", over(own["recovered"]), f"{own['seconds']:.0f}"))
    header = ("model", "left", "perplexity", f"after {facts['steps']} steps of recovery", "processor seconds")
    seeds = max(len(own["recovered"]) for own in values.values() if "recovered" in own)
    note = (
        f"{facts['measured']:,} tokens of shipped prose; calibrated on {facts['tokens']:,} tokens of other shipped "
        f"texts and recovered on them, {WINDOW} a step, by LoRA (r={RANK}) towards the dense model's distribution, "
        f"under the mask where there is one; {over_seeds(seeds)}; seconds are of the pruning;"
    )
    write("quality", header, rows, {**facts, "values": values}, note)


@app.command()
def qat(tokens: Tokens = 2048, measured: Measured = 1024, steps: Steps = 8, seeds: Seeds = 3) -> None:
    """Perplexity of LoRA tuned on editorials, rounded to 4 bits after it, and tuned on that grid."""
    ids = torch.tensor(dense()[1](editorials())["input_ids"])
    text, learned = (ids[start:][: count // WINDOW * WINDOW].view(-1, WINDOW)
                     for start, count in ((0, measured), (LEARNED_FROM, tokens)))  # fmt: skip
    batches = [{"input_ids": rows} for rows in learned.split(4)]
    facts = {"tokens": tokens, "measured": text.numel(), "steps": steps}
    values: dict[str, list[float]] = known("qat", facts)

    def base() -> Any:
        return off_grid_(dense()[0])

    def packed(model: Any, method: str) -> Any:
        return quantize_(copy.deepcopy(model), QuantizeConfig(method=method), batches)

    if not values:
        values["untuned"] = [perplexity(base(), text)]
        values["untuned, rtn"] = [perplexity(packed(base(), "rtn"), text)]
    for seed in range(len(values.get("grid and scales", ())), seeds):
        model = tuned(base(), batches, steps, seed)
        new = {"tuned": perplexity(model, text)}
        new |= {f"tuned, {method}": perplexity(packed(model, method), text) for method in ("rtn", "gptq")}
        for name, learns in (("on the grid", False), ("grid and scales", True)):
            constraint = ConstraintConfig(num_bits=4, learn_scales=learns)
            new[name] = perplexity(tuned(base(), batches, steps, seed, constraint), text)
        console.print(f"seed {seed}: {new}", highlight=False)
        for name, value in new.items():
            values.setdefault(name, []).append(value)
        write_qat(values, facts)


def write_qat(values: dict[str, list[float]], facts: dict[str, Any]) -> None:
    """The table of what was measured so far; a loss is taken seed by seed."""
    rows = []
    for name, title in QAT.items():
        of = "untuned" if name.startswith("untuned") else "tuned"
        lost = [math.log(mine / plain) for mine, plain in zip(values[name], values[of], strict=True)]
        rows.append((title, over(values[name]), "" if name == of else over(lost, 3)))
    note = (
        f"{facts['measured']:,} tokens of editorials, learned from {facts['tokens']:,} tokens of others, {WINDOW} a "
        f"step, {facts['steps']} steps, LoRA with r={RANK}, SmolLM2 off its grid, groups of 64; "
        f"{over_seeds(len(values['tuned']))};"
    )
    header = ("model", "perplexity", "log-perplexity lost by the 4 bits")
    write("qat", header, rows, {**facts, "values": values}, note)


class DigitNetwork(nn.Module):
    """Three convolutions and a linear layer for pictures of 8 x 8: (B, 1, 8, 8) to (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 64)
        self.blocks = nn.Sequential(*(self._block(*pair) for pair in itertools.pairwise(widths)))
        self.head = nn.Linear(widths[-1], 10)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(pixels), 1).flatten(1))


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures and labels to learn from, and 500 others of each."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    pictures_NCHW = torch.tensor(pictures, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    labels_N = torch.tensor(labels)[order]
    return pictures_NCHW[500:], labels_N[500:], pictures_NCHW[:500], labels_N[:500]


def fit(network: nn.Module, data: tuple[Tensor, ...], epochs: int, rate: float) -> None:
    """Train a network whole; zeros that `keep_zeros` holds stay."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0])).split(64):
            F.cross_entropy(network(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: tuple[Tensor, ...]) -> float:
    return 100 * float((network(data[2]).argmax(-1) == data[3]).float().mean())


@app.command()
def cnn(
    seeds: Annotated[int, typer.Option(min=1, help="Of the split, the start and the order.")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="Of training; half as many of recovery.")] = 20,
) -> None:
    """Accuracy of a convolutional network on handwritten digits, of which 80% is left out."""
    pruned = {
        "80% of the weights, by magnitude": PruneConfig(
            weights=WeightPruning(sparsity=0.8, method="magnitude", scope="global")
        ),
        # Its square is the share of the weights between two layers that lose as many.
        "56% of the channels": PruneConfig(channels=0.44),
    }
    scores: dict[str, list[tuple[float, float, float]]] = {name: [] for name in pruned}
    dense_scores = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        data = digits(seed)
        network = DigitNetwork()
        fit(network, data, epochs, 2e-3)
        dense_scores.append(accuracy(network, data))
        for name, config in pruned.items():
            smaller, _ = prune(network, config, [{"pixels": data[0][:8]}])
            before = accuracy(smaller, data)
            keep_zeros(smaller)
            fit(smaller, data, max(1, epochs // 2), 1e-3)
            left = sum(int((p != 0).sum()) for p in smaller.parameters()) / sum(p.numel() for p in network.parameters())
            scores[name].append((before, accuracy(smaller, data), 100 * left))
    rows = [("dense", "100", over(dense_scores), "", "")]
    for name, own in scores.items():
        before, after, left = zip(*own, strict=True)
        lost = [dense - recovered for dense, recovered in zip(dense_scores, after, strict=True)]
        rows.append((name, f"{mean(left):.0f}", over(before), over(after), over(lost)))
        console.print("  ".join(rows[-1]), highlight=False)
    header = ("network", "% of its numbers left", "% right", "after recovery", "points lost")
    parameters = sum(p.numel() for p in DigitNetwork().parameters())
    note = (
        f"Three convolutions and a linear layer, {parameters:,} numbers, on 500 digits of scikit-learn's 1,797 that it "
        f"hasn't seen; {seeds} seeds of split, start and order, mean and 95% interval;"
    )
    write("cnn", header, rows, {"seeds": seeds, "epochs": epochs, "scores": scores, "dense": dense_scores}, note)


@app.command()
def step(
    rounds: Annotated[int, typer.Option(min=1, help="How often all take turns.")] = 5,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[int, typer.Option(min=8)] = 256,
    dtype: Annotated[str, typer.Option(help="Of the base; bfloat16 needs a processor that multiplies it.")] = "float32",
    layers: Annotated[int, typer.Option(min=1, help="Of SmolLM2's 30, with as large a part of its vocabulary.")] = 30,
) -> None:
    """Seconds of a LoRA step with a mask or a grid against one without, in turns."""
    constraints = {
        "plain LoRA": None,
        "mask": ConstraintConfig(mask=True),
        "grid of 4 bits": ConstraintConfig(num_bits=4),
        "grid of 4 bits, scales learned": ConstraintConfig(num_bits=4, learn_scales=True),
    }
    ids = torch.randint(5, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Any] = {}
    for name, constraint in constraints.items():
        model = part_of_smollm2(layers).to(getattr(torch, dtype))
        if constraint is not None and constraint.mask:
            model = zero_weights(model, [], WeightPruning(pattern="2:4", method="magnitude"))[0]
        config = slimtune.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", constraint=constraint)
        model = slimtune.get_peft_model(model, config).train()
        runs[name] = model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, (model, optimizer) in runs.items():
            # Of this process alone, which others don't slow down by as much.
            began = time.process_time()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            # The first round warms up.
            seconds[name] += [time.process_time() - began] if number else []
    rows = []
    for name, own in seconds.items():
        ratios = [mine / plain for mine, plain in zip(own, seconds["plain LoRA"], strict=True)]
        rows.append((name, f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"))
        console.print("  ".join((*rows[-1], f"{median(own):.2f} s")), highlight=False)
    note = (
        f"Processor time, median and range of {rounds} rounds in turns: {layers} of the 30 layers of SmolLM2 with as "
        f"large a part of its vocabulary, r={RANK}, all linear layers, {batch} x {length} tokens, {dtype};"
    )
    write("step", ("a step with", "/ plain LoRA's"), rows, {"seconds": seconds}, note)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    app()
