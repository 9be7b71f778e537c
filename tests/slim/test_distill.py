"""Distillation as a user runs it: on tiny models, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from slimtune.cli import app
from slimtune.recipe.recipe import Recipe
from small_encoder import reviews, save_encoder
from small_text_model import orders, save_base, tiny_model, write_lines

FAST = ("--batch-size", 4, "--no-plan")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: Any) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def curve(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "loss.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, student and data."""
    folder = tmp_path_factory.mktemp("models")
    save_base(folder / "teacher", seed=1)
    save_base(folder / "student", num_hidden_layers=1)
    write_lines(folder / "orders.jsonl", *({"messages": e.messages()} for e in orders(16)))
    return folder


def command(folder: Path, output: Path, *more: Any) -> list[Any]:
    return ["distill", folder / "teacher", folder / "student", "--data", folder / "orders.jsonl", "-o", output, *FAST,
            *more]  # fmt: skip


def kl_to_teacher(folder: Path, student: Any) -> float:
    """Of all tokens of the data, by the plain formula."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    texts = [tokenizer.apply_chat_template(e.messages(), return_tensors="pt")["input_ids"] for e in orders(4)]
    with torch.no_grad():
        pairs = [(teacher(ids).logits.log_softmax(-1), student(ids).logits.float().log_softmax(-1)) for ids in texts]
    return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(pairs)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_the_student_comes_near_its_teacher(folder: Path, tmp_path: Path, beta: float) -> None:
    more = [
        "--beta",
        beta,
        "--alpha",
        1,
        "--method",
        "full",
        "--lr",
        0.003,
        "--max-steps",
        30,
        "training.scheduler=constant",
    ]
    done(*command(folder, tmp_path / "out", *more))
    before = kl_to_teacher(folder, AutoModelForCausalLM.from_pretrained(folder / "student"))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # The reverse divergence leaves out what the teacher rarely says, and the forward one counts that most.
    assert kl_to_teacher(folder, student) < (before if beta == 1 else 0.75 * before)
    losses = curve(tmp_path / "out")
    assert losses[-1] < 0.75 * losses[0]


def test_stored_tokens_give_nearly_the_loss_of_the_teacher_beside(folder: Path, tmp_path: Path) -> None:
    """Never above it, for the rest is one outcome; a random teacher spreads over all of its 512 tokens."""
    fast = ["--alpha", 1, "--max-steps", 2, "--rank", 4]
    done(*command(folder, tmp_path / "beside", *fast, "--top-k", 0))
    done(*command(folder, tmp_path / "stored", *fast, "--top-k", 400))
    for stored, beside in zip(curve(tmp_path / "stored"), curve(tmp_path / "beside"), strict=True):
        assert 0.98 * beside < stored <= beside * 1.001


def test_the_cache_is_used_again_and_damage_is_refused(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from slimtune.slim import cache as module

    cached = tmp_path / "answers"
    fast = ["--max-steps", 1, "--rank", 4, "--cache", cached, "--top-k", 64]
    done(*command(folder, tmp_path / "one", *fast))
    (shard,) = cached.glob("*/*.safetensors")
    learned = sum(json.loads((shard.parent / "manifest.json").read_text())["shards"][0]["counts"])
    assert load_file(shard)["ids"].shape == (learned, 64)
    assert shard.stat().st_size <= 400 * learned
    with monkeypatch.context() as patch:
        patch.setattr(module, "_ask", lambda *a: pytest.fail("the teacher was asked again"))
        done(*command(folder, tmp_path / "two", *fast, "--beta", 1))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    result = run(*command(folder, tmp_path / "three", *fast))
    assert result.exit_code == 2
    assert "is damaged" in result.output
    assert not (tmp_path / "three").exists()


def test_a_teacher_whose_answers_are_stored_is_not_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimtune.slim import distill as module

    # Wider than the teacher, as an embedding padded to whole blocks: what both have is known from the cache alone.
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    student.resize_token_embeddings(student.config.vocab_size + 8)
    student.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(folder / "student").save_pretrained(tmp_path / "student")
    arguments = ["distill", folder / "teacher", tmp_path / "student", "--data", folder / "orders.jsonl", *FAST,
                 "--max-steps", 2, "--rank", 4, "--cache", tmp_path / "answers"]  # fmt: skip
    done(*arguments, "-o", tmp_path / "one")
    monkeypatch.setattr(module, "load_model", lambda *a: pytest.fail("the teacher was loaded"))
    done(*arguments, "-o", tmp_path / "two")
    assert curve(tmp_path / "one") == curve(tmp_path / "two")


def test_a_cache_that_was_broken_off_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtune.slim import cache as module

    monkeypatch.setattr(module, "SHARD_TOKENS", 100)
    fast = ["--max-steps", 1, "--rank", 4]
    done(*command(folder, tmp_path / "whole", *fast, "--cache", tmp_path / "a"))
    ask, calls = module._ask, []

    def breaks(*arguments: Any) -> Any:
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(*arguments)

    monkeypatch.setattr(module, "_ask", breaks)
    assert run(*command(folder, tmp_path / "out", *fast, "--cache", tmp_path / "b")).exit_code == 130
    first = sum(calls[:2])
    done(*command(folder, tmp_path / "out", *fast, "--cache", tmp_path / "b"))
    assert sum(calls[3:]) == 16 - first
    (one,), (other,) = (list((tmp_path / name).iterdir()) for name in "ab")
    shards = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(shards) > 2
    for name in shards:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_resumed_distillation_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    from slimtune.train.run_folder import folder_of

    more = ["--max-steps", 6, "--rank", 4, "training.save_steps=2", "--lmbda", 0.5, "--max-new-tokens", 6]
    done(*command(folder, tmp_path / "whole", *more))
    import slimtune.train.progress as progress

    original, steps = progress.LossLog.on_log, []

    def stops(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        steps.append(state.global_step)
        if state.global_step == 5 and len(steps) <= 6:
            raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.LossLog, "on_log", stops)
        assert run(*command(folder, tmp_path / "out", *more)).exit_code == 1
    assert folder_of(tmp_path / "out").is_dir()
    done(*command(folder, tmp_path / "out", *more, "--resume"))
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_packed_rows_and_prompt_tuning_learn_as_well(folder: Path, tmp_path: Path) -> None:
    fast = ["--max-steps", 2, "--alpha", 1]
    done(*command(folder, tmp_path / "packed", *fast, "--rank", 4, "data.packing=true", "--max-length", 256))
    done(*command(folder, tmp_path / "prompt", *fast, "--method", "prompt-tuning", "--lr", 0.1))
    assert len(curve(tmp_path / "packed")) == len(curve(tmp_path / "prompt")) == 2


def test_the_recipe_that_is_written_says_it_and_runs_again(folder: Path, tmp_path: Path) -> None:
    done(*command(folder, tmp_path / "one", "--max-steps", 2, "--rank", 4, "--beta", 0.5))
    recipe = Recipe.read(tmp_path / "one" / "recipe.yaml")
    assert recipe.distillation is not None
    assert (recipe.distillation.beta, recipe.distillation.teacher) == (0.5, str(folder / "teacher"))
    done("distill", tmp_path / "one" / "recipe.yaml", "-o", tmp_path / "two", "--no-plan")
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    refused = run("train", tmp_path / "one" / "recipe.yaml", "-o", tmp_path / "three")
    assert refused.exit_code == 2
    assert "slimtune distill" in refused.output


def test_seq_kd_learns_what_the_teacher_writes_and_files_of_answers(folder: Path, tmp_path: Path) -> None:
    fast = ["--max-steps", 1, "--rank", 4]
    result = run(*command(folder, tmp_path / "out", *fast, "--seq-kd", "--max-new-tokens", 200))
    written = tmp_path / "out.answers.jsonl"
    if result.exit_code:  # a random teacher may never end
        assert "came to an end" in result.output
    else:
        assert json.loads(written.read_text().splitlines()[0])["messages"][-1]["role"] == "assistant"
    done("distill", folder / "orders.jsonl", folder / "student", "--seq-kd", "-o", tmp_path / "file", *FAST, *fast)
    assert Recipe.read(tmp_path / "file" / "recipe.yaml").distillation is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--alpha", 0], "nothing is learned from the teacher"),
        (["--beta", 2], "beta must be a number from 0 to 1"),
        (["--temperature", 0], "temperature must be above 0"),
        (["--lmbda", 0.5, "--top-k", 8], "leave one of them out"),
        (["--hidden", 1], "leave it out for a model of texts"),
        (["--seq-kd", "--beta", 1], "--beta would change nothing"),
        (["--lmbda", 0.5, "data.packing=true"], "data.packing hides where they end"),
        (["task=dpo"], "not for task dpo"),
    ],
)
def test_what_is_refused(folder: Path, tmp_path: Path, more: list[Any], said: str) -> None:
    result = run(*command(folder, tmp_path / "out", *more))
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model().save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    result = run("distill", other, folder / "student", "--data", folder / "orders.jsonl", "-o", tmp_path / "out", *FAST)
    assert result.exit_code == 2
    assert "--seq-kd" in result.output


@pytest.mark.parametrize("hidden", [0, 0.5])
def test_an_encoder_learns_logits_and_hidden_states(tmp_path: Path, hidden: float) -> None:
    save_encoder(tmp_path / "big", num_hidden_layers=3, seed=2)
    save_encoder(tmp_path / "small", num_hidden_layers=1)
    rows = write_lines(tmp_path / "rows.jsonl", *reviews(40))
    done("train", tmp_path / "big", rows, "-o", tmp_path / "teacher", "--method", "full", "--lr", 0.01, *FAST,
         "--max-steps", 25)  # fmt: skip
    command = ["distill", tmp_path / "teacher", tmp_path / "small", "--data", rows, "-o", tmp_path / "out"]
    more = ["--method", "full", "--lr", 0.01, "--max-steps", 25, "--hidden", hidden, "--alpha", 1]
    result = done(*command, *more, *FAST, "data.held_out=0.25")
    losses = curve(tmp_path / "out")
    assert losses[-1] < 0.5 * losses[0]
    assert "accuracy" in result.output


def test_hidden_states_of_another_width_are_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path / "big", hidden_size=64)
    save_encoder(tmp_path / "small")
    rows = write_lines(tmp_path / "rows.jsonl", *reviews(16))
    done("train", tmp_path / "big", rows, "-o", tmp_path / "teacher", "--method", "full", "--max-steps", 1, *FAST)
    command = ["distill", tmp_path / "teacher", tmp_path / "small", "--data", rows, "-o", tmp_path / "out"]
    result = run(*command, "--hidden", 1, "--max-steps", 1, *FAST)
    assert result.exit_code == 2
    assert "have 32 features and the teacher's 64" in " ".join(result.output.split())
