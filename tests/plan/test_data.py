"""The user's own data: lengths as training sees them, padding, packing, what is cut."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import slimtune.data.encode as encode_module
from slimtune.data.chat_template import use_template
from slimtune.data.encode import encode
from slimtune.data.lengths import Lengths
from slimtune.data.reading import read_rows
from slimtune.data.settings import DataSettings
from slimtune.data.tasks import causal_lm
from slimtune.data.tasks.registry import read
from slimtune.errors import ConfigError, DataError
from slimtune.models.load import load_tokenizer
from slimtune.plan.data import measure, measure_read, uniform
from small_text_model import orders, tiny_model, tiny_tokenizer, write_lines

LENGTHS = Lengths((3, 5, 8, 8, 13, 20), learned=30)


def test_conversations_are_measured_as_they_are_trained(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "orders.jsonl", *({"messages": e.messages()} for e in orders(30)))
    tokenizer = tiny_tokenizer()
    prepared = encode(read_rows(path), tokenizer, 1024)
    found = measure(path, tokenizer).lengths
    assert (found.examples, found.total, found.longest) == (30, prepared.tokens, prepared.longest)
    assert found.learned == prepared.learned < found.total
    assert list(found.tokens) == sorted(found.tokens)


def test_planning_and_training_encode_the_rows_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "orders.jsonl", *({"messages": e.messages()} for e in orders(5)))
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    counted: list[int] = []

    def encode_whole(rows: list[Any], *args: Any) -> Any:
        counted.append(len(rows))
        return encode_module.encode_whole(rows, *args)

    monkeypatch.setattr(causal_lm, "encode_whole", encode_whole)
    data = read(settings := DataSettings(path))
    # Each loads the tokenizer for itself.
    planned, trained = (load_tokenizer(str(tmp_path / "model")) for _ in range(2))
    lengths = measure_read(data, settings, planned).lengths
    assert lengths.total == sum(len(e.input_ids) for e in data.encode(tiny_model(), trained).examples)
    assert counted == [5]
    # Under another template the same rows are others.
    use_template(trained, "plain")
    assert measure_read(data, settings, trained).lengths.total != lengths.total
    assert counted == [5, 5]


def test_texts_with_labels(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"text": "a", "label": "x"}, {"text": "many more of them", "label": 1})
    found = measure(path, tiny_tokenizer()).lengths
    assert found.labels == ("1", "x")
    assert found.learned == 2
    assert found.tokens[0] < found.tokens[1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "no answer"}]}, "no assistant turn"),
        ({"promt": "x", "completion": "y"}, "did you mean 'prompt'"),
        ({"text": "x", "lable": "y"}, "did you mean 'label'"),
        ({"answer": "y"}, "messages needs messages; .* prompt-completion needs prompt and completion"),
    ],
)
def test_data_without_the_needed_fields(tmp_path: Path, row: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        measure(write_lines(tmp_path / "rows.jsonl", row), tiny_tokenizer())


def test_percentiles_and_what_is_cut() -> None:
    assert [LENGTHS.percentile(share) for share in (1, 50, 90, 100)] == [3, 8, 20, 20]
    assert LENGTHS.over(8) == 2
    cut = LENGTHS.within(8)
    assert (cut.longest, cut.total) == (8, 40)
    assert cut.learned == round(30 * 40 / 57)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 6, 99])
def test_padding_is_the_mean_over_all_batches(batch_size: int) -> None:
    size = min(batch_size, 6)
    longest = [max(batch) for batch in itertools.combinations(LENGTHS.tokens, size)]
    assert LENGTHS.padded(batch_size) == pytest.approx(6 * sum(longest) / len(longest))
    assert LENGTHS.padding_waste(batch_size) == pytest.approx(1 - 57 / LENGTHS.padded(batch_size))


def test_examples_of_one_length_need_no_padding() -> None:
    assert uniform(100, 50).padding_waste(8) == pytest.approx(0)
    assert uniform(100, 50).packing_gain(100, 8) == pytest.approx(1)


def test_packing_fills_rows() -> None:
    assert LENGTHS.packed_rows(20) == 3
    assert LENGTHS.packed_rows(29) == 2
    assert LENGTHS.packing_gain(29, 2) == pytest.approx(LENGTHS.padded(2) / 58)


@pytest.mark.parametrize("wrong", [0, -4, 2.5])
def test_settings_that_cannot_be(wrong: float) -> None:
    with pytest.raises(ConfigError, match=str(wrong)):
        LENGTHS.padded(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=str(wrong)):
        LENGTHS.within(wrong)  # type: ignore[arg-type]
