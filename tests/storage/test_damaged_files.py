"""A file that is not what it claims to be is refused with a sentence that says so, and the model stays as it was."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import slimtune
from slimtune.core import patterns
from slimtune.errors import AdapterFileError, BaseMismatchError, ConfigError, SlimtuneError
from tensors import assert_same, copies, predict, randomize
from zoo import GPT2, LLAMA, llama

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Damage = Callable[[Path], Any]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()))
    randomize(slimtune, model).save_pretrained(tmp_path)
    return tmp_path


def refusal(folder: Path, model: Any = None) -> SlimtuneError:
    """The error on loading; the model has no trace of the attempt."""
    model = LLAMA.model() if model is None else model
    cls, before = type(model), {name: id(p) for name, p in model.named_parameters()}
    trainable = [p.requires_grad for p in model.parameters()]
    batch = LLAMA.batch()
    expected = predict(model, batch)
    with pytest.raises(SlimtuneError) as caught:
        slimtune.PeftModel.from_pretrained(model, folder)
    assert type(model) is cls
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(predict(model, batch), expected)
    message = str(caught.value)
    assert len(message) > 30
    assert "\n" not in message
    return caught.value


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """As another writer would leave the file: without our checksum."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def rewrite_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def flip_a_bit(position: int) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[position] ^= 1
        (folder / WEIGHTS).write_bytes(content)

    return damage


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "weights-cut-in-the-tensors": (cut(WEIGHTS, 0.7), WEIGHTS),
    "weights-cut-in-the-header": (cut(WEIGHTS, 0.02), WEIGHTS),
    "weights-cut-by-a-byte": (cut(WEIGHTS, 0.99999), WEIGHTS),
    "weights-of-no-bytes": (cut(WEIGHTS, 0), WEIGHTS),
    "weights-without-tensors": (lambda folder: save_file({}, folder / WEIGHTS), WEIGHTS),
    "weights-with-a-flipped-bit": (flip_a_bit(-3), "checksum"),
    "weights-with-a-flipped-bit-elsewhere": (flip_a_bit(-4001), "checksum"),
    "weights-that-are-text": (lambda folder: (folder / WEIGHTS).write_text("<html>404</html>"), WEIGHTS),
    "weights-with-a-huge-header": (huge_header, WEIGHTS),
    "weights-gone": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "weights-that-are-a-folder": (lambda folder: become_a_folder(folder / WEIGHTS), WEIGHTS),
    "config-cut": (cut(CONFIG, 0.5), CONFIG),
    "config-of-no-bytes": (cut(CONFIG, 0), CONFIG),
    "config-that-is-a-list": (lambda folder: (folder / CONFIG).write_text("[1]"), CONFIG),
    "config-that-is-not-text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), CONFIG),
    "config-gone": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
}


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_refused(case: str, adapter: Path) -> None:
    damage, word = DAMAGES[case]
    damage(adapter)
    error = refusal(adapter)
    assert isinstance(error, AdapterFileError)
    assert word in str(error)


@pytest.mark.parametrize("case", DAMAGES)
def test_a_refused_second_adapter_leaves_the_first(case: str, adapter: Path, tmp_path_factory: Any) -> None:
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), adapter)
    expected = predict(model, LLAMA.batch())
    names = [name for name, _ in model.named_parameters()]
    DAMAGES[case][0](adapter)
    for attempt in (
        lambda: model.load_adapter(adapter, "second"),
        lambda: model.load_adapter(adapter, "default"),
    ):
        with pytest.raises(AdapterFileError):
            attempt()
        assert list(model.peft_config) == ["default"]
        assert [name for name, _ in model.named_parameters()] == names
        assert torch.equal(predict(model, LLAMA.batch()), expected)


def test_a_pickle_is_refused_and_not_run(adapter: Path) -> None:
    """What peft still reads: a file that runs code when it is read."""
    marker = adapter / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    (adapter / WEIGHTS).unlink()
    torch.save({"payload": Payload()}, adapter / "adapter_model.bin")
    error = refusal(adapter)
    assert isinstance(error, AdapterFileError)
    assert "pickle" in str(error)
    assert not marker.exists()


def test_writing_a_pickle_is_refused(tmp_path: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()))
    with pytest.raises(ConfigError, match="safe"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.iterdir()) == []


FOREIGN_BASES: dict[str, Callable[[], Any]] = {
    "wider": lambda: llama(hidden_size=64, num_attention_heads=8),
    "fewer-layers": lambda: llama(num_hidden_layers=1),
    "more-layers": lambda: llama(num_hidden_layers=3),
    "other-heads": lambda: llama(num_key_value_heads=4),
    "other-architecture": GPT2.model,
}


@pytest.mark.parametrize("base", FOREIGN_BASES)
def test_an_adapter_for_another_base_is_refused(base: str, adapter: Path) -> None:
    error = refusal(adapter, FOREIGN_BASES[base]())
    assert isinstance(error, BaseMismatchError | slimtune.errors.TargetError)


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a tensor lost": lambda tensors: tensors.pop(max(tensors)),
    "half a pair lost": lambda tensors: [tensors.pop(key) for key in list(tensors) if "lora_B" in key],
    "a tensor too many": lambda tensors: tensors.update(
        {"base_model.model.model.nowhere.lora_A.weight": torch.ones(1)}
    ),
    "another shape": lambda tensors: tensors.update({max(tensors): torch.ones(3, 3)}),
    "transposed": lambda tensors: tensors.update({max(tensors): tensors[max(tensors)].t().contiguous()}),
    "another prefix": lambda tensors: [tensors.update({f"other.{key}": tensors.pop(key)}) for key in list(tensors)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_are_refused_by_name(change: str, adapter: Path) -> None:
    rewrite_tensors(adapter, CHANGES[change])
    error = refusal(adapter)
    assert isinstance(error, BaseMismatchError)
    assert "lora_" in str(error)


KINDS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "NaN": (lambda tensor: tensor.clone().index_fill_(0, torch.tensor([1]), float("nan")), "infinite or NaN"),
    "infinite": (lambda tensor: tensor / 0, "infinite or NaN"),
    "infinite in 8 bits": (lambda tensor: torch.full_like(tensor, torch.inf).to(torch.float8_e5m2), "infinite or NaN"),
    "whole numbers": (lambda tensor: tensor.to(torch.int32), "torch.int32"),
    "truth values": (lambda tensor: tensor > 0, "torch.bool"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "torch.complex64"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_no_training_leaves_are_refused_by_name(kind: str, adapter: Path) -> None:
    change, words = KINDS[kind]
    rewrite_tensors(adapter, lambda tensors: tensors.update({max(tensors): change(tensors[max(tensors)])}))
    message = str(refusal(adapter))
    assert words in message
    assert max(load_file(adapter / WEIGHTS)) in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_is_read(dtype: torch.dtype, adapter: Path) -> None:
    expected = {key: tensor.to(dtype).float() for key, tensor in load_file(adapter / WEIGHTS).items()}
    rewrite_tensors(adapter, lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), adapter)
    assert_same(copies(slimtune.get_peft_model_state_dict(model)), expected)


def test_finite_numbers_of_an_infinite_sum_are_read(adapter: Path) -> None:
    rewrite_tensors(adapter, lambda tensors: tensors.update({k: torch.full_like(t, 3e38) for k, t in tensors.items()}))
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), adapter)
    assert all((tensor == 3e38).all() for tensor in slimtune.get_peft_model_state_dict(model).values())


ENDLESS = r"(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(?=[^\x00-\xff])"
FIELDS = ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]


@pytest.mark.parametrize("expression", [ENDLESS, "(unclosed"], ids=["endless", "unclosed"])
@pytest.mark.parametrize("field", FIELDS)
def test_an_expression_that_cannot_be_matched_is_refused(
    field: str, expression: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    patterns.compiled.cache_clear()
    value: Any = {expression: 4} if field in ("rank_pattern", "alpha_pattern") else expression
    rewrite_config(adapter, **{field: value}, **({"layers_to_transform": [0]} if field == "layers_pattern" else {}))
    message = str(refusal(adapter))
    patterns.compiled.cache_clear()
    assert "takes longer than" in message if expression == ENDLESS else "is no regular expression" in message


def test_a_rank_in_the_config_that_is_not_the_file_s_is_refused(adapter: Path) -> None:
    rewrite_config(adapter, r=8)
    assert isinstance(refusal(adapter), BaseMismatchError)


@pytest.mark.parametrize(
    "changes", [{"use_qalora": True}, {"layer_replication": [[0, 2], [0, 2]]}, {"r": -1}, {"r": "many"}]
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], adapter: Path) -> None:
    rewrite_config(adapter, **changes)
    error = refusal(adapter)
    assert isinstance(error, ConfigError)
    assert next(iter(changes)) in str(error)


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", "/tmp/x", "a\x00b", "", "a.b", "a\\b", "__base__", "keys"])
def test_an_adapter_name_cannot_leave_its_folder(name: str, tmp_path: Path) -> None:
    model = LLAMA.model()
    with pytest.raises(ConfigError):
        slimtune.get_peft_model(model, slimtune.LoraConfig(r=4, **LLAMA.options()), adapter_name=name)
    assert type(model) is type(LLAMA.model())
    model = slimtune.get_peft_model(model, slimtune.LoraConfig(r=4, **LLAMA.options()))
    with pytest.raises(ConfigError):
        model.add_adapter(name, slimtune.LoraConfig(r=4, **LLAMA.options()))
    assert list(model.peft_config) == ["default"]


def test_a_missing_folder_and_a_file_are_told_apart(tmp_path: Path) -> None:
    assert "nowhere" in str(refusal(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    assert "file" in str(refusal(tmp_path / "file"))


def test_a_whole_model_is_not_taken_for_an_adapter(tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert isinstance(error, AdapterFileError)
    assert "adapter" in str(error)


def test_adapters_in_subfolders_are_pointed_out(tmp_path: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()), "formal")
    model.save_pretrained(tmp_path)
    assert "formal" in str(refusal(tmp_path))


def test_a_file_of_peft_without_a_checksum_is_read(tmp_path: Path) -> None:
    theirs = randomize(peft, peft.get_peft_model(LLAMA.model(), peft.LoraConfig(r=4, **LLAMA.options())))
    theirs.save_pretrained(tmp_path)
    ours = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
    assert_same(copies(slimtune.get_peft_model_state_dict(ours)), copies(peft.get_peft_model_state_dict(theirs)))
