"""`slimtune forgetting` and `slimtune spectra` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import slimtune
from small_text_model import write_lines

FEW = ["--texts", 4, "--device", "cpu"]


def test_forgetting_as_people_read_it(run: Any, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("A text of mine.\n\nAnother one.\n")
    picture = tmp_path / "forgetting.png"
    result = run("forgetting", tuned, "--data", tmp_path / "mine.txt", "--plot", picture, *FEW)
    assert result.exit_code == 0, result.output
    for word in ("prose", "german", "mine", "mean", "95% interval", "worst of"):
        assert word in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_forgetting_as_json(run: Any, tuned: Path, base: Path) -> None:
    result = run("forgetting", tuned, "--domains", "prose,code", "--json", *FEW)
    found = json.loads(result.stdout)
    assert (found["tuned"], found["base"]) == (str(tuned), str(base))
    assert set(found["domains"]) == {"prose", "code"}
    prose = found["domains"]["prose"]
    assert prose["difference"] == pytest.approx(prose["after"] - prose["before"])
    assert found["difference"] == pytest.approx(sum(d["difference"] for d in found["domains"].values()) / 2)
    assert prose["interval"][0] <= prose["difference"] <= prose["interval"][1]


def test_only_texts_of_the_user(run: Any, tuned: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "mine.jsonl", {"text": "A text of mine."}, {"text": "Another one."})
    found = json.loads(run("forgetting", tuned, "--domains", "none", "--data", data, "--json", *FEW).stdout)
    assert set(found["domains"]) == {"mine"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--domains", "prse"], "did you mean 'prose'"),
        (["--domains", "none"], "no text to measure"),
        (["--plot", "x.gif"], "PNG or SVG"),
        (["--data", "there-is-none.txt"], "can't be read"),
    ],
)
def test_mistakes_of_forgetting(run: Any, tuned: Path, options: list[str], message: str) -> None:
    result = run("forgetting", tuned, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_domain_of_the_user_may_not_hide_a_shipped_one(run: Any, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("A text of mine.")
    result = run("forgetting", tuned, "--data", tmp_path / "prose.txt")
    assert result.exit_code == 2
    assert "rename" in result.stderr


def test_spectra_as_people_read_them(run: Any, tuned: Path, tmp_path: Path) -> None:
    result = run("spectra", tuned, "--against", tuned, "--plot", tmp_path / "spectra.svg", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for word in ("q_proj", "down_proj", "eff.", "overlap", "intruder dimensions in"):
        assert word in result.stdout
    assert "<svg" in (tmp_path / "spectra.svg").read_text()


def test_spectra_as_json(run: Any, tuned: Path, base: Path) -> None:
    found = json.loads(run("spectra", tuned, "--top", 5, "--epsilon", 0.7, "--device", "cpu", "--json").stdout)
    assert (found["base"], found["top"], found["epsilon"]) == (str(base), 5, 0.7)
    assert found["count"] == len(found["matrices"]) == 14
    assert found["intruders"] == sum(len(one["intruders"]) for one in found["matrices"])
    for one in found["matrices"]:
        assert len(one["values"]) == 4
        assert len(one["cosines"]) == 5
        assert [i["index"] for i in one["intruders"]] == [i for i, c in enumerate(one["cosines"]) if c < 0.7]


@pytest.mark.slow
def test_intruders_scaled_down(run: Any, tuned: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "scaled"
    few = write_lines(tmp_path / "few.jsonl", *map(json.loads, data.read_text().splitlines()[:4]))
    options = ["--scale-intruders", 0.5, "--output", output, "--data", data, "--task", few, "--device", "cpu"]
    result = run("spectra", tuned, *options)
    assert result.exit_code == 0, result.output
    for word in ("scaled by 0.5", "forgetting", "task: train", "written as an adapter", "on 4 questions"):
        assert word in result.stdout
    again = run("generate", output, "two large lattes for maria", "--max-new-tokens", 2)
    assert again.exit_code == 0
    found = json.loads(run("spectra", tuned, *options, "--as-model", "--overwrite", "--json").stdout)
    assert found["kind"] == "model"
    assert found["scaled"] == found["spectra"]["intruders"]
    assert set(found["outside"]) == set(found["task"]) == {"tuned", "scaled", "change"}
    assert (found["answered"]["count"], found["answered"]["metric"]) == (4, "json_match")
    assert slimtune.load(str(output), device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale-intruders", "0.5"], "--output"),
        (["--scale-intruders", "0.5", "--output", "x", "--plot", "x.png"], "neither --against nor --plot"),
        (["--matrix", "lm_head"], "--plot"),
        (["--output", "x"], "belong to --scale-intruders"),
        (["--plot", "x.png", "--matrix", "model.layers.0.mlp.up_prj"], "did you mean 'model.layers.0.mlp.up_proj'"),
        (["--scale-intruders", "0.5", "--output", "x", "--epsilon", "0"], "no intruder dimensions"),
        (["--base", "there-is-none"], "there-is-none"),
    ],
)
def test_mistakes_of_spectra(
    run: Any, tuned: Path, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("spectra", tuned, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())
