"""`slimtune slim`: the steps are done in order, measured, resumed, and refused beyond their bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import slimtune
from slimtune.cli import app
from slimtune.data.settings import DataSettings
from slimtune.evaluate.domain_texts import texts
from slimtune.export.formats import ExportOptions, export
from slimtune.slim import measure as module
from slimtune.slim import pipeline
from slimtune.slim.engines import engines_of
from slimtune.slim.quantize import QuantizeConfig, quantize_
from slimtune.slim.recipe import SlimRecipe, shipped
from slimtune.slim.target import ENGINES, recipe_for
from small_text_model import orders, save_base, write_lines


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = save_base(tmp_path / "base", num_hidden_layers=3)
    rows = write_lines(tmp_path / "rows.jsonl", *({"messages": e.messages()} for e in orders(20)))
    training = {"max_steps": 2, "batch_size": 4}
    values = {
        "model": str(base),
        "data": {"train": str(rows), "held_out": 0.2},
        "evaluation": {"limit": 2, "max_new_tokens": 8},
        "output": str(tmp_path / "out"),
        "steps": [{"prune": {"layers": 2}}, {"distill": {"method": {"name": "lora", "r": 4}, "training": training}}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in this process, on few texts: a process of its own imports for many seconds."""
    monkeypatch.setattr(module, "texts", lambda: texts(["facts", "chat"], 2))
    monkeypatch.setattr(module, "TURNS", 1)
    monkeypatch.setattr(pipeline, "measured", module.measure)


@pytest.mark.soak
def test_a_process_of_its_own_measures_the_same(recipe: Path, tmp_path: Path) -> None:
    base, data = str(tmp_path / "base"), DataSettings(str(tmp_path / "rows.jsonl"))
    apart, inside = (measured("a", base, base, data, None, 0.0) for measured in (module.measured, module.measure))
    assert apart.perplexity == pytest.approx(inside.perplexity)
    assert 0 < apart.resident_bytes < 2 * inside.resident_bytes


@pytest.mark.usefixtures("few_texts")
def test_a_row_a_step(recipe: Path, tmp_path: Path) -> None:
    result = run("slim", recipe, "--json")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in rows] == ["00-model", "01-prune", "02-distill"]
    assert rows[0]["kl"] == rows[0]["forgetting"] == 0
    assert rows[0]["same_first"] == rows[0]["decode_ratio"] == 1
    assert rows[1]["bytes"] < rows[0]["bytes"]
    assert rows[1]["kl"] > 0
    assert all(0 <= row["interval"][0] <= row["score"] <= row["interval"][1] <= 1 for row in rows)
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2
    assert json.loads((out / "slim_report.json").read_text())["rows"] == rows
    assert (out / "slim_report.md").read_text().count("\n|") == 5
    assert "02-distill" in (out / "slim_report.html").read_text()
    assert (out / "slim_report.png").is_file()
    assert not (tmp_path / "out.slim").exists()


@pytest.mark.usefixtures("few_texts")
def test_a_model_is_tuned_and_quantized_and_exported(recipe: Path, tmp_path: Path) -> None:
    tune = "tune: {method: {name: lora, r: 4}, training: {max_steps: 2, batch_size: 4}}"
    steps = f"steps=[{{{tune}}}, {{quantize: {{scheme: W8A16, head: int8}}}}]"
    result = run("slim", recipe, steps, "stop.perplexity=1.05", "export=gguf", "--json")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    first, tuned, quantized = json.loads(result.stdout)["rows"]
    assert tuned["kl"] > 0
    assert quantized["bytes"] < 0.7 * tuned["bytes"]
    # Found by loading: transformers takes no embedding in int8 for one.
    assert first["engines"] == tuned["engines"] == ["slimtune", "transformers", "vLLM (by its format, not tried)"]
    assert quantized["engines"] == ["slimtune"]
    assert json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert (out / "model.gguf").read_bytes()[:4] == b"GGUF"


def test_what_others_read_is_found_by_loading(tmp_path: Path) -> None:
    ids = {"input_ids": torch.arange(3, 40)[None]}
    for number, (config, reads) in enumerate(
        [
            (QuantizeConfig(method="rtn", group_size=32), True),
            (QuantizeConfig("W8A8"), True),
            (QuantizeConfig("W8A16", head="int8"), False),
        ]
    ):
        save_base(tmp_path / f"{number}")
        model, _ = slimtune.load(tmp_path / f"{number}", dtype="float32")
        quantize_(model, config).save_pretrained(tmp_path / f"{number}-quantized")
        assert ("transformers" in engines_of(tmp_path / f"{number}-quantized", model, ids)) == reads
    # A folder that loads and answers otherwise isn't read.
    other = save_base(tmp_path / "other", seed=1)
    assert "transformers" not in engines_of(other, model, ids)


class TestTarget:
    """A recipe by what it is for and how large it may be."""

    @pytest.mark.parametrize("engine", ENGINES)
    def test_the_size_is_what_is_written(self, engine: str, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base")
        whole = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 2  # it is stored in float32
        seen = set()
        for share in (0.9, 0.75, 0.6):
            *pruned, (_, fields) = [
                next(iter(step.items()))
                for step in recipe_for(str(base), engine, f"{share * whole / 1e3:.3f}KB")["steps"]
            ]
            if pruned:
                continue
            config = QuantizeConfig(**fields | {"method": "rtn"})
            model, tokenizer = slimtune.load(base, dtype="bfloat16")
            quantize_(model, config).save_pretrained(tmp_path / f"{share}")
            tokenizer.save_pretrained(tmp_path / f"{share}")
            folder = tmp_path / f"{share}"
            if engine == "llama.cpp":
                export(str(folder), "gguf", tmp_path / f"{share}-gguf", ExportOptions())
                folder = tmp_path / f"{share}-gguf"
            size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
            # Beside the numbers there are names, shapes and a vocabulary, which in so small a model weigh.
            assert size < share * whole + 40_000
            seen.add(str(fields))
        assert seen

    def test_the_command_prints_a_recipe_that_is_whole(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base", num_hidden_layers=4, tie_word_embeddings=True)
        options = ("--for", "cpu", "--under", "0.11MB", "data.train=rows.jsonl", "--output", "small")
        result = run("slim", base, *options)
        assert result.exit_code == 0, result.output
        values = yaml.safe_load(result.stdout)
        assert values["data"]["train"] == "rows.jsonl"
        assert [next(iter(step)) for step in values["steps"]] == ["prune", "distill", "quantize"]
        (tmp_path / "recipe.yaml").write_text(result.stdout)
        assert SlimRecipe.read(tmp_path / "recipe.yaml").output == "small"

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--for", "cpu"), "go together"),
            (("--for", "gpu", "--under", "1MB"), "cpu"),
            (("--for", "cpu", "--under", "small"), "such as 100MB"),
            (("--for", "cpu", "--under", "1GB"), "as it is"),
            (("--for", "cpu", "--under", "1KB"), "no recipe brings"),
        ],
    )
    def test_what_can_not_be(self, options: tuple[str, ...], said: str, tmp_path: Path) -> None:
        result = run("slim", save_base(tmp_path / "base"), *options)
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.output.split())


@pytest.mark.usefixtures("few_texts")
def test_a_step_that_loses_too_much_is_refused_and_a_looser_recipe_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("slim", recipe, "stop.perplexity=1.0")
    assert result.exit_code == 1
    assert "lost too much" in result.output
    assert not (tmp_path / "out").exists()
    pruned = (tmp_path / "out.slim" / "01-prune" / "model.safetensors").stat().st_mtime_ns
    done = pipeline._do

    def only_the_second(kind: str, *arguments: Any) -> None:
        assert kind == "distill"
        done(kind, *arguments)
        assert (tmp_path / "out.slim" / "01-prune" / "model.safetensors").stat().st_mtime_ns == pruned

    monkeypatch.setattr(pipeline, "_do", only_the_second)
    result = run("slim", recipe)
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("few_texts")
def test_a_step_of_zeros_is_told_in_its_row(recipe: Path, tmp_path: Path) -> None:
    distill = "{distill: {method: {name: lora, r: 4}, training: {max_steps: 2, batch_size: 4}}}"
    steps = f"steps=[{{prune: {{weights: {{pattern: 2:4, method: wanda}}}}}}, {distill}]"
    result = run("slim", recipe, steps, "evaluation=null", "--json")
    assert result.exit_code == 0, result.output
    first, second, third = json.loads(result.stdout)["rows"]
    # The zeros stay through the recovery and its merge.
    assert (first["sparsity"], second["sparsity"], third["sparsity"]) == (0.0, 0.5, 0.5)
    assert third["kl"] != second["kl"]
    assert second["bytes"] == first["bytes"]
    assert "| 50.0% |" in (tmp_path / "out" / "slim_report.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["steps=[{prune: {weights: {sparsity: 1.5}}}]"], "sparsity must be a number"),
        (["steps=[{prune: {weights: {sparsty: 0.5}}}]"], "did you mean 'sparsity'"),
        (["steps=[{prun: {layers: 1}}]"], "did you mean 'prune'"),
        (["steps=[{prune: {layer: 1}}]"], "did you mean 'layers'"),
        (["steps=[{distill: {beta: 3}}]"], "from 0 to 1"),
        (["steps=[]"], "steps is empty"),
        (["steps=[{quantize: {scheme: W4A15}}]"], "did you mean 'W4A16'"),
        (["steps=[{quantize: {}}, {prune: {layers: 2}}]"], "prune can't follow quantize"),
        (["steps=[{quantize: {}}, {quantize: {}}]"], "quantize can't follow quantize"),
        (["steps=[{quantize: {}}, {distill: {}}]"], "distill can't follow quantize"),
        (["steps=[{tune: {beta: 1}}]"], "tune has no beta"),
        (["export=onnx"], "export"),
        (["stop.task=0.5"], "from -1 to 0"),
        (["stop.perplexity=0.5"], "stop.perplexity"),
        (["data.held_out=0"], "nothing is held out"),
        (["evaluation=null", "stop.task=-0.1"], "needs a score"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str
) -> None:
    monkeypatch.setattr(pipeline, "slim", lambda *a: pytest.fail("it ran"))
    result = run("slim", recipe, *overrides)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize("layers", [[3], [2, 2], [0]])
def test_layers_out_of_range_are_found_before_anything_is_measured(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: list[int]
) -> None:
    monkeypatch.setattr(pipeline, "measured", lambda *a: pytest.fail("it measured"))
    steps = ", ".join(f"{{prune: {{layers: {count}}}}}" for count in layers)
    result = run("slim", recipe, f"steps=[{steps}]")
    assert result.exit_code == 2, result.output
    assert "layers says how many are left" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_whole(name: str, tmp_path: Path) -> None:
    printed = run("slim", name, "--example")
    (tmp_path / "recipe.yaml").write_text(printed.stdout)
    assert SlimRecipe.read(tmp_path / "recipe.yaml").steps
