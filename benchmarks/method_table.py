"""The runs of all methods as the table and the plot of `docs/figures/methods.md`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Any

from benchmarks import page
from benchmarks.machine import ROOT
from benchmarks.method_cases import METHODS, TASKS, Method, Task, settings_of
from benchmarks.results import subtitle

PAGE = ROOT / "docs" / "figures" / "methods.md"
PLOT = ROOT / "docs" / "figures" / "methods.png"
HEADER = (
    "method", "trained", "score", "score in peft", "step", "step, peft/ours", "memory", "memory, peft/ours", "on disk",
    "attach",
)  # fmt: skip
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t for a two-sided interval of 95 %, by the number of seeds."""

Run = dict[str, Any]


def runs_of(runs: dict[str, Run], task: Task, method: Method, side: str) -> dict[int, Run]:
    """The runs of a side by seed, under the settings that are in force."""
    prefix, settings = f"{task.name}/{method.name}/{side}/", settings_of(task, method)
    return {
        int(key.removeprefix(prefix)): run
        for key, run in sorted(runs.items())
        if key.startswith(prefix) and run["settings"] == settings
    }


def timed(runs: dict[int, Run]) -> dict[int, Run]:
    """The runs with nothing else beside them."""
    return {seed: run for seed, run in runs.items() if run.get("timed", True)}


def interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean and a 95 % interval over seeds, within [0, 1]; for one seed the score alone."""
    middle = mean(scores)
    if len(scores) < 2:
        return middle, middle, middle
    reach = T95.get(len(scores), 2.5) * stdev(scores) / math.sqrt(len(scores))
    return middle, max(0.0, middle - reach), min(1.0, middle + reach)


def shown_score(runs: dict[int, Run]) -> str:
    if not runs:
        return ""
    middle, low, high = interval([run["score"] for run in runs.values()])
    return f"{middle:.3f}" + (f" ({low:.2f}-{high:.2f})" if len(runs) > 1 else " (1 seed)")


def ratio(peft: dict[int, Run], ours: dict[int, Run], metric: str) -> str:
    """peft / ours, seed by seed: the median and the range."""
    pairs = [peft[seed][metric] / ours[seed][metric] for seed in sorted(peft.keys() & ours.keys())]
    if not pairs:
        return ""
    return f"{median(pairs):.2f}" + (f" ({min(pairs):.2f}-{max(pairs):.2f})" if len(pairs) > 1 else "")


def row(runs: dict[str, Run], task: Task, method: Method) -> tuple[str, ...]:
    ours, peft = (runs_of(runs, task, method, side) for side in ("ours", "peft"))

    quiet = timed(ours)

    def middle(metric: str, of: dict[int, Run] = ours) -> float:
        return median(run[metric] for run in of.values())

    return (
        method.name,
        f"{middle('trainable'):,.0f}",
        shown_score(ours),
        shown_score(peft),
        f"{1e3 * middle('step_seconds', quiet):.0f} ms" if quiet else "",
        ratio(timed(peft), quiet, "step_seconds"),
        f"{middle('peak_above_imports_bytes') / 1e9:.2f} GB",
        ratio(peft, ours, "peak_above_imports_bytes"),
        f"{middle('stored_bytes') / 1e6:.2f} MB",
        f"{1e3 * middle('attach_seconds', quiet):.0f} ms" if method.config and quiet else "",
    )


def table(document: dict[str, Any], task: Task) -> str:
    """The methods of one task as Markdown, with what it was measured on."""
    done = [method for method in METHODS if runs_of(document["runs"], task, method, "ours")]
    lines = [f"### {task.title}", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(row(document["runs"], task, method)) + " |" for method in done]
    mine = [run for key, run in document["runs"].items() if key.startswith(task.name + "/")]
    dates = sorted({run["date"] for run in mine})
    lines += [
        "",
        f"{task.steps} steps of {task.batch}; score: {task.score} on {task.held_out} held-out examples, mean and 95 % "
        f"interval over seeds. {subtitle(document['machine'])} {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.",
    ]
    return "\n".join(lines)


def plot(document: dict[str, Any]) -> None:
    """Score against trained parameters, one panel a task."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in TASKS.values() if any(key.startswith(task.name + "/") for key in document["runs"])]
    figure, axes = plt.subplots(1, len(tasks), figsize=(7 * len(tasks), 5), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for method in METHODS:
            ours = runs_of(document["runs"], task, method, "ours")
            if not ours:
                continue
            x = median(run["trainable"] for run in ours.values())
            middle, low, high = interval([run["score"] for run in ours.values()])
            axis.errorbar(x, middle, [[middle - low], [high - middle]], fmt="o", capsize=3)
            axis.annotate(method.name, (x, middle), textcoords="offset points", xytext=(6, 4), fontsize=8)
        axis.set(xscale="log", xlabel="trained parameters", ylabel=task.score, title=task.title, ylim=(-0.03, 1.05))
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110, metadata={"Software": None})
    plt.close(figure)


def write(document: dict[str, Any]) -> None:
    """Put the tables between the page's marks, and draw the plot."""
    if not document["runs"]:
        return
    plot(document)
    for task in TASKS.values():
        if any(key.startswith(task.name + "/") for key in document["runs"]):
            page.fill(PAGE, task.name, table(document, task))
