"""A model's own Python code runs where the flag on the command line says so, and nowhere else; nothing asks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from small_text_model import orders, save_base, write_lines

CODE = """
from pathlib import Path
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
Path({mark!r}).open("a").write("ran\\n")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnForSequenceClassification(LlamaPreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.model, self.score = LlamaModel(config), nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.score(hidden[:, 0]))
"""
FLAG = "--trust-remote-code"
SHORT = ["--max-new-tokens", "2"]
STEPS = ["--max-steps", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def mark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the model's code writes to when it is run."""
    return tmp_path_factory.mktemp("mark") / "code-ran.txt"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, mark: Path) -> Path:
    """A model whose configuration and class are in its folder."""
    folder = save_base(tmp_path_factory.mktemp("models") / "own")
    (folder / "own_model.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return write_lines(path, *({"messages": example.messages()} for example in orders(8)))


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("a question was asked at the terminal")

    monkeypatch.setattr("builtins.input", asked)


def recipe(tmp_path: Path, own: Path, rows: Path, **model: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    sections = {
        "model": {"name": str(own), **model},
        "data": {"train": str(rows), "held_out": 0.3, "max_length": 128},
        "training": {"max_steps": 2, "batch_size": 2},
        "output": str(tmp_path / "tuned"),
    }
    path.write_text(yaml.safe_dump(sections))
    return path


def commands(tmp_path: Path, own: Path, rows: Path) -> dict[str, list[Any]]:
    written = recipe(tmp_path, own, rows)
    return {
        "train": ["train", own, rows, "-o", tmp_path / "tuned", *STEPS],
        "train a recipe": ["train", written],
        "plan": ["plan", own, "--data", rows, "--method", "lora", "--base", "dense", "--device", "T4"],
        "recipe check": ["recipe", "check", written],
        "compare": ["compare", written, "--methods", "", "--shots", "0", "--questions", 2, "-o", tmp_path / "compared"],
        "evaluate": ["evaluate", own, rows, "--limit", 2, *SHORT],
        "generate": ["generate", own, "hello", *SHORT],
        "chat": ["chat", own, *SHORT],
    }


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "name", ["train", "train a recipe", "plan", "recipe check", "compare", "evaluate", "generate", "chat"]
)
def test_it_runs_with_the_flag_alone(run: Any, tmp_path: Path, own: Path, rows: Path, mark: Path, name: str) -> None:
    command = commands(tmp_path, own, rows)[name]
    forget(mark)
    refused = run(*command, stdin="hello\n")
    assert refused.exit_code in (1, 2), refused.output
    assert not isinstance(refused.exception, Exception) or isinstance(refused.exception, SystemExit)
    assert FLAG in refused.output
    assert not mark.exists()
    trusted = run(*command, FLAG, stdin="hello\n")
    assert trusted.exit_code == 0, trusted.output
    assert mark.exists() or name == "compare", "compare runs in processes of its own"


def forget(mark: Path) -> None:
    """As in a new process: code that was imported once would not run again."""
    mark.unlink(missing_ok=True)
    for module in [module for module in sys.modules if module.startswith("transformers_modules")]:
        del sys.modules[module]


@pytest.mark.parametrize("command", [["train"], ["recipe", "check"], ["compare"]])
def test_a_recipe_alone_allows_no_code(
    run: Any, tmp_path: Path, own: Path, rows: Path, mark: Path, command: list[str]
) -> None:
    forget(mark)
    path = recipe(tmp_path, own, rows, trust_remote_code=True)
    refused = run(*command, path)
    assert refused.exit_code in (1, 2), refused.output
    assert FLAG in refused.output
    assert not mark.exists()
    assert not (tmp_path / "tuned").exists()


def test_what_was_trained_with_code_is_predicted_and_looked_at(
    run: Any, tmp_path: Path, own: Path, rows: Path, mark: Path
) -> None:
    trained = run("train", own, rows, "-o", tmp_path / "tuned", FLAG, *STEPS)
    assert trained.exit_code == 0, trained.output
    forget(mark)
    assert run("info", own).exit_code == 0
    assert run("info", tmp_path / "tuned").exit_code == 0
    assert run("data", "preview", rows, "--model", own).exit_code in (0, 2)
    refused = run("generate", tmp_path / "tuned", "hello", *SHORT)
    assert refused.exit_code == 2, refused.output
    assert FLAG in refused.output
    assert not mark.exists()
    assert run("generate", tmp_path / "tuned", "hello", FLAG, *SHORT).exit_code == 0
    assert run("generate", own, "hello", "--adapter", tmp_path / "tuned", FLAG, *SHORT).exit_code == 0


def test_a_classifier_of_a_folder_with_code_for_several_heads(run: Any, tmp_path: Path, own: Path, mark: Path) -> None:
    folder = tmp_path / "classifier"
    shutil.copytree(own, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] |= {"AutoModelForSequenceClassification": "own_model.OwnForSequenceClassification"}
    config |= {
        "architectures": ["OwnForSequenceClassification"],
        "id2label": {"0": "bad", "1": "good"},
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    hidden = config["hidden_size"]
    save_file(weights | {"score.weight": torch.randn(2, hidden)}, folder / "model.safetensors", {"format": "pt"})
    texts = write_lines(tmp_path / "texts.jsonl", {"text": "red wine"}, {"text": "blue cheese"})

    forget(mark)
    refused = run("predict", folder, texts)
    assert refused.exit_code == 2, refused.output
    assert FLAG in refused.output
    assert not mark.exists()
    answered = run("predict", folder, texts, FLAG)
    assert answered.exit_code == 0, answered.output
    assert set(answered.stdout.split()) <= {"bad", "good"}
    assert mark.exists()
