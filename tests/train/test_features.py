"""Features of a frozen model: right, computed once, and a classifier on them."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from slimtune import LoraConfig, get_peft_model
from slimtune.data.features import FeatureClassifier, FeatureTuning, extract, is_feature_classifier
from slimtune.errors import AdapterFileError, ConfigError, DataError, MissingDependencyError
from small_encoder import encoder, encoder_tokenizer, reviews
from small_text_model import tiny_model, tiny_tokenizer

TOKENIZER = encoder_tokenizer()
TEXTS = [row["text"] for row in reviews(20)]
LABELS = [row["label"] for row in reviews(20)]


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """The sizes of the batches that a real model computes."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args, kw: seen.append(len(kw["input_ids"])), with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_batch_gives_what_each_text_gives_alone(pooling: str, padding_side: str) -> None:
    model, tokenizer = encoder(), encoder_tokenizer()
    found = extract(model, tokenizer, TEXTS, pooling, batch_size=7)
    tokenizer.padding_side = padding_side
    if padding_side == "right":
        again = extract(model, tokenizer, TEXTS, pooling, batch_size=3)
        torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-5)
    for text, feature in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_padded_on_the_left_is_read_at_its_last_token() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.padding_side = "left"
    found = extract(model, tokenizer, TEXTS[:5], "last")
    for text, feature in zip(TEXTS[:5], found, strict=True):
        with torch.no_grad():
            hidden = model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        torch.testing.assert_close(feature, hidden, rtol=1e-4, atol=1e-4)


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    model = encoder()
    with forwards(model) as seen:
        first = extract(model, TOKENIZER, TEXTS, batch_size=8, cache=tmp_path)
        assert sorted(seen) == [4, 8, 8]
        seen.clear()
        second = extract(encoder(), TOKENIZER, TEXTS, batch_size=5, cache=tmp_path)
        assert extract(model, TOKENIZER, TEXTS, cache=tmp_path).equal(first)
        assert seen == []
    assert torch.equal(first, second)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def changed_weight() -> Any:
    model = encoder()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[3] += 1e-6
    return model


def adapted() -> Any:
    return get_peft_model(encoder(), LoraConfig(r=2, init_lora_weights=False))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (changed_weight, {}),
        (adapted, {}),
        (lambda: encoder(layer_norm_eps=1e-3), {}),
        (lambda: encoder().bfloat16(), {}),
        (encoder, {"texts": TEXTS[:-1]}),
        (encoder, {"texts": TEXTS[::-1]}),
        (encoder, {"pooling": "cls"}),
        (encoder, {"max_length": 5, "too_long": "truncate"}),
    ],
)
def test_whatever_changes_the_features_is_computed_anew(model: Any, options: Any, tmp_path: Path) -> None:
    extract(encoder(), TOKENIZER, TEXTS, cache=tmp_path)
    other, settings = model(), {"texts": TEXTS, **options}
    with forwards(other) as seen:
        found = extract(other, TOKENIZER, cache=tmp_path, **settings)
        assert seen
    assert torch.equal(found, extract(other, TOKENIZER, **settings))


def test_an_adapter_that_is_switched_off_gives_the_features_of_the_base(tmp_path: Path) -> None:
    model = adapted()
    on = extract(model, TOKENIZER, TEXTS, cache=tmp_path)
    with model.disable_adapter():
        off = extract(model, TOKENIZER, TEXTS, cache=tmp_path)
    torch.testing.assert_close(off, extract(encoder(), TOKENIZER, TEXTS))
    assert not torch.allclose(on, off)


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_cache_is_computed_again_with_a_note(damage: Any, tmp_path: Path) -> None:
    first = extract(encoder(), TOKENIZER, TEXTS, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(extract(encoder(), TOKENIZER, TEXTS, cache=tmp_path), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(encoder(), TOKENIZER, TEXTS, cache=tmp_path)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = encoder().train()
    extract(model, TOKENIZER, TEXTS)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"texts": []}, DataError),
        ({"pooling": "maximum"}, ConfigError),
        ({"batch_size": 0}, ConfigError),
        ({"too_long": "drop"}, ConfigError),
        ({"max_length": 4}, DataError),
        ({"texts": ["film " * 40]}, DataError),
    ],
)
def test_what_can_not_be(options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        extract(encoder(), TOKENIZER, **{"texts": TEXTS} | options)


def features(labels: int) -> tuple[torch.Tensor, list[str], list[str]]:
    """Points around one centre for each label, with one feature that never changes."""
    names = ["a", "b", "c"][:labels]
    target = [names[i % labels] for i in range(60)]
    f_ND = torch.randn(60, 5) * 3 + torch.tensor([[2.0 * names.index(label)] * 5 for label in target])
    f_ND[:, 2] = 7.0
    return f_ND, target, names


@pytest.mark.parametrize("labels", [2, 3])
def test_both_solvers_find_the_same_optimum(labels: int) -> None:
    f_ND, target, names = features(labels)
    by_name = {
        solver: FeatureClassifier.fit(f_ND, target, names, FeatureTuning(solver=solver), "base", 32)
        for solver in ("sklearn", "torch")
    }
    torch.testing.assert_close(by_name["sklearn"].weight, by_name["torch"].weight, rtol=1e-2, atol=1e-3)
    standardised = (f_ND - f_ND.mean(0)) / f_ND.std(0, correction=0).clamp_min(1e-9)
    expected = LogisticRegression().fit(standardised, target).predict_proba(standardised)
    for classifier in by_name.values():
        found = classifier.probabilities(f_ND)
        torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-2, atol=2e-3)


def test_it_is_stored_without_a_pickle_and_read_again(tmp_path: Path) -> None:
    f_ND, target, names = features(3)
    classifier = FeatureClassifier.fit(f_ND, target, names, FeatureTuning(), "base", 32)
    classifier.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"features.json", "classifier.safetensors"}
    assert is_feature_classifier(tmp_path / "out")
    again = FeatureClassifier.load(tmp_path / "out")
    assert torch.equal(again.probabilities(f_ND), classifier.probabilities(f_ND))
    assert (again.labels, again.base, again.pooling, again.max_length) == (names, "base", "mean", 32)
    assert sum(a == b for a, b in zip(again.predict(f_ND), target, strict=True)) > 30


@pytest.mark.parametrize("damage", ["json", "field", "label", "weights", "gone"])
def test_a_damaged_classifier(damage: str, tmp_path: Path) -> None:
    f_ND, target, names = features(3)
    FeatureClassifier.fit(f_ND, target, names, FeatureTuning(), "base", 32).save(tmp_path)
    facts, weights = tmp_path / "features.json", tmp_path / "classifier.safetensors"
    stored = json.loads(facts.read_text())
    if damage in ("weights", "gone"):
        weights.write_bytes(weights.read_bytes()[:-8]) if damage == "weights" else weights.unlink()
    else:
        damaged = {"json": "{", "field": json.dumps({"labels": names}), "label": json.dumps(stored | {"labels": ["a"]})}
        facts.write_text(damaged[damage])
    with pytest.raises(AdapterFileError):
        FeatureClassifier.load(tmp_path)


@pytest.mark.parametrize(
    "options", [{"pooling": "max"}, {"solver": "numpy"}, {"strength": 0}, {"strength": -1.0}, {"max_iter": 0}]
)
def test_settings_that_can_not_be(options: Any) -> None:
    with pytest.raises(ConfigError):
        FeatureTuning(**options)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    f_ND, target, names = features(2)
    with pytest.raises(MissingDependencyError, match=r"slimtune\[features\]"):
        FeatureClassifier.fit(f_ND, target, names, FeatureTuning(), "base", 32)
    assert FeatureClassifier.fit(f_ND, target, names, FeatureTuning(solver="torch"), "base", 32)


def test_the_command_computes_the_features_of_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from slimtune.cli import app
    from small_encoder import save_encoder
    from small_text_model import write_lines

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, data = save_encoder(tmp_path / "base"), write_lines(tmp_path / "rows.jsonl", *reviews(20))
    command = ["train", str(base), str(data), "--method", "features", "--overwrite", "-o", str(tmp_path / "out")]
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "cache" / "slimtune" / "features").iterdir()
    assert load_file(file)["features"].shape == (20, 32)
