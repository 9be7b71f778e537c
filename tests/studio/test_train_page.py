"""The form of a training: all of the schema, its mistakes beside the fields, and the command that it comes to."""

from __future__ import annotations

import json
import re
import shlex
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from slimtune.cli.train import with_options
from slimtune.recipe.method import find
from slimtune.recipe.recipe import Recipe
from slimtune.storage.text_files import parse
from slimtune.studio import forms
from slimtune.studio.jobs import Jobs
from studio_client import held_queue, open_studio, write_run

FORM = {"model.name": "base", "data.train": "train.jsonl", "run": "mine", "method.name": "lora"}


def typed(arguments: list[str]) -> Recipe:
    """The recipe that `slimtune train` makes of these arguments."""
    assert arguments[0] == "train"
    sections: dict[str, Any] = {"model": {"name": arguments[1]}, "data": {"train": arguments[2]}}
    assert arguments[3] == "--output"
    sections["output"], rest = arguments[4], arguments[5:]
    options = {}
    if rest[:1] == ["--method"]:
        options, rest = {"method": rest[1]}, rest[2:]
    return Recipe.of(with_options(sections, options, rest))


def mistakes(answer: Any) -> dict[str, str]:
    return json.loads(answer.headers["hx-trigger"])["mistakes"]["fields"]


def shown_command(page: str) -> list[str]:
    found = re.search(r'<pre id="command"[^>]*><code>(.*?)</code>', page, re.DOTALL)
    assert found
    return shlex.split(unescape(found[1]))


def test_every_setting_of_a_recipe_is_in_the_form_with_its_help(tmp_path: Path) -> None:
    page = open_studio(tmp_path).get("/train").text
    for section, kind in Recipe.sections().items():
        for key in kind.__dataclass_fields__:
            has = f'name="{section}.{key}"' in page
            # A distillation is another command, and code that comes with a model is a decision of the terminal's.
            assert has != (section == "distillation" or key == "trust_remote_code"), (section, key)
    for field in find("lora").fields:
        assert f'name="method.{field}"' in page
    assert "batches per optimizer step" in page


@pytest.mark.parametrize("method", forms.method_names())
def test_every_method_brings_its_own_fields(tmp_path: Path, method: str) -> None:
    page = open_studio(tmp_path).post("/train/method", data={"method.name": method}).text
    assert re.findall(r'name="method\.(\w+)"', page) == list(find(method).fields)


@pytest.mark.parametrize("preset", forms.presets())
def test_the_command_of_a_preset_is_the_recipe_that_ships(tmp_path: Path, preset: str) -> None:
    filled = forms.fill_in(forms.preset_values(preset), "out")
    assert not filled.errors
    arguments = forms.arguments_of(filled.sections, Path("out"))
    shipped = parse(forms.text_of(preset)) | {"output": "out"}
    assert typed(arguments) == filled.recipe == Recipe.of(shipped)
    page = open_studio(tmp_path).get("/train", params={"preset": preset, "data.train": shipped["data"]["train"]}).text
    assert shown_command(page)[1:3] == arguments[:2]


VALUES = {
    "data.held_out": ["0.1", "held.jsonl"], "data.fields": ['{"prompt": "question"}'], "data.packing": ["true"],
    "method.target_modules": ["[q_proj, v_proj]", "all-linear", ".*_proj"], "method.r": ["64"],
    "method.lora_alpha": ["32"], "method.init_lora_weights": ["pissa", "false"], "method.rank_pattern": ["{q_proj: 4}"],
    "training.learning_rate": ["1e-4", "2"], "training.share_prefixes": ["true", "false"], "training.max_steps": ["5"],
    "training.report_to": ["[tensorboard, wandb]", "tensorboard"], "training.scheduler_options": ["{min_lr: 0.1}"],
    "training.keep_best": ["loss", "3", "no", "a b"], "model.revision": [""], "model.dtype": ["float32"],
    "model.device": ["cuda:1"], "evaluation.scorer": ["auto"], "task": ["auto", "text"],
}  # fmt: skip


@pytest.mark.parametrize(("place", "text"), [(place, text) for place, some in VALUES.items() for text in some])
def test_what_is_filled_in_is_what_the_command_does(place: str, text: str) -> None:
    texts = FORM | {"data.held_out": "0.2", place: text}
    filled = forms.fill_in(texts, "runs/mine")
    assert not filled.errors
    assert filled.recipe is not None
    arguments = shlex.split(forms.command_of(forms.arguments_of(filled.sections, Path("runs/mine"))))[1:]
    assert typed(arguments) == filled.recipe


def test_all_mistakes_are_found_at_once_each_beside_its_field(tmp_path: Path) -> None:
    wrong = {
        "training.epochs": "-1", "training.batch_size": "many", "training.scheduler": "cosin", "method.r": "0.5",
        "data.max_length": "[1", "model.dtype": "int3",
    }  # fmt: skip
    found = mistakes(open_studio(tmp_path).post("/train/check", data=FORM | wrong))
    assert set(found) == {place.replace(".", "-") for place in wrong}
    assert "did you mean 'cosine'" in found["training-scheduler"]
    assert found["training-epochs"].startswith("epochs must be above 0")


def test_settings_that_exclude_each_other_are_said_too(tmp_path: Path) -> None:
    client = open_studio(tmp_path)
    found = mistakes(client.post("/train/check", data=FORM | {"evaluation.scorer": "auto"}))
    assert "data-held_out" in found
    both = FORM | {"method.name": "full", "model.quantize": "nf4"}
    assert "can&#39;t be trained" in client.post("/train/check", data=both).text


def test_what_is_missing_is_said_at_the_start_and_not_before(tmp_path: Path) -> None:
    client = open_studio(tmp_path)
    assert mistakes(client.post("/train/check", data={"run": "mine"})) == {}
    refused = client.post("/train/start", data={"run": "mine"})
    assert refused.status_code == 422
    assert set(mistakes(refused)) == {"model-name", "data-train"}
    assert list(Jobs(tmp_path)) == []


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "-x", "a b", "x.run", "x" * 300, "a\\b"])
def test_a_run_is_written_nowhere_but_under_the_folder(tmp_path: Path, name: str) -> None:
    client = open_studio(tmp_path / "runs")
    for action in ("start", "recipe"):
        assert client.post(f"/train/{action}", data=FORM | {"run": name}).status_code in (404, 422)
    assert [path.name for path in tmp_path.rglob("*") if path.name != "runs"] == []


@pytest.mark.parametrize(("place", "key"), [("evaluation.scorer", "data.held_out"), ("preferences.reward", "task")])
def test_code_in_a_file_is_not_run(tmp_path: Path, place: str, key: str) -> None:
    texts = FORM | {place: "mine.py:score", key: {"task": "grpo"}.get(key, "0.1")}
    refused = open_studio(tmp_path).post("/train/start", data=texts)
    assert refused.status_code == 422
    assert "names code in a file" in mistakes(refused)[place.replace(".", "-")]


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    filled = forms.fill_in(FORM | {"model.trust_remote_code": "true"}, "out")
    assert filled.recipe is not None
    assert not filled.recipe.model.trust_remote_code


def test_a_start_is_a_job_and_a_second_of_that_name_is_refused(tmp_path: Path) -> None:
    client = open_studio(tmp_path)
    with held_queue(tmp_path):
        started = client.post("/train/start", data=FORM)
        assert started.headers["hx-redirect"] == "/runs/mine"
        (job,) = Jobs(tmp_path)
        assert list(job.arguments) == ["train", "base", "train.jsonl", "--output", str(tmp_path / "mine")]
        page = client.get("/runs/mine").text
        assert "waiting" in page
        assert shown_command(page) == ["slimtune", *job.arguments]
        refused = client.post("/train/start", data=FORM)
        assert "waits or runs already" in mistakes(refused)["run"]
        client.post("/runs/mine/stop")
        assert 'class="badge stopped"' in client.get("/").text


def test_a_result_is_replaced_only_where_that_is_asked(tmp_path: Path) -> None:
    write_run(tmp_path / "mine")
    client = open_studio(tmp_path)
    assert "already holds" in mistakes(client.post("/train/start", data=FORM))["run"]
    with held_queue(tmp_path):
        assert client.post("/train/start", data=FORM | {"overwrite": "true"}).status_code == 204
        (job,) = Jobs(tmp_path)
        assert job.arguments[-1] == "--overwrite"


def test_a_recipe_is_saved_under_a_name_of_its_own(tmp_path: Path) -> None:
    client = open_studio(tmp_path)
    for texts, expected in ((FORM, "mine.yaml"), (FORM, "mine.yaml"), (FORM | {"method.r": "64"}, "mine-2.yaml")):
        page = client.post("/train/recipe", data=texts).text
        assert f">{expected}</a>" in page
        assert f"slimtune train {tmp_path}/recipes/{expected}" in page
    saved = Recipe.read(tmp_path / "recipes" / "mine-2.yaml")
    assert saved.method.fields["r"] == 64
    assert client.get("/train/recipes/mine.yaml").text == (tmp_path / "recipes" / "mine.yaml").read_text()
    assert client.get("/train/recipes/other.yaml").status_code == 422


def test_other_pages_lead_here_with_settings(tmp_path: Path) -> None:
    asked = {"model.name": "base", "data.train": "a file.jsonl", "training.batch_size": "3", "task": "text"}
    page = open_studio(tmp_path).get("/train", params=asked).text
    words = shown_command(page)
    assert words[2:4] == ["base", "a file.jsonl"]
    assert {"training.batch_size=3", "task=text"} <= set(words)


def test_a_preset_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    client: TestClient = open_studio(tmp_path)
    answer = client.get("/train?preset=cha")
    assert answer.status_code == 422
    assert "did you mean" in answer.text
    assert client.get("/train?method.name=lor").status_code == 422
