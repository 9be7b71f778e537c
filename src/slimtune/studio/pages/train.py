"""Training: a form of the recipe's schema, the command and the recipe that it comes to, and its start.

The names of the form's fields are the places of settings (`training.epochs`), and the address takes the same, so that
another page leads here with `/train?model.name=...&data.train=...`.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import FileResponse, Response

from slimtune.errors import ConfigError, SlimtuneError
from slimtune.recipe.method import find
from slimtune.storage.atomic import refuse_existing, write_file
from slimtune.storage.source import PACKAGED
from slimtune.studio import forms
from slimtune.studio.history import read_runs, run_path
from slimtune.studio.view import CurrentView, Page, View

PAGE = Page("train", "/train", order=30)
FIRST_PRESET = "chat"
RECIPES = "recipes"
_NAME, _PRESET, _BEFORE, _OVERWRITE, _ASKED = "run", "preset", "before", "overwrite", "asked"
_GOOD_NAME = re.compile(r"[^\W_][\w.-]*")


@PAGE.get("/train")
def show(view: CurrentView) -> Response:
    """The form, with the settings of a preset and those of the address."""
    asked = dict(view.request.query_params)
    preset = asked.get(_PRESET, FIRST_PRESET)
    values = forms.preset_values(preset)
    # The data of a shipped recipe are an example, and not the reader's.
    del values[forms.DATA]
    own = {place: text for place, text in asked.items() if place == forms.TASK or "." in place}
    if _BEFORE in asked and own.get(forms.MODEL) == forms.preset_values(asked[_BEFORE])[forms.MODEL]:
        # It came with the preset that was chosen before, and goes with it.
        del own[forms.MODEL]
    values |= own
    name = asked.get(_NAME, "") or _free_name(view, preset)
    return view.render("train.html.j2", **_form(view, values, name, preset))


@PAGE.post("/train/method")
async def change_method(view: CurrentView) -> Response:
    """The settings of another method."""
    texts = await _texts(view.request)
    method = texts.get(forms.METHOD, forms.DEFAULT_METHOD)
    return view.render("train_method.html.j2", values=texts, **_method(method))


@PAGE.post("/train/check")
async def check(view: CurrentView) -> Response:
    """What the form comes to: its mistakes, or the command and the recipe.

    Once a start or a recipe was asked for, what is missing for it is a mistake too, and stays said until it is there.
    """
    texts = await _texts(view.request)
    filled = forms.fill_in(texts, str(_output(view, texts)))
    asked = texts.get(_ASKED, "")
    errors = _mistakes_of_start(view, texts) if asked == "start" else {}
    return _answer(view, texts, filled, errors, asked=bool(asked))


@PAGE.post("/train/start")
async def start(view: CurrentView) -> Response:
    """Put the training into the queue, and show it."""
    texts = await _texts(view.request)
    filled = forms.fill_in(texts, str(_output(view, texts)))
    errors = _mistakes_of_start(view, texts)
    if errors or filled.recipe is None:
        return _answer(view, texts, filled, errors, asked=True, status=422)
    name = texts[_NAME].strip()
    view.studio.jobs.add(name, _arguments(view, texts, filled))
    return view.go(f"/runs/{name}")


@PAGE.post("/train/recipe")
async def save_recipe(view: CurrentView) -> Response:
    """Write the recipe into the folder of the runs, under a name that no other has."""
    texts = await _texts(view.request)
    filled = forms.fill_in(texts, str(_output(view, texts)))
    if filled.recipe is None:
        return _answer(view, texts, filled, {}, asked=True, status=422, target="#comes-to")
    name = texts.get(_NAME, "").strip()
    _check_name(view, name)
    folder, text = view.studio.folder / RECIPES, forms.recipe_text(filled.recipe)
    path = folder / f"{name}.yaml"
    number = 2
    while path.exists() and path.read_text(encoding="utf-8") != text:
        path, number = folder / f"{name}-{number}.yaml", number + 1
    write_file(path, text)
    return view.render(
        "train_saved.html.j2",
        file=path.name,
        command_line=forms.command_of(["train", str(view.studio.shown_folder / RECIPES / path.name)]),
    )


@PAGE.get("/train/recipes/{file}")
def download(view: CurrentView, file: str) -> Response:
    """A recipe that was saved."""
    path = run_path(view.studio.folder / RECIPES, file)
    if not path.is_file():
        raise ConfigError(f"there is no recipe {file} in {path.parent}; it may have been moved")
    return FileResponse(path, media_type="application/yaml", filename=path.name)


async def _texts(request: Request) -> dict[str, str]:
    """The fields of the form that are texts."""
    async with request.form() as form:
        return {name: value for name, value in form.multi_items() if isinstance(value, str)}


def _form(view: View, values: Mapping[str, str], name: str, preset: str) -> dict[str, Any]:
    method = values.get(forms.METHOD, forms.DEFAULT_METHOD)
    texts = {**values, _NAME: name}
    filled = forms.fill_in(values, str(_output(view, texts)))
    settings = forms.all_settings(method)
    return {
        "values": values,
        "run": name,
        "preset": preset,
        "presets": forms.presets(),
        "methods": forms.method_names(),
        "tasks": forms.tasks(),
        "models": PACKAGED,
        "directory": os.getcwd(),
        "sections": {section: group for section, group in settings.items() if section != "method"},
        # An empty form is not full of mistakes.
        "errors": {place: sentence for place, sentence in filled.errors.items() if sentence},
        **_method(method),
        **_aside(view, texts, filled, {}),
    }


def _method(name: str) -> dict[str, Any]:
    method = find(name)
    doc = inspect.cleandoc(method.config.__doc__ or "").partition("\n\nRaises:")[0].partition("\n\nArgs:")[0]
    return {
        "method": method,
        "method_help": [" ".join(paragraph.split()).replace("`", "") for paragraph in doc.split("\n\n")],
        "method_settings": forms.settings_of("method", name),
    }


def _aside(view: View, texts: Mapping[str, str], filled: forms.Filled, errors: Mapping[str, str]) -> dict[str, Any]:
    """What stands beside the form."""
    named = {**filled.errors, **errors}
    return {
        "command_line": forms.command_of(_arguments(view, texts, filled)) if filled.sections else "",
        "recipe_text": forms.recipe_text(filled.recipe) if filled.recipe else "",
        "general": [sentence for place, sentence in named.items() if place == "" and sentence],
        "places": [(place, sentence) for place, sentence in named.items() if place and sentence],
    }


def _answer(
    view: View,
    texts: Mapping[str, str],
    filled: forms.Filled,
    errors: Mapping[str, str],
    *,
    asked: bool,
    status: int = 200,
    target: str = "",
) -> Response:
    """What stands beside the form, with the mistakes for the fields; what is only missing is said once asked for."""
    required = {place: sentence or view.t("train.required") for place, sentence in filled.errors.items()}
    shown = {**(required if asked else filled.errors), **errors}
    response = view.render("train_aside.html.j2", status, **_aside(view, texts, filled, shown))
    fields = {place.replace(".", "-"): sentence for place, sentence in shown.items() if place and sentence}
    # The browser puts each beside its field; a header takes ASCII, which `dumps` gives.
    if target:
        response.headers.update({"hx-retarget": target, "hx-reswap": "innerMorph"})
    response.headers["hx-trigger"] = json.dumps({"mistakes": {"fields": fields}})
    return response


def _arguments(view: View, texts: Mapping[str, str], filled: forms.Filled) -> list[str]:
    arguments = forms.arguments_of(filled.sections, _output(view, texts))
    return [*arguments, "--overwrite"] if texts.get(_OVERWRITE) == "true" else arguments


def _output(view: View, texts: Mapping[str, str]) -> Any:
    return view.studio.shown_folder / (texts.get(_NAME, "").strip() or "NAME")


def _mistakes_of_start(view: View, texts: Mapping[str, str]) -> dict[str, str]:
    name = texts.get(_NAME, "").strip()
    try:
        _check_name(view, name)
        if any(run.is_busy for run in read_runs(view.studio.folder, view.studio.jobs) if run.name == name):
            raise ConfigError(view.t("train.busy", name=name))
        refuse_existing(view.studio.folder / name, texts.get(_OVERWRITE) == "true")
    except SlimtuneError as error:
        return {_NAME: str(error)}
    return {}


def _check_name(view: View, name: str) -> None:
    """Raises: ConfigError, NoSuchRunError, for a name that a new run can't have."""
    if not _GOOD_NAME.fullmatch(name):
        raise ConfigError(view.t("train.bad_name"))
    run_path(view.studio.folder, name)


def _free_name(view: View, wanted: str) -> str:
    taken = {run.name for run in read_runs(view.studio.folder, view.studio.jobs)}
    number = 1
    while f"{wanted}-{number}" in taken:
        number += 1
    return f"{wanted}-{number}"
