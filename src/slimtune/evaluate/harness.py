"""Tasks of lm-evaluation-harness (Gao et al.), asked of a model that is loaded already, its adapters included."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimtune.errors import ConfigError, DataError, did_you_mean, listing, require
from slimtune.evaluate.result import Evaluation
from slimtune.metrics.intervals import Z, wilson


def evaluate_by_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    batch_size: int = 32,
    limit: int | None = None,
    shots: int | None = None,
    manager: Any = None,
    chat_template: bool = False,
) -> Evaluation:
    """The metrics of tasks as `task/metric`, with Wilson's intervals for shares, else of 1.96 standard errors.

    Args:
        limit: how many questions of each task are asked.
        shots: examples in front of each question; None leaves it to the task.
        manager: what `find_tasks` gave; without it, the harness's own tasks are asked.
        chat_template: show the questions as turns of a chat, as the harness does not unless it is told.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        ConfigError: a task that is unknown.
        DataError: the data of a task can't be had, for most of it comes from the Hub.
    """
    harness, wrapper = _harness()
    began = time.monotonic()
    manager = manager or find_tasks(tasks)
    # It warns of a model that was loaded by someone else, which is what is wanted here.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        results_by_task = harness.simple_evaluate(
            wrapped, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False,
            bootstrap_iters=1000, apply_chat_template=chat_template,
        )  # fmt: skip
    except OSError as error:
        raise DataError(f"the data of {', '.join(tasks)} can't be loaded: {str(error).splitlines()[0]}") from error
    return _evaluation(results_by_task, time.monotonic() - began, {"shots": results_by_task["n-shot"]})


def _evaluation(results_by_task: dict[str, Any], seconds: float, facts: dict[str, Any]) -> Evaluation:
    scores, intervals = {}, {}
    for task, results in results_by_task["results"].items():
        for key, value in results.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            # A filter other than the plain one reads the answers in another way, and is another score.
            name = f"{task}/{metric}" if kind == "none" else f"{task}/{metric} ({kind})"
            scores[name] = float(value)
            bounds = _interval(value, results.get(f"{metric}_stderr,{kind}"), results_by_task["n-samples"].get(task))
            if bounds is not None:
                intervals[name] = bounds
    count = sum(samples["effective"] for samples in results_by_task["n-samples"].values())
    return Evaluation(next(iter(scores)), scores, intervals, None, None, [], seconds, facts | {"count": count})


def _interval(value: float, error: Any, samples: dict[str, int] | None) -> tuple[float, float] | None:
    if samples and 0 <= value <= 1 and math.isclose(right := value * samples["effective"], round(right), abs_tol=1e-6):
        # A share: standard errors would say that 3 of 3 is certain.
        return wilson(round(right), samples["effective"])
    return (value - Z * error, value + Z * error) if isinstance(error, int | float) else None


def find_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """The harness's TaskManager with these tasks; raises ConfigError for one that is unknown.

    Args:
        include_path: a folder of tasks in YAML besides those of the harness; such files may name Python that is run.
    """
    _harness()
    from lm_eval.tasks import TaskManager

    manager = None
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ConfigError(f"no folder {include_path} with tasks; pass the folder of the YAML files")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            near = did_you_mean(task, manager.all_tasks) or f"; it has {listing(manager.all_tasks)}"
            raise ConfigError(f"lm-evaluation-harness has no task '{task}'{near}")
    return manager


def _harness() -> tuple[Any, Any]:
    require("lm-eval", extra="lm-eval", purpose="a task of lm-evaluation-harness")
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    return lm_eval, HFLM
