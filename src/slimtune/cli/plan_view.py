"""A plan on the screen: a bar of memory for each method, the recommendation with its reasons, the command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.text import Text

from slimtune.data.lengths import PERCENTILES
from slimtune.errors import counted, listing, needs
from slimtune.models.device import cost_of_emulation, is_emulated
from slimtune.pipeline.launch import with_processes
from slimtune.pipeline.show_data import show_too_long
from slimtune.plan.devices import CPU
from slimtune.plan.memory import MemoryBreakdown
from slimtune.plan.plan import PlanReport
from slimtune.plan.recommend import Choice
from slimtune.plan.rules import GOALS
from slimtune.plan.table import COLOURS, ROWS, SIZES, TableCell
from slimtune.quantization.config import library_of

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.plan.serving import ServingPlan
    from slimtune.plan.time import Rates

BAR_WIDTH = 22
LETTERS = {
    "weights": "w",
    "adapter": "a",
    "gradients": "g",
    "optimizer": "o",
    "activations": "h",
    "loss": "l",
    "workspace": "t",
    "runtime": "r",
}
"""Of each part, where there are no colours."""


def show(screen: Console, report: PlanReport, launch: str | None = None) -> None:
    """All of a report."""
    _show_question(screen, report)
    _show_choices(screen, report)
    best = report.best
    if best is None:
        _show_refusal(screen, report)
        return
    screen.print(f"\n[bold]{_described(best, report)}[/]")
    for rule in best.reasons:
        screen.print(f"  - {rule.text}", markup=False)
        screen.print(f"    {rule.evidence}", style="dim", markup=False)
        if rule.against:
            screen.print(f"    but: {rule.against}", style="dim", markup=False)
    for note in _notes(best, report):
        screen.print(f"  note: {note}", markup=False)
    for verdict in best.engines:
        screen.print(f"  {verdict.engine} {'takes' if verdict.takes else 'refuses'} it: {verdict.note}", markup=False)
    if not best.engines:
        screen.print("  any engine takes it: the result is a whole model", markup=False)
    screen.print("\nrun it:")
    how = launch or ("fsdp2" if report.request.devices > 1 else "")
    # The command starts as many processes as were planned, whatever a file says.
    started = f" --launch {shlex.quote(with_processes(how, report.request.devices))}" if how else ""
    screen.print(f"  {report.command(best)}{started}", markup=False)


def _notes(choice: Choice, report: PlanReport) -> list[str]:
    notes, duration, devices = list(choice.plan.notes), choice.duration, report.request.devices
    if choice.is_tight:
        device = report.request.device
        notes.append(
            f"tight: {choice.needed_bytes / device.memory_bytes:.0%} of the memory, and no plan was held against a GPU "
            "yet; a shorter --max-length, a smaller rank or batch gives it room"
        )
    sharing = report.request.sharing
    if choice.merge_bytes is not None:
        notes.append(f"merging takes {_bytes(choice.merge_bytes)} of live tensors")
    if devices > 1:
        notes.append(
            f"memory and time of {devices} devices are estimates for {sharing.label}: "
            f"{'parameters and examples' if sharing.shards else 'examples'} are divided, and "
            f"{duration.exchange_seconds / duration.seconds:.0%} of the time goes to what they exchange over "
            f"{(report.request.device.link_bandwidth or 0) / 1e9:g} GB/s"
        )
        parts = asdict(choice.parts)
        notes.append("each device holds " + ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if size))
    if sharing.shards and devices > 1:
        notes.append(
            f"each process loads the base into main memory before it is divided: {devices} x "
            f"{_bytes(choice.plan.peak.parts.weights)}"
        )
    if sharing.offloads:
        notes.append("the times leave out what moves between main memory and the devices")
    return notes


def show_serving(screen: Console, model: str, planned: ServingPlan, rates: Rates) -> None:
    """What serving takes, line by line, and about how fast it is."""
    device = planned.device
    free = f", of which advice leaves {device.margin:.0%} free" if device.margin else ""
    screen.print(
        f"serving {model} on {device.name}: {device.memory_bytes / 1e9:.1f} GB{device.sold_as}{free}", markup=False
    )
    lines = [("base", _bytes(planned.weights_bytes), "")]
    if planned.adapters:
        each = f"{planned.adapters:,} x {_bytes(planned.adapter_bytes)}"
        lines.append(("adapters", _bytes(planned.adapters * planned.adapter_bytes), each))
    each = f"{planned.slots:,} x {_bytes(planned.slot_bytes)}, each a context of {planned.context:,} tokens"
    lines.append(("slots", _bytes(planned.slots * planned.slot_bytes), each))
    lines.append(("runtime", _bytes(planned.needed_bytes - planned.live_bytes), "context and fragmentation"))
    lines.append(("needs", _bytes(planned.needed_bytes), f"{planned.most_slots:,} slots would fit at most"))
    for name, size, why in lines:
        screen.print(f"  {name:<9}{size:>9}  {why}".rstrip(), markup=False)
    for note in planned.notes:
        screen.print(f"  note: {note}", markup=False)
    if not planned.fits:
        screen.print("[bold red]it doesn't fit[/]: take fewer --slots, a shorter --max-length or a quantized --base")
    speeds = " and ".join(
        f"{planned.tokens_per_second(rates, n):,.0f} with {counted(n, 'answer')} at once"
        for n in sorted({1, planned.slots})
    )
    how = "as calibrated" if rates.is_measured else "by the data sheet; slimtune plan --calibrate measures yours"
    screen.print(f"tokens a second: about {speeds} ({how})")


def show_classic(screen: Console, cells: Sequence[TableCell]) -> None:
    """The classic table: simulated gigabytes, and the rule of thumb beside them."""
    from rich.table import Table

    sizes = [size for size in SIZES if any(cell.size == size for cell in cells)]
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("GB", no_wrap=True)
    for size in sizes:
        table.add_column(f"{size}\n{SIZES[size]}", justify="right", no_wrap=True)
    for row in ROWS:
        own = [cell for cell in cells if cell.row is row]
        table.add_row(row.name, *(f"{_short(cell.gigabytes)} ({cell.rule_of_thumb_gb})" for cell in own))
    screen.print(table, soft_wrap=False)
    setting = cells[0].plan.setting
    screen.print(
        f"\nsimulated (and the rule of thumb): batch {setting.batch} x {setting.sequence} tokens, bf16, "
        f"{'with' if setting.gradient_checkpointing else 'without'} checkpointing, AdamW, LoRA on all linear layers; "
        f"needed at the peak, with the runtime of an {cells[0].device.name}"
    )
    screen.print("when the rules of thumb hold:")
    for row in ROWS:
        ratios = [cell.ratio for cell in cells if cell.row is row]
        screen.print(f"  {row.name}: {row.holds} Here {min(ratios):.2f} to {max(ratios):.2f} times that.", markup=False)


def _show_question(screen: Console, report: PlanReport) -> None:
    request, device, lengths = report.request, report.request.device, report.request.lengths
    several = f"{request.devices} x " if request.devices > 1 else ""
    free = f", of which advice leaves {device.margin:.0%} free" if device.margin else ""
    screen.print(
        f"{report.model} on {several}{device.name}: {device.memory_bytes / 1e9:.1f} GB{device.sold_as}{free}; "
        f"goal {request.goal}: {GOALS[request.goal]}",
        markup=False,
    )
    if report.why_float32 is not None:
        screen.print(f"computed in {report.why_float32}")
    if device.is_cpu and is_emulated(request.dtype, CPU):
        screen.print(cost_of_emulation([request.dtype]), style="yellow", markup=False)
    if report.data is None:
        screen.print(
            f"no data given: time and cost are for {counted(lengths.examples, 'example')} of "
            f"{request.sequence:,} tokens, {request.epochs:g} times (--data measures yours)"
        )
        return
    spread = ", ".join(f"{share}% up to {lengths.percentile(share):,}" for share in PERCENTILES)
    screen.print(
        f"data: {counted(lengths.examples, 'example')}, {lengths.total:,} tokens"
        + _learned(report)
        + f"; {spread}; the longest has {lengths.longest:,}"
    )
    show_too_long(screen, report.cut, request.sequence)
    batch = report.choices[0].setting.batch
    gain = lengths.packing_gain(request.sequence, batch)
    screen.print(
        f"padding: {lengths.padding_waste(batch):.0%} of a batch of {batch}; packed rows of {request.sequence:,} "
        f"tokens would compute {1 / gain:.2f} times as many"
    )
    if shared := _sharing(report):
        screen.print(shared)


def _sharing(report: PlanReport) -> str | None:
    """How much is computed once for several rows, of the first choice that shares."""
    shared = next((choice.setting.shared for choice in report.choices if choice.setting.shared), None)
    if shared is None:
        return None
    return (
        f"what rows begin with alike is counted once, and padding not at all: {1 / shared.share:.2f} times fewer "
        "tokens (training.share_prefixes=false computes all); whether this model can is tried before training"
    )


def _learned(report: PlanReport) -> str:
    lengths, task = report.request.lengths, report.request.task
    if lengths.labels or task == "grpo":
        return ""
    if task == "seq2seq":
        return f" that are read and {lengths.learned:,} that are learned"
    if task in ("dpo", "orpo"):
        return " with the longer answer of each pair"
    return f" of which {lengths.learned / lengths.total:.0%} are learned"


def _show_choices(screen: Console, report: PlanReport) -> None:
    from rich.table import Table

    scale = max(report.request.device.memory_bytes, 1)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    table.add_column("needs", justify="right", no_wrap=True)
    table.add_column(f"of {scale / 1e9:.1f} GB", width=BAR_WIDTH + 1, no_wrap=True)
    for name in ("batch", "time", "cost", "adapter"):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in report.choices:
        mark = "" if choice.fits else "red"
        cost = choice.duration.cost
        table.add_row(
            Text(choice.label, style=mark),
            Text(_bytes(choice.needed_bytes), style=mark),
            bar(choice.parts, choice.runtime_bytes, scale, has_colour=screen.color_system is not None),
            _batch(choice),
            _time(choice.duration.seconds) if choice.fits else "no",
            "" if cost is None or not choice.fits else _dollars(cost),
            _bytes(choice.adapter_bytes),
        )
    screen.print()
    screen.print(table, soft_wrap=False)
    legend = Text()
    for part, colour in COLOURS.items():
        shown = "█" if screen.color_system is not None else LETTERS[part]
        legend.append(shown, style=colour).append(f" {part}  ")
    screen.print(legend)
    if any(choice.setting.gradient_checkpointing for choice in report.choices):
        screen.print("* with gradient checkpointing")
    if report.left_out:
        why = needs(*(library_of(report.left_out[0]) or ("", "")))
        screen.print(f"left out: a base in {listing(report.left_out)}, which {why}", style="yellow", markup=False)
    screen.print("runtime: the context of the device, and what its allocator leaves unused; in all figures of need")
    rates = report.rates
    how = "as calibrated" if rates.is_measured else "by the data sheet; slimtune plan --calibrate measures yours"
    price = report.request.device.price_per_hour
    cost = f"; ${price:g} an hour ({report.request.device.price_date})" if price is not None else ""
    screen.print(f"times: {how}{cost}")


def _show_refusal(screen: Console, report: PlanReport) -> None:
    nearest = min(report.choices, key=lambda choice: choice.needed_bytes)
    screen.print(
        f"\n[bold red]nothing fits[/]: the least is {nearest.label} with {_bytes(nearest.needed_bytes)}, at batch "
        f"{nearest.setting.batch} x {nearest.setting.sequence:,} tokens, and {report.request.device.name} has "
        f"{_bytes(report.request.device.memory_bytes)}; take a smaller model, a shorter --max-length, a larger "
        "--device or more of them (--devices)"
    )
    if (fits := report.in_16_bits) is not None:
        screen.print(
            f"in {report.stored_dtype} {fits.label} would fit, with {_bytes(fits.needed_bytes)}, and take several "
            f"times as long: model.dtype={report.stored_dtype}"
        )


def bar(parts: MemoryBreakdown, runtime: int, scale: int, has_colour: bool = True, width: int = BAR_WIDTH) -> Text:
    """The parts of a need, `width` characters for `scale` bytes; cut with an arrow where it is longer."""
    text, drawn, reached = Text(), 0, 0.0
    needed = parts.named() | {"runtime": runtime}
    for part, colour in COLOURS.items():
        reached += needed[part] / scale * width
        count = min(round(reached), width) - drawn
        text.append(("█" if has_colour else LETTERS[part]) * max(count, 0), style=colour)
        drawn += max(count, 0)
    if round(reached) > width:
        text.append("▶" if has_colour else ">", style="red")
    return text


def _described(choice: Choice, report: PlanReport) -> str:
    setting, words = choice.setting, [choice.label]
    if choice.rank:
        words.append(f"rank {choice.rank}, alpha {2 * choice.rank}, all linear layers")
    words.append(f"learning rate {choice.learning_rate:g}")
    words.append(f"batch {setting.batch}" + (f" x {setting.accumulation}" if setting.accumulation > 1 else ""))
    words.append("checkpointing" if setting.gradient_checkpointing else "no checkpointing")
    took = [_bytes(choice.needed_bytes), _time(choice.duration.seconds)]
    if choice.duration.cost is not None:
        took.append(_dollars(choice.duration.cost))
    return f"take {', '.join(words)}: {', '.join(took)}, {_bytes(choice.adapter_bytes)} on disk"


def _batch(choice: Choice) -> str:
    setting = choice.setting
    shown = str(setting.batch) + (f" x {setting.accumulation}" if setting.accumulation > 1 else "")
    return shown + ("*" if setting.gradient_checkpointing else "")


def _bytes(count: float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB" if count < 1e11 else f"{count / 1e9:,.0f} GB"
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def _short(gigabytes: float) -> str:
    return f"{gigabytes:.1f}" if gigabytes < 100 else f"{gigabytes:.0f}"


def _dollars(cost: float) -> str:
    return f"${cost:,.2f}" if cost >= 0.01 else "< 1 cent"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
