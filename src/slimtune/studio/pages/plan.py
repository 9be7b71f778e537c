"""What tuning takes before anything is loaded: the plan of `slimtune plan` moves as its settings move.

The names of the form's fields are the places of settings (`training.batch_size`), with `goal` and `device`; the address
takes the same.
"""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from fastapi.responses import Response

from slimtune.errors import ConfigError
from slimtune.plan.devices import AUTO, CPU, devices
from slimtune.recipe.method import methods
from slimtune.storage.source import PACKAGED
from slimtune.studio.uploads import DATA, files_in
from slimtune.studio.view import CurrentView, Page

PAGE = Page("plan", "/plan", order=20)
NOTHING_FITS = 3
"""The exit code of a plan that says so, and is an answer all the same."""
BASES = ("dense", "nf4", "fp4", "int8", "int8-torchao", "int4-torchao")
OPTIONS = {
    "data.train": "--data", "goal": "--goal", "device": "--device", "method.name": "--method",
    "model.quantize": "--base", "method.r": "--rank", "training.batch_size": "--batch-size",
    "data.max_length": "--max-length",
}  # fmt: skip
"""Fields of the form that the command has options for."""
_DEFAULTS = {"goal": "task", "device": AUTO}
TO_TRAIN = {
    "--method": "method.name", "--rank": "method.r", "--quantize": "model.quantize", "--batch-size":
    "training.batch_size", "--learning-rate": "training.learning_rate", "--max-length": "data.max_length", "--epochs":
    "training.epochs",
}  # fmt: skip
"""Options of the command that a plan ends with, as the page Train calls them."""


@PAGE.get("/plan")
def show(view: CurrentView) -> Response:
    """The form; it is planned as soon as it is shown."""
    # They bring torch along, for which the page Runs must not wait.
    from slimtune.plan.rules import GOALS
    from slimtune.plan.table import SIZES

    view.studio.answers.warm_up()
    empty = dict.fromkeys(("model.name", *OPTIONS), "")
    values = empty | {"model.name": next(iter(PACKAGED))} | _DEFAULTS | dict(view.request.query_params)
    return view.render(
        "plan.html.j2",
        values=values,
        tab=secrets.token_hex(8),
        goals=GOALS,
        methods=[name for name in methods() if name != "features"],
        bases=BASES,
        devices=(AUTO, CPU, *devices()),
        models=(*PACKAGED, *SIZES.values()),
        files=files_in(view.studio.folder / DATA),
    )


@PAGE.get("/plan/result")
def result(view: CurrentView) -> Response:
    """The plan of the form's settings, to be asked for again until it is there."""
    from slimtune.plan.table import COLOURS

    values = {name: text.strip() for name, text in view.request.query_params.items() if text.strip()}
    if "model.name" not in values:
        return view.render("plan_result.html.j2", plan=None, command_line="", waits=False, refused="")
    arguments = _arguments(values)
    answer = view.studio.answers.ask(values.pop("tab", ""), [*arguments, "--json"])
    is_plan = answer is not None and answer.exit_code in (0, NOTHING_FITS) and answer.value is not None
    plan = answer.value if answer is not None and is_plan else None
    response = view.render(
        "plan_result.html.j2",
        waits=answer is None,
        refused=answer.sentence if answer is not None and not is_plan else "",
        plan=plan,
        choices=[_shown(choice, plan, values) for choice in plan["choices"]] if plan else [],
        parts=tuple(COLOURS),
        command_line=shlex.join(["slimtune", *arguments]),
    )
    response.headers["hx-replace-url"] = "/plan?" + urlencode(
        {name: text for name, text in values.items() if text != _DEFAULTS.get(name)}
    )
    return response


def _arguments(values: Mapping[str, str]) -> list[str]:
    """What stands behind `slimtune`. Raises: ConfigError, for columns that can't be read."""
    model, data = values["model.name"], values.get("data.train", "")
    # A name that begins like an option is still a name.
    arguments = ["plan", f"./{model}" if model.startswith("-") else model]
    for place, option in OPTIONS.items():
        text = values.get(place, "")
        if text and text != _DEFAULTS.get(place):
            arguments += [option, f"./{text}" if place == "data.train" and text.startswith("-") else text]
    return arguments + [word for pair in _columns(values) for word in ("--field", pair)] * bool(data)


def _columns(values: Mapping[str, str]) -> list[str]:
    try:
        fields = json.loads(values.get("data.fields", "{}"))
        return [f"{name}={column}" for name, column in fields.items()]
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"data.fields is {values['data.fields']!r}; choose the columns on the page Data") from error


def _shown(choice: Mapping[str, Any], plan: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """A choice with its bar, in per cent of the device's memory or of the need, where that is larger."""
    from slimtune.plan.table import COLOURS

    memory, needed = plan["device"]["memory_bytes"], choice["needed_bytes"]
    whole = max(memory, needed)
    parts = choice["parts"] | {"runtime": choice["runtime_bytes"]}
    bar, start = [], 0.0
    for name in COLOURS:
        width = 100 * parts[name] / whole
        bar.append({"name": name, "x": round(start, 2), "width": round(width, 2), "bytes": parts[name]})
        start += width
    return {
        **choice,
        "bar": bar,
        "limit": round(100 * memory / whole, 2),
        "share": needed / memory,
        "query": urlencode(_settings(choice["command"]) | _own(values)),
    }


def _settings(command: str) -> dict[str, str]:
    """The settings of a command `slimtune train MODEL DATA ...`, as the page Train takes them."""
    words = iter(shlex.split(command)[2:])
    settings = {"model.name": next(words), "data.train": next(words)}
    for word in words:
        if word.startswith("--"):
            value = next(words)
            if word in TO_TRAIN:
                settings[TO_TRAIN[word]] = value
        else:
            place, _, value = word.partition("=")
            settings[place] = value
    return settings


def _own(values: Mapping[str, str]) -> dict[str, str]:
    """What the form says of the data, and the plan doesn't: nothing where no data was named."""
    if "data.train" not in values:
        return {"data.train": ""}
    return {place: values[place] for place in ("data.fields", "data.format", "data.chat_template") if place in values}
