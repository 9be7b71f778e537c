"""A recipe: strict, with defaults filled in, changed by overrides, written in full and read again the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimtune.errors import ConfigError
from slimtune.recipe.method import FULL, methods
from slimtune.recipe.recipe import Recipe, overridden
from slimtune.storage.text_files import MAX_BYTES, dump, parse, read_mapping

LEAST: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": "d.jsonl"}}


def test_defaults_are_filled_in() -> None:
    recipe = Recipe.of(LEAST)
    assert (recipe.method.name, recipe.output, recipe.task) == ("lora", "tuned", "auto")
    config = recipe.method.config()
    assert (config.r, config.lora_alpha) == (16, 32)
    assert recipe.training.learning_rate == config.learning_rate
    assert Recipe.of(LEAST | {"method": {"name": FULL}}).training.learning_rate == 2e-5
    assert Recipe.of(LEAST | {"training": {"learning_rate": None}}).training.learning_rate == config.learning_rate


@pytest.mark.parametrize("name", sorted(methods()))
def test_what_is_written_is_read_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = Recipe.of(LEAST | {"method": {"name": name}})
    recipe.write(tmp_path / "recipe.yaml")
    again = Recipe.read(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.method.config() == recipe.method.config()
    assert set(again.method.fields) == set(methods()[name].fields)


def test_fields_of_every_shape_are_written_and_read(tmp_path: Path) -> None:
    fields = {
        "name": "lora", "target_modules": ["v_proj", "q_proj"], "rank_pattern": {"q_proj": 4}, "lora_alpha": 3,
        "init_lora_weights": "eva", "eva_config": {"rho": 1.5}, "layers_to_transform": [0, 1], "lora_dropout": 1e-3,
    }  # fmt: skip
    sources = [{"path": "a.jsonl", "weight": 0.25, "fields": {"prompt": "q"}}, {"path": "2026-01-31", "weight": 1}]
    recipe = Recipe.of({"model": {"name": "1e3"}, "data": {"train": sources, "held_out": ["b"]}, "method": fields})
    recipe.write(tmp_path / "recipe.yaml")
    assert Recipe.read(tmp_path / "recipe.yaml") == recipe
    assert recipe.method.config().rank_pattern == {"q_proj": 4}
    assert recipe.method.config().eva_config.rho == 1.5
    assert recipe.model.name == "1e3"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modle": {}}, "unknown key modle; did you mean 'model'?"),
        ({"training": {"learnin_rate": 1}}, "unknown key training.learnin_rate; did you mean 'learning_rate'?"),
        ({"training": {"zzz": 1}}, "unknown key training.zzz; there are "),
        ({"training": {"epochs": "three"}}, 'training.epochs takes a number, found "three"'),
        ({"training": {"batch_size": True}}, "training.batch_size takes a whole number, found true"),
        ({"training": {"batch_size": "8"}}, 'training.batch_size takes a whole number, found "8"'),
        ({"training": {"learning_rate": -1}}, "learning_rate must be above 0"),
        ({"training": {"scheduler": "cosin"}}, "did you mean 'cosine'?"),
        ({"training": []}, "training takes a mapping, found []"),
        ({"model": "smollm"}, 'model takes a mapping, found "smollm"'),
        ({"model": {}}, "model.name is missing"),
        ({"model": {"name": "m", "dtype": "bfloat61"}}, "did you mean 'bfloat16'?"),
        ({"model": {"name": "m", "quantize": "nf5"}}, "did you mean 'nf4'?"),
        ({"data": {"train": "x", "too_long": "cut"}}, "too_long"),
        ({"data": {"train": [{"path": "x", "wieght": 1}]}}, "did you mean 'weight'?"),
        ({"data": {}}, "data.train is missing"),
        ({"task": "txt"}, "found \"txt\"; did you mean 'text'?"),
        ({"output": ""}, "output is empty"),
        ({"output": 3}, "output takes a text, found 3"),
        ({"method": "lora"}, "method: {name: lora}"),
        ({"method": {"name": "lorra"}}, "did you mean 'lora'?"),
        ({"method": {"name": 3}}, "no method '3'"),
        ({"method": {"name": "lora", "lora_alfa": 3}}, "unknown key method.lora_alfa"),
        ({"method": {"name": "lora", "lora_alfa": 3}}, "did you mean 'lora_alpha'?"),
        ({"method": {"name": "lora", "rank": 3}}, "did you mean 'r'?"),
        ({"method": {"name": "lora", "r": "8"}}, 'method.r takes a whole number, found "8"'),
        ({"method": {"name": "dora", "use_dora": False}}, "what makes dora what it is"),
        ({"method": {"name": "ia3", "r": 3}}, "ia3 has no such field"),
        ({"method": {"name": "full"}, "model": {"name": "m", "quantize": "nf4"}}, "codes can't be trained"),
        ({"method": {"name": "ia3"}, "training": {"lora_plus_ratio": 4}}, "would change nothing with ia3"),
        ({"method": {"name": "features"}, "training": {"epochs": 5}}, "training.epochs would change nothing"),
    ],
    ids=str,
)
def test_a_mistake_is_said_with_its_place(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Recipe.of(LEAST | changes)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "is a list"),
        ("just words", "is a str"),
        ("a: [", "line 1 is not YAML"),
        ("a: 1\nb: 2\na: 3\n", "line 3 is not YAML: the key 'a' is there twice"),
        ("a:\n  b: 1\n  b: 1\n", "line 3 is not YAML: the key 'b' is there twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: !!python/object/apply:os.system [true]\n", "line 1 is not YAML"),
        ("a: {b: " * 3000, "is not YAML"),
        ("#" * (MAX_BYTES + 1), "1,000,000 bytes"),
    ],
)
def test_files_that_hold_no_recipe(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_mapping(tmp_path / "recipe.yaml")


def test_files_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00a: 1")
    with pytest.raises(ConfigError, match="not YAML text"):
        read_mapping(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match=r"did you mean 'recipe\.yaml'\?"):
        read_mapping(tmp_path / "recpie.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        read_mapping(tmp_path)


def test_overrides_reach_every_place() -> None:
    given = LEAST | {"data": {"train": [{"path": "a"}, {"path": "b"}]}}
    overrides = [
        "training.learning_rate=1e-4", "method.rank_pattern.q_proj=2", "data.train.1.path=c=d", "output=there",
        "training.max_steps=", "method.target_modules=[q_proj, v_proj]", "model.name=2026-01-31",
    ]  # fmt: skip
    recipe = Recipe.of(overridden(given, overrides))
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.max_steps is None
    assert recipe.method.config().rank_pattern == {"q_proj": 2}
    assert recipe.method.config().target_modules == {"q_proj", "v_proj"}
    assert [source.path for source in recipe.data.train] == ["a", "c=d"]
    assert (recipe.output, recipe.model.name) == ("there", "2026-01-31")
    assert given["data"] == {"train": [{"path": "a"}, {"path": "b"}]}


def test_a_section_is_overridden_as_a_whole() -> None:
    recipe = Recipe.of(overridden(LEAST | {"method": {"name": "lora", "r": 3}}, ["method={name: full}"]))
    assert recipe.method.name == "full"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.epochs", "section.key=value"),
        ("=3", "section.key=value"),
        ("training.=3", "section.key=value"),
        ("training.epohcs=3", "did you mean 'epochs'?"),
        ("trainig.epochs=3", "did you mean 'training'?"),
        ("training.epochs=[", "not YAML"),
        ("training.epochs.x=1", "training.epochs"),
        ("data.train.0=1", "can't be set"),
    ],
)
def test_overrides_that_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Recipe.of(overridden(LEAST, [override]))
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "value",
    [1e-4, 2e-5, 1e22, "1e-4", "1.5", "yes", "null", "2026-01-31", "", "a: b", "#x", "*a", "2:4", [], {}, None, True],
)
def test_what_is_dumped_is_parsed_as_it_was(value: Any) -> None:
    assert parse(dump({"key": value})) == {"key": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("3", 3), ("-12", -12), ("0x1f", 31), (".5", 0.5), ("2026-01-31", "2026-01-31"), ("2:4", "2:4"),
    ],
)  # fmt: skip
def test_numbers_are_numbers(text: str, value: Any) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)
